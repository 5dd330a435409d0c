// rec_cta backward: all steps of one tile of 8 batch rows and one recurrence in one block.
//
//   each step, from the last to the first:
//     dh = w_hh^T dgates[the step processed before] + dy[t];  cell backward (cell.h);  dgates[t]
//
// Grid: D * ceil(B / 8) blocks that know nothing of each other. Block: a warp for 16 hidden units.
//   Warp w has rows 16w..16w+15 of w_hh^T, so lane (g, q) gets dh of units 16w + g and 16w + g + 8
//   for columns 2q and 2q + 1, and has dh and dc of these four cells in registers for all steps.
//   The product's depth is 4 * padded H, gate by gate; no part of it is left to another warp.
// Weights: w_hh^T stays in registers. Units past H are zeros there and never become active.
// Shared memory:
//   dgates           [2 steps][4 * padded H] x 8 columns   rounded as they are stored
//   gates, c, dy, dc [4 steps][8 columns][4H or H]         rings, filled 3 steps ahead by cp.async
//   Before the first step the ring of gates is where w_hh passes through.
// Protocol: one block_sync a step. Step s reads dgates[(s - 1) % 2], slot s % 4 and, for the c of
// the step before in the order of the recurrence, slot (s + 1) % 4. It writes dgates[s % 2] and
// begins to fill slot (s + 3) % 4, which step s - 1 read last. The barrier at the end of step s
// therefore ends four hazards: dgates[s % 2] is complete before step s + 1 reads it, and
// dgates[(s - 1) % 2] is read before step s + 1 writes it; slots (s + 1) % 4 and (s + 2) % 4 are
// complete (every thread has waited for its own copies), and slot s % 4 is read before step s + 1
// fills it.
//
// Cells of other kinds than torch.nn.LSTM's: VariantCells, in variant_cta_backward.cuh.
#pragma once

#include "rec_cta.cuh"
#include "unit_totals.cuh"

namespace lstm_cuda::rec_cta {

inline constexpr int kSlots = 4;  // of a ring: inputs are fetched kSlots - 1 steps ahead

// A ring of input rows: for each of kSlots steps one row of up to kWidth values for each column.
// Threads share out the columns; the 16 bytes between rows keep the columns' banks apart.
template <class Value, int kWidth, int kThreads>
struct RowRing {
  static constexpr int kPerChunk = 16 / sizeof(Value);
  static constexpr int kPitch = kWidth + kPerChunk;
  static constexpr int kSlotValues = kColumns * kPitch;
  static constexpr int kValues = kSlots * kSlotValues;
  static constexpr int kThreadsOfColumn = kThreads / kColumns;

  Value* values;
  int width;     // of the rows in global memory
  bool aligned;  // these begin at multiples of 16 bytes, and so end

  LSTM_DEVICE RowRing(ptx::Shared& shared, const void* rows, int row_width)
      : values(shared.take<Value>(kValues, 16)),
        width(row_width),
        aligned((reinterpret_cast<uintptr_t>(rows) | unsigned(row_width) * sizeof(Value)) % 16 ==
                0) {}

  static LSTM_DEVICE int column_to_fetch() { return int(ptx::thread_index()) / kThreadsOfColumn; }

  // Begins to copy this thread's share of its column's row; to be waited for like cp.async. Rows
  // that are not aligned are copied at once.
  LSTM_DEVICE void fetch(unsigned step, const Value* row) const {
    Value* to = values + step % kSlots * kSlotValues + column_to_fetch() * kPitch;
    LSTM_UNROLL
    for (int i = 0; i < kWidth; i += kThreadsOfColumn * kPerChunk) {
      const int k = i + int(ptx::thread_index()) % kThreadsOfColumn * kPerChunk;
      if (k >= width) continue;
      if (aligned) {
        ptx::cp_async16(to + k, row + k);
      } else {
        LSTM_UNROLL
        for (int e = 0; e < kPerChunk; ++e)
          if (k + e < width) to[k + e] = row[k + e];
      }
    }
  }

