// How long a step of each family is expected to take: what plan_cuda compares. It decides between
// families and tiles, never what a result is, so that being wrong costs time only.
//
// All numbers are for an H200 (132 multiprocessors); other devices differ in the number of their
// multiprocessors. None was measured by this project so far. Each says where it comes from:
//   [unit]  flash-vla's hardware unit tests, H100: unit-mma, unit-launch, unit-coop
//   [dsm]   arXiv 2501.12084, distributed shared memory of an H800
//   [fuse]  arXiv 2508.18850, clusters of an H100
//   [chips] Chips and Cheese, an H100's latencies
//   [arch]  architecture tables in the CUDA programming guide
//   [est]   estimate: reasoned from such numbers, and perhaps wrong by half
// Where a step itself was measured, kMeasured has the time, and goes first.
#pragma once

#include <algorithm>
#include <array>

#include "plan.h"

namespace lstm_cuda::model {

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// A time of one step, in microseconds, of a full launch: as many tiles as the device runs at once.
struct Measured {
  Family family;  // not rec_step, whose time depends on all sizes
  Arithmetic arithmetic;
  int padded_hidden, column_tiles, turns;  // rec_cta has one tile
  bool backward;
  int architecture;
  double us;  // device, date
};

// `python -m benchmarks.gpu.step_times` prints these rows.
inline constexpr std::array<Measured, 0> kMeasured{};

// ---- Rates of one multiprocessor, in cycles and by cycle.
inline constexpr double kClock = 1900;             // [est] cycles a us; the boost clock is 1980
inline constexpr double kProductIssue = 6.26;      // [unit] m16n8k16 to the next, in a quarter
inline constexpr double kProductLatency = 25;      // [unit]
inline constexpr double kTf32Product = 2;          // [unit] of rec_cta: as long as two of 16 bits
inline constexpr double kFragmentLatency = 33;     // [est] ldmatrix; a load takes 23 to 30
inline constexpr double kMultiplyAdds = 128;       // [arch] float32
inline constexpr double kDoubleMultiplyAdds = 64;  // [arch]
inline constexpr double kSpecialFunctions = 16;    // [arch] results
inline constexpr double kSharedBytes = 118;        // [est] of 128
inline constexpr double kMemory = 4.2e6;           // [est] bytes a us, of the whole device

// ---- Exchange in a cluster.
inline constexpr double kPeerLatency = 220;  // [est] store to waiting warp; loads: 181 to 213 [dsm]
inline constexpr double kPeerBytes = 16.4;   // [dsm] in and out
struct Resident {
  int blocks, clusters;
};
// Clusters that run at once, of one block a multiprocessor. [unit]; of 16 blocks [est], from 112
// active multiprocessors [fuse].
inline constexpr Resident kResidentClusters[] = {{2, 66}, {4, 30}, {8, 15}, {16, 7}};

// ---- Exchange through L2.
inline constexpr double kHandOver = 608;     // [est] store to waiting warp; a swap: 2 x 306 [chips]
inline constexpr double kL2Bytes = 45;       // [est] by multiprocessor; 38 to 70 published
inline constexpr double kL2AllBytes = 2895;  // [est] all together, 5.5 TB/s
inline constexpr double kL2Merged = 0.35;    // [est] of reads of the same bytes, what is left
inline constexpr double kL2Size = 45e6;      // [est] bytes that stay there, of 60 MB

// ---- Parts of a step, in cycles. [est], read off the machine code of prototypes.
inline constexpr double kCtaForward = 100, kCtaBackward = 150;  // all but product and cell
inline constexpr double kWait = 40;             // a cluster's loop, and its first load
inline constexpr double kPartialSums = 75;      // of warps that share the depth
inline constexpr double kSend = 95;             // turning and sending h
inline constexpr double kReduceAndStore = 175;  // adding what came, storing and loading dgates
inline constexpr double kTotals = 120;  // values of units summed up for whole rows, in a block
inline constexpr double kGroupRest = 260, kGroupReduce = 150;

// ---- Launches, in us.
inline constexpr double kLaunch = 4.5;        // [est] a recurrence, but for its weights
inline constexpr double kSmallLaunch = 3.0;   // [est] one that prepares something
inline constexpr double kNextLaunch = 1.35;   // [unit] from step to step; 1.24 to 1.40 in a graph
inline constexpr double kShortestStep = 1.0;  // [est] of rec_step, without the launch
inline constexpr double kBackwardStep = 0.4;  // [est] what its backward steps take more
inline constexpr double kPacked = 1e6;        // [est] bytes of weights packed in a us
inline constexpr double kFork = 5.0;          // [est] two streams waiting for each other
inline constexpr double kProductLoss = 1.15;  // [est] what rec_step loses of product_rate

// Multiply-adds a us of rec_step, of the whole device: 25, 48, 280 and 600 TFLOP/s. [est]: mma.sync
// gives 63 % of the peak in 16 bits [unit].
constexpr double product_rate(Arithmetic a) {
  return a == Arithmetic::float64   ? 12.5e6
         : a == Arithmetic::float32 ? 24e6
         : a == Arithmetic::tf32    ? 140e6
                                    : 300e6;
}

// ---- The step of one tile, from these. Terms are in the order of a step.

constexpr bool short_operands(Arithmetic a) {
  return a == Arithmetic::float16 || a == Arithmetic::bfloat16;
}
constexpr int element_bytes(Arithmetic a) {
  return a == Arithmetic::float64 ? 8 : short_operands(a) ? 2 : 4;
}

// Cycles of the cells of one block. Forward is bound by special functions or by the rest.
constexpr double cell_cycles(double cells, Arithmetic a, bool backward) {
  const double rounds = cells / 128;
  if (backward) return 45 + 14 * rounds;
  const bool approximate = short_operands(a);
  return 70 + std::max(cells * (approximate ? 5 : 10) / kSpecialFunctions,
                       rounds * (approximate ? 30 : 75));
}

// Of a product [rows, depth] x [depth, columns] in fragments, `products` for each.
constexpr double product_cycles(double rows, double depth, double columns, double products) {
  return rows * depth * columns / 2048 / 4 * kProductIssue * products;
}

constexpr double cta_cycles(Arithmetic a, int hidden, bool backward) {
  const double rows = 4.0 * hidden, columns = 8;
  double work = 0;
  if (a == Arithmetic::float64) {
    work = rows * hidden * columns / kDoubleMultiplyAdds;
  } else if (a == Arithmetic::float32) {
    work = rows * hidden * columns / kMultiplyAdds;
  } else {
    const double operands = (backward ? rows : hidden * rows / 32) * columns * element_bytes(a);
    work = std::max(product_cycles(rows, hidden, columns, a == Arithmetic::tf32 ? kTf32Product : 1),
                    operands / kSharedBytes);
  }
  return (backward ? kCtaBackward : kCtaForward) + work + kProductLatency + kFragmentLatency +
         cell_cycles(hidden * columns, a, backward);
}

// The work of one block of a cluster or group in a step.
struct BlockWork {
  double cells;      // of the block
  double exchanged;  // bytes that come in
  double product;    // cycles on the tensor cores
  double operands;   // bytes that products read from shared memory