  LSTM_DEVICE Value at(unsigned step, int column, int k) const {
    return values[step % kSlots * kSlotValues + column * kPitch + k];
  }
};

// Which unit of the warp a row of its product is; k is the gate and unit whose dgates it
// multiplies.
template <int kPadded_>
struct BackwardRows {
  static constexpr int kPadded = kPadded_;
  static constexpr int kThreads = kPadded / 16 * 32;
  static constexpr bool kTransposed = true;
  static LSTM_DEVICE int first_unit() { return int(ptx::thread_index()) / 32 * 16; }
  static LSTM_DEVICE int gate(int, int, int k) { return k / kPadded; }
  static LSTM_DEVICE int unit(int half) { return 8 * half; }
};

template <Arithmetic arithmetic_, int kPadded_, CellKind cell_>
struct BackwardTraits {
  static constexpr Arithmetic arithmetic = arithmetic_;
  static constexpr CellKind cell = cell_;
  using Element = typename Types<arithmetic>::Element;
  using Compute = typename Types<arithmetic>::Compute;
  static constexpr int kPadded = kPadded_;
  using Rows = BackwardRows<kPadded>;
  static constexpr int kThreads = Rows::kThreads;
  using Tile = OperandTile<Element, 4 * kPadded>;
  using Product = rec_cta::Product<arithmetic, 1, 4 * kPadded, 4>;
  using Gates = RowRing<Element, 4 * kPadded, kThreads>;
  using Elements = RowRing<Element, kPadded, kThreads>;
  using Computes = RowRing<Compute, kPadded, kThreads>;
  using Totals = BlockTotals<Compute, kThreads / 32, 1, 2>;  // of norm
  static constexpr std::size_t kSharedBytes =
      (2 * Tile::kValues + Gates::kValues + Elements::kValues) * sizeof(Element) +
      2 * Computes::kValues * sizeof(Compute) + (cell == CellKind::norm ? Totals::kSharedBytes : 0);
  static_assert(WeightPanel<Element, kPadded>::kValues <= Gates::kValues);
  static_assert(kPadded % 32 == 0 && kThreads <= 1024);
  static_assert(kSharedBytes <= 99 * 1024, "what a block of every architecture may have");
};

// What a block reads in its steps, as rings.
template <class K>
struct BackwardRings {
  typename K::Gates gates;
  typename K::Computes c;
  typename K::Elements dy;
  typename K::Computes dc;

  LSTM_DEVICE BackwardRings(ptx::Shared& shared, const RecurrenceBackward& p, int H)
      : gates(shared, p.gates, 4 * H),
        c(shared, p.c, H),
        dy(shared, p.dy, H),
        dc(shared, p.dc, H) {}

  // Begins to fetch a step, of which [T, B, D, H] has this thread's column at `at`.
  LSTM_DEVICE void fetch(const RecurrenceBackward& p, int step, int64_t at) const {
    gates.fetch(step, static_cast<const typename K::Element*>(p.gates) + 4 * at);
    c.fetch(step, static_cast<const typename K::Compute*>(p.c) + at);
    if (p.dy) dy.fetch(step, static_cast<const typename K::Element*>(p.dy) + at);
    if (p.dc) dc.fetch(step, static_cast<const typename K::Compute*>(p.dc) + at);
  }
};

struct BackwardParams {
  RecurrenceBackward problem;         // its lists of weights are in host memory
  const void* w_hh[kMaxRecurrences];  // [4H, H] each
  int row_step;                       // elements of [T, B, D, H] from row to row
  int64_t time_step;                  // and from time to time
  Variant variant;                    // its own, which is in host memory; not of plain cells
};

// A step as it is processed.
struct StepBack {
  int step, t;
  int64_t tile_at;  // of its tile in [T, B, D, H]
  unsigned fresh;   // bit j: no state of column 2q + j crosses into it

  // Of a column's row in [T, B, D, 4H].
  LSTM_DEVICE int64_t gates_at(const BackwardParams& params, int column) const {
    return 4 * (tile_at + column * params.row_step);
  }
  LSTM_DEVICE bool is_fresh(int i) const { return fresh >> i % 2 & 1; }
};

// A lane's four cells: i / 2 says which unit, i % 2 which column.
template <class K>
struct LaneCells {
  using Compute = typename K::Compute;

  const BackwardParams& params;
  const RecurrenceBackward& p;
  const Part& part;
  const BackwardRings<K>& rings;
  int H, q, first_unit;
  int lengths[2];  // of the rows in its columns

  LSTM_DEVICE LaneCells(const BackwardParams& own_params, const Part& own_part,
                        const BackwardRings<K>& own_rings)
      : params(own_params),
        p(own_params.problem),
        part(own_part),
        rings(own_rings),
        H(int(own_params.problem.shape.H)),
        q(lane() % 4),
        first_unit(int(ptx::thread_index()) / 32 * 16 + lane() / 4),
        lengths{own_part.length(2 * q), own_part.length(2 * q + 1)} {}

  LSTM_DEVICE int column(int i) const { return 2 * q + i % 2; }
  LSTM_DEVICE int unit(int i) const { return first_unit + 8 * (i / 2); }
  LSTM_DEVICE int length(int i) const { return i % 2 ? lengths[1] : lengths[0]; }
  LSTM_DEVICE bool exists(int i) const { return column(i) < part.rows && unit(i) < H; }
  LSTM_DEVICE bool active(int i, int t) const { return exists(i) && t < length(i); }
  LSTM_DEVICE int64_t state_at(int i) const {  // in [D, B, H]
    const int64_t row = part.d * p.shape.B + part.b(column(i));
    return row * H + unit(i);
  }