  constexpr BlockWork(Arithmetic a, const ResidentShape& shape, int tiles, bool backward) {
    const double columns = 8.0 * tiles, units = shape.units(), rows = 4 * units;
    const double values = shape.hidden * columns, bytes = 2 * parts_of(a);  // of an operand
    cells = units * columns;
    // Forward all of h, backward sums for the block's units from every block.
    exchanged = values * (backward ? (short_operands(a) ? 2 : 4) : bytes);
    product = product_cycles(rows, shape.hidden, columns, parts_of(a) == 2 ? 3 : 1);
    const double weights_from_shared =
        backward ? double(shape.shared_backward) * shape.warps * 16 / shape.hidden
                 : double(shape.shared_forward) * shape.split * 16 / shape.hidden;
    operands = weights_from_shared * rows * shape.hidden * bytes;
    // A warp has 32 rows of weights, or backward all gates of the block.
    operands +=
        backward ? shape.warps * rows * columns * bytes : std::max(1.0, rows / 32) * values * bytes;
  }
};

// Cycles in which a block of a cluster is at work, and in which it can only wait for others.
struct StepOfCluster {
  double work, waits;

  constexpr StepOfCluster(Arithmetic a, const ResidentShape& shape, int tiles, bool backward) {
    const BlockWork w(a, shape, tiles, backward);
    const double sent = w.exchanged * (shape.blocks - 1) / shape.blocks;
    const double transfer = sent / kPeerBytes;
    const double product = std::max(w.product, (w.operands + sent) / kSharedBytes) +
                           kProductLatency + kFragmentLatency;
    const double longer = std::max(product, transfer), cell = cell_cycles(w.cells, a, backward);
    if (!backward) {  // products begin with what has come first
      work = kWait + longer + kPartialSums + cell + kSend;
      waits = kPeerLatency + transfer / 4;
    } else {
      const double reduction = w.cells * shape.blocks * 4 / kSharedBytes;
      work = kWait + longer + reduction / 2 + cell + kReduceAndStore;
      waits = kPeerLatency + std::min(product, transfer) / 2;
    }
  }
};

constexpr double cluster_cycles(Arithmetic a, const ResidentShape& shape, int tiles, int turns,
                                bool backward) {
  if (turns > 1) {  // the others' work hides what a turn waits for, if that takes long enough
    const StepOfCluster turn(a, shape, tiles / turns, backward);
    return std::max(turn.work + turn.waits, turns * turn.work);
  }
  const StepOfCluster step(a, shape, tiles, backward);
  return step.work + step.waits;
}

// `groups` run at once and share L2.
constexpr double group_cycles(Arithmetic a, const ResidentShape& shape, int tiles, int groups,
                              bool backward) {
  const BlockWork w(a, shape, tiles, backward);
  const double work = std::max(w.product, w.operands / kSharedBytes);
  // Forward all blocks of a group read the same, backward each its own sums.
  const double all = w.exchanged * groups * shape.blocks / kL2AllBytes;
  const double transfer = std::max(w.exchanged / kL2Bytes, all * (backward ? 1 : kL2Merged));
  return kHandOver + std::max(work, transfer) + std::min(work, transfer) / 4 + kGroupRest +
         (backward ? kGroupReduce : 0) + cell_cycles(w.cells, a, backward);
}

// What normalising rows adds to a step of rec_cta or rec_cluster: totals twice, each waited for.
constexpr double norm_cycles(Family family, CellKind cell) {
  if (cell != CellKind::norm) return 0;
  return 2 * (kTotals + (family == Family::rec_cluster ? kPeerLatency : 0));
}

// ---- Whole recurrences, in us.

// What passes through memory in one step of the whole batch, while training: gates in and out, c,
// and y or dy.
constexpr double memory_us(const LayerShape& s, Arithmetic a) {
  const double of_cell = 9 * element_bytes(a) + (a == Arithmetic::float64 ? 8 : 4);
  return double(s.B) * double(s.D) * double(s.H) * of_cell / kMemory;
}

// The measured time of a step, or the model's.
constexpr double step_us(Family family, Arithmetic a, int padded_hidden, int tiles, int turns,
                         bool backward, const CudaDevice& device, double cycles) {
  for (const Measured& m : kMeasured)
    if (m.family == family && m.arithmetic == a && m.padded_hidden == padded_hidden &&
        m.column_tiles == tiles && m.turns == turns && m.backward == backward &&
        m.architecture == device.architecture)
      return m.us;
  return cycles / kClock;
}

constexpr double per_multiprocessor(double of_132, const CudaDevice& device) {
  return of_132 * device.multiprocessors / 132;
}

// Clusters that run at once.
constexpr int64_t resident_clusters(int blocks, const CudaDevice& device) {
  for (const Resident& r : kResidentClusters)
    if (r.blocks >= blocks)
      return std::max<int64_t>(1, int64_t(r.clusters) * device.multiprocessors / 132);
  return 1;
}

// Each multiprocessor reads its own weights.
constexpr double weights_us(double bytes) { return bytes / kL2Bytes / kClock; }

// Packing the weights of clusters and groups.
constexpr double pack_us(const LayerShape& s, Arithmetic a, int hidden) {
  const double packed = double(s.D) * 4 * hidden * hidden * 2 * parts_of(a);
  return kSmallLaunch + packed / kPacked;
}

// Whether the product of inputs hides more of it than a second stream costs.
constexpr bool worth_packing_beside(const LayerShape& s, Arithmetic a, int hidden) {
  const double product =
      double(s.T) * double(s.B) * 4 * double(s.D * s.H) * double(s.I) / product_rate(a);
  return std::min(product, pack_us(s, a, hidden)) > kFork;
}

// What clusters and groups need before they start: packed weights, and products of initial states.
// Counted whether there is an initial state or not: the same layer takes the same family with it
// and without, and for few steps, where this matters, there usually is one. Packing is counted even
// where it is hidden: what is hidden is small beside a recurrence that long.
constexpr double prepared_us(const LayerShape& s, Arithmetic a, int hidden) {
  return 2 * kSmallLaunch + pack_us(s, a, hidden);
}

constexpr double cta_us(const LayerShape& s, CellKind cell, Arithmetic a, int hidden, bool backward,
                        const CudaDevice& device) {
  const double weights = 4.0 * hidden * hidden * element_bytes(a);
  // Two blocks of few registers share a multiprocessor without being in each other's way.
  const int64_t at_once = int64_t(device.multiprocessors) * (weights <= 32768 ? 2 : 1);
  const int64_t waves = ceil_div(ceil_div(s.B, 8) * s.D, at_once);
  const double step =
      step_us(Family::rec_cta, a, hidden, 1, 1, backward, device, cta_cycles(a, hidden, backward)) +
      norm_cycles(Family::rec_cta, cell) / kClock;
  return kLaunch + double(waves) * weights_us(weights) +
         double(s.T) * std::max(double(waves) * step, memory_us(s, a));
}

constexpr double cluster_us(const LayerShape& s, CellKind cell, Arithmetic a,
                            const ResidentShape& shape, int tiles, int turns, bool backward,
                            const CudaDevice& device) {
  const int64_t waves =
      ceil_div(ceil_div(s.B, 8 * tiles) * s.D, resident_clusters(shape.blocks, device));
  const double step = step_us(Family::rec_cluster, a, shape.hidden, tiles, turns, backward, device,
                              cluster_cycles(a, shape, tiles, turns, backward)) +
                      norm_cycles(Family::rec_cluster, cell) / kClock;
  const double weights = 4.0 * shape.hidden * shape.units() * 2 * parts_of(a);
  return prepared_us(s, a, shape.hidden) + kLaunch + double(waves) * weights_us(weights) +
         double(s.T) * std::max(double(waves) * step, memory_us(s, a));
}

constexpr double group_us(const LayerShape& s, Arithmetic a, const ResidentShape& shape, int tiles,
                          int groups, bool backward, const CudaDevice& device) {
  const int64_t parts = ceil_div(s.B, 8 * tiles) * s.D, rounds = ceil_div(parts, groups);
  const double step = step_us(Family::rec_group, a, shape.hidden, tiles, 1, backward, device,
                              group_cycles(a, shape, tiles, groups, backward));
  const double weights = 4.0 * shape.hidden * shape.units() * 2 * parts_of(a);
  // Each part has words of its own, of two steps, which are zeroed first.
  const double words =
      2 * BlockWork(a, shape, tiles, backward).exchanged * (backward ? shape.blocks : 1);
  return prepared_us(s, a, shape.hidden) + double(parts) * words / kMemory +
         double(rounds) * (kLaunch + weights_us(weights)) +
         double(s.T) * std::max(double(rounds) * step, memory_us(s, a));
}

// `columns`: of a tile; the batch is padded to them.
constexpr double launches_us(const LayerShape& s, CellKind cell, Arithmetic a, int columns,
                             bool backward, const CudaDevice& device) {
  const double hidden = double(s.D * s.H * s.P), rows = double(ceil_div(s.B, columns) * columns);
  const double all_bytes = (s.projected ? 5 : 4) * hidden * element_bytes(a);
  const auto launch_us = [&](double weights, double least) {
    const double bytes = weights * element_bytes(a);
    return kNextLaunch +
           std::max({weights * rows * kProductLoss / per_multiprocessor(product_rate(a), device),
                     bytes / (all_bytes <= kL2Size ? kL2AllBytes * kClock : kMemory), least,
                     kShortestStep});
  };
  const double step = launch_us(4 * hidden, memory_us(s, a)) +
                      (s.projected ? launch_us(hidden, 0) : 0) + (backward ? kBackwardStep : 0) +
                      (cell == CellKind::norm ? kNextLaunch + kShortestStep : 0);  // whole rows
  return kSmallLaunch + double(s.T) * step;
}

// What families with the projection folded into their weights need besides the recurrence, as the
// header of ops_projection.h has it: products, what these and element-wise kernels move through memory,
// and launches.
constexpr double folding_us(const LayerShape& s, Arithmetic a, Family family, bool backward,
                            const CudaDevice& device) {
  const double D = double(s.D), H = double(s.H), P = double(s.P), rows = double(s.T * s.B) * D;
  const double weights = 4 * D * H * P * H;  // w_hh w_hr
  const double multiply_adds = weights + rows * P * (backward ? H + 4 * H : H);
  // Forward m, y; backward dy, dm, dgates, its product in and out, dy, dh.
  const double values = 4 * D * H * H + rows * (backward ? 5 * H + 5 * P : H + P);
  const double launches = (backward ? 3 : 2) * D + 2 +
                          (family == Family::rec_cta ? 2 : 0);  // others have h0's counted already
  return launches * kSmallLaunch + values * element_bytes(a) / kMemory +
         multiply_adds / per_multiprocessor(product_rate(a), device);
}

}  // namespace lstm_cuda::model