  LSTM_DEVICE Compute dy(const StepBack& now, int i) const {
    return to_compute(rings.dy.at(now.step, column(i), unit(i)));
  }
  LSTM_DEVICE Compute dc(const StepBack& now, int i) const {
    return rings.dc.at(now.step, column(i), unit(i));
  }
  // A cell as the forward pass left it, and c before it.
  LSTM_DEVICE Cell<Compute> load(const StepBack& now, int i, Compute& before) const {
    const auto gate = [&](int k) {
      return to_compute(rings.gates.at(now.step, column(i), k * H + unit(i)));
    };
    const Cell<Compute> cell{
        gate(0), gate(1), gate(2), gate(3), rings.c.at(now.step, column(i), unit(i)), Compute(0)};
    // The step before in the order of the recurrence is the one that is processed next.
    before = rings.c.at(now.step + 1, column(i), unit(i));
    if (active(i, now.t) && now.t == part.first(length(i)))
      before = load_either<K::arithmetic>(p.c0, p.wide_c, state_at(i));
    before = now.is_fresh(i) ? Compute(0) : before;
    return cell;
  }

  // Writes a cell's part of dgates, as a result and as the operand of the next step.
  LSTM_DEVICE void keep(const StepBack& now, const typename K::Tile& tile, int i,
                        const Cell<Compute>& dcell) const {
    using Element = typename K::Element;
    const bool live = active(i, now.t);
    const Compute values[4] = {dcell.i, dcell.f, dcell.g, dcell.o};
    Element* const out =
        static_cast<Element*>(p.dgates) + now.gates_at(params, column(i)) + unit(i);
    LSTM_UNROLL
    for (int k = 0; k < 4; ++k) {
      const Element value = to_element<Element>(live ? values[k] : Compute(0));
      tile.at(k * K::kPadded + unit(i), column(i)) = operand<K::arithmetic>(value);
      if (exists(i)) out[k * H] = value;
    }
  }
};

// The cells of a kind: what comes to h through the product, and a step.
template <class K>
class PlainCells {
  using Compute = typename K::Compute;

 public:
  LSTM_DEVICE PlainCells(ptx::Shared&, const LaneCells<K>& own) : own_(own) {}

  // dh: what is in the register when the product of the step processed before has crossed.
  LSTM_DEVICE Compute dh_of(int, Compute, Compute product) const { return product; }

  // dh and dc come as they are after the step, and leave as they are before it.
  LSTM_DEVICE void run(const StepBack& now, const typename K::Tile& tile, Compute (&dh)[4],
                       Compute (&dc)[4]) const {
    const RecurrenceBackward& p = own_.p;
    LSTM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const bool active = own_.active(i, now.t);
      Compute before;
      Cell<Compute> cell = own_.load(now, i, before), dcell;
      const Compute dm = p.dy ? dh[i] + own_.dy(now, i) : dh[i];
      Compute dc_step = p.dc ? dc[i] + own_.dc(now, i) : dc[i];
      cell_backward<DeviceMath<K::arithmetic>>(cell, before, dm, dc_step, dcell);
      // No state crosses into a fresh step, so no gradient leaves it.
      dc[i] = active ? (now.is_fresh(i) ? Compute(0) : dc_step) : dc[i];
      dh[i] = active ? Compute(0) : dh[i];
      own_.keep(now, tile, i, dcell);
    }
  }

 private:
  const LaneCells<K>& own_;
};

// Of other kinds: variant_cta_backward.cuh.
template <class K>
class VariantCells;

template <class K>
using CellsOf = std::conditional_t<K::cell == CellKind::plain, PlainCells<K>, VariantCells<K>>;

template <class K>
LSTM_KERNEL(K::kThreads, 1)
backward_kernel(LSTM_PARAMETER BackwardParams params) {
  using Element = typename K::Element;
  using Compute = typename K::Compute;
  using Tile = typename K::Tile;
  const RecurrenceBackward& p = params.problem;
  const int H = int(p.shape.H);
  const Part part = part_of(p.shape, p.lengths, p.reset, ptx::block_index(), kColumns);
  const Schedule& schedule = part.schedule;
  const int steps = int(schedule.T);
  const auto time_of = [&](int step) { return int(schedule.time(steps - 1 - step)); };

  ptx::Shared shared;
  const BackwardRings<K> rings(shared, p, H);
  Element* const tiles = shared.take<Element>(2 * Tile::kValues, 16);

  typename K::Product product;
  load_weights<typename K::Rows>(product, rings.gates.values, params.w_hh[part.d], H);

  // Fetch the inputs of the first steps.
  const int64_t time_step = schedule.reversed ? params.time_step : -params.time_step;
  int64_t tile_at = part.row(p.shape, time_of(0), part.b(0)) * H;  // in [T, B, D, H]
  const int length_to_fetch = part.length(K::Gates::column_to_fetch());
  const auto fetch = [&](int step, int64_t at) {
    const int t = time_of(step);
    // With norm there is no register to keep it in.
    const int length =
        K::cell == CellKind::norm ? part.length(K::Gates::column_to_fetch()) : length_to_fetch;
    if (step < steps && t < length)
      rings.fetch(p, step, at + K::Gates::column_to_fetch() * params.row_step);
    ptx::cp_async_commit();  // one group a step, even an empty one: the wait counts groups
  };
  LSTM_UNROLL
  for (int step = 0; step < kSlots - 1; ++step) fetch(step, tile_at + step * time_step);

  // dh and dc of a row that has not begun are those of its final state, so nothing has to be added
  // at its last step.
  const LaneCells<K> own(params, part, rings);
  const CellsOf<K> cells(shared, own);
  Compute dh[4], dc[4];
  LSTM_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t at = own.state_at(i);
    const bool there = own.exists(i);
    dh[i] = there && p.dh_n ? to_compute(static_cast<const Element*>(p.dh_n)[at]) : Compute(0);
    dc[i] = there ? load_either<K::arithmetic>(p.dc_n, p.wide_c, at) : Compute(0);
  }
  // Bit j: no state of column 2q + j crosses into this step; the step processed before left a
  // gradient of its h. (As flags each would take a register.)
  const auto starts_fresh = [&](int step) {
    return part.fresh(step, time_of(step), 2 * own.q, own.lengths);
  };
  unsigned fresh = starts_fresh(0), crossed = 0;
  ptx::cp_async_wait<kSlots - 3>();
  ptx::block_sync();  // the inputs of the first step are complete before it reads them

  for (int step = 0;; ++step, tile_at += time_step) {
    if (step > 0) {
      Compute sums[1][4];
      product.multiply(Tile{tiles + (step - 1) % 2 * Tile::kValues}, sums);
      LSTM_UNROLL
      for (int i = 0; i < 4; ++i)
        dh[i] = crossed >> i % 2 & 1 ? cells.dh_of(i, dh[i], sums[0][i]) : dh[i];
    }
    if (step == steps) break;
    const int t = time_of(step);
    fetch(step + kSlots - 1, tile_at + (kSlots - 1) * time_step);
    const unsigned fresh_next = starts_fresh(step + 1);
    cells.run({step, t, tile_at, fresh}, Tile{tiles + step % 2 * Tile::kValues}, dh, dc);
    crossed = (unsigned(t < own.lengths[0]) | unsigned(t < own.lengths[1]) << 1) & ~fresh;
    fresh = fresh_next;
    ptx::cp_async_wait<kSlots - 3>();
    ptx::block_sync();  // the four hazards of the protocol above
  }

  // Gradients of the initial state, and zeros where no row of the tile has steps.
  LSTM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (!own.exists(i)) continue;
    const int64_t at = own.state_at(i);
    if (p.dh0) static_cast<Element*>(p.dh0)[at] = to_element<Element>(dh[i]);
    if (p.dc0) store_either<K::arithmetic>(p.dc0, p.wide_c, at, dc[i]);
    for (int64_t t = steps; t < p.shape.T; ++t) {
      const int64_t row = part.row(p.shape, t, part.b(own.column(i)));
      LSTM_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int64_t gate_at = (row * 4 + k) * H + own.unit(i);
        static_cast<Element*>(p.dgates)[gate_at] = to_element<Element>(Compute(0));
        if constexpr (K::cell != CellKind::plain)
          if (p.dgates_x) static_cast<Compute*>(p.dgates_x)[gate_at] = Compute(0);
      }
    }
  }
}

// Starts the kernel of a cell's kind.
template <CellKind cell>
Status start_backward(const char* name, const RecurrenceBackward& p, const CudaPlan& plan,
                      Stream stream) {
  const auto start = [&]<Arithmetic arithmetic, int padded>(unsigned parts) {
    using K = BackwardTraits<arithmetic, padded, cell>;
    BackwardParams params{p, {}, int(p.shape.D * p.shape.H), p.shape.B * p.shape.D * p.shape.H, {}};
    for (int64_t d = 0; d < p.shape.D; ++d) params.w_hh[d] = p.w_hh[d];
    if (p.variant) params.variant = *p.variant;
    const LaunchShape shape{
        .kernel = name, .blocks = parts, .threads = K::kThreads, .shared_bytes = K::kSharedBytes};
    return launch<backward_kernel<K>>(shape, params, stream);
  };
  return launch_planned<cell, true>(name, p.shape, plan, start);
}

}  // namespace lstm_cuda::rec_cta
