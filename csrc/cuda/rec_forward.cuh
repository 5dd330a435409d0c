// Forward recurrence with weights that stay on chip: one body for families rec_cta, rec_cluster and
// rec_group, which differ in their Team: where weights and h are, how products are made and how h
// travels from block to block.
//
//   each step:  gates = gates_x[t] + w_hh h[t-1];  cell (cell.h);  h[t], c[t]
//
// A team, one block or several, has a part (part.cuh): 8, 16 or 32 batch rows of one recurrence, for all
// steps. It may step its column tiles in turns: h of some travels while the others are multiplied.
// A block has some of the hidden units, and all their gates. A warp has octets of 8 units and,
// where depth is split, a part of the depth (resident.h); warps that differ in depth only are a row
// group. A pair of octet and column tile belongs to one warp of its row group: lane (g, q) has h and c of
// unit g of the octet and columns 2q and 2q + 1 of the tile in registers for all steps.
// Shared memory: rings of gates_x, each of one warp, of 4 steps, filled 3 steps ahead by cp.async (2 and 1
// where there is no room); and what the team needs.
// Protocol, beside the team's own: none of the block. A ring is its warp's: the warp_sync at the start of
// a step makes the slots of this step, for whose copies each lane has waited, visible to all lanes, and
// ends the reads of the slot that is filled next.
// Nothing is sent in the last step, so that nothing is on its way to a block that has left.
#pragma once

#include <algorithm>
#include <cstring>

#include "element.cuh"
#include "families.h"
#include "part.cuh"
#include "resident.h"

namespace lstm_cuda::resident {

template <Arithmetic arithmetic_, ResidentShape shape_, int tiles_, int turns_>
struct ForwardConfig {
  static constexpr Arithmetic arithmetic = arithmetic_;
  static constexpr ResidentShape shape = shape_;
  static constexpr ForwardFragments fragments{shape};
  using Element = typename Types<arithmetic>::Element;
  using Compute = typename Types<arithmetic>::Compute;
  static constexpr int kParts = parts_of(arithmetic);
  // Column tiles of one turn, and turns of one step: a part has kTiles * kTurns.
  static constexpr int kTiles = tiles_, kTurns = turns_, kColumns = 8 * kTiles * kTurns;
  static constexpr int kUnits = shape.units(), kThreads = shape.threads();
  static constexpr int kSplit = shape.split, kGroups = fragments.row_groups();
  static constexpr int kOctets = fragments.octets(), kSteps = fragments.steps();
  // Pair j of a row group and turn, octet j / kTiles and column tile j % kTiles, is owned by warp
  // j % kOwners of it. Pair i of a warp is pair i % kOwned of turn i / kOwned.
  static constexpr int kPairs = kOctets * kTiles;
  static constexpr int kOwners = std::min(kPairs, kSplit), kOwned = kPairs / kOwners;
  static constexpr int kAll = kTurns * kOwned;
  // An mma answers late: a warp keeps at least four sums going.
  static constexpr int kChains = 2 * kOctets * kTiles * kParts < 4 ? 2 : 1;
  // Of a ring: a slot has of each gate and column 8 units, for ldmatrix, or with a pitch that keeps
  // columns' banks apart. gates_x is fetched kSlots - 1 steps ahead; two slots where four would take
  // too much.
  static constexpr int kPitch = sizeof(Element) == 2 ? 8 : sizeof(Element) == 4 ? 12 : 10;
  static constexpr int kSlotValues = 4 * 8 * kPitch;
  static constexpr int kSlots =
      4 * kGroups * kOwners * kAll * kSlotValues * int(sizeof(Element)) <= 100 * 1024 ? 4 : 2;
  static_assert(kUnits % (8 * kGroups) == 0 && kPairs % kOwners == 0 && kSteps % 2 == 0);
};

// Who a warp is.
template <class F>
struct WarpRole {
  unsigned team;  // in the launch
  int block;      // in the team
  int group, split;
  int own;  // among the owners of the row group; of a warp that owns nothing, 0

  LSTM_DEVICE WarpRole()
      : team(ptx::block_index() / F::shape.blocks),
        block(int(ptx::block_index() % F::shape.blocks)),
        group(warp() % F::kGroups),
        split(warp() / F::kGroups),
        own(owner() ? split : 0) {}

  LSTM_DEVICE bool owner() const { return split < F::kOwners; }
  // Of its pair i: the column tile, and the unit of lane 0.
  LSTM_DEVICE int tile(int i) const {
    return i / F::kOwned * F::kTiles + (i % F::kOwned * F::kOwners + own) % F::kTiles;
  }
  LSTM_DEVICE int unit(int i) const {
    const int octet = group * F::kOctets + (i % F::kOwned * F::kOwners + own) / F::kTiles;
    return block * F::kUnits + octet * 8;
  }
};

// Source: where a team finds its weights and what it exchanges through.
template <class Source>
struct ForwardParams {
  RecurrenceForward problem;  // its lists of weights are in host memory
  Source source;
  unsigned first;     // the launch's first part
  int row_step;       // elements of [T, B, D, H] from row to row
  int64_t time_step;  // and from time to time

  ForwardParams(const RecurrenceForward& p, const Source& from, unsigned first_part)
      : problem(p),
        source(from),
        first(first_part),
        row_step(int(p.shape.D * p.shape.H)),
        time_step(p.shape.B * p.shape.D * p.shape.H) {}
};

// A warp's ring of gates_x for its pairs.
template <class F>
class GateRing {
  using Element = typename F::Element;
  using Compute = typename F::Compute;
  static constexpr bool kHalf = sizeof(Element) == 2;
  static constexpr int kOfWarp = F::kSlots * F::kAll * F::kSlotValues;

 public:
  static constexpr int kValues = kOfWarp * F::kGroups * F::kOwners;

  LSTM_DEVICE GateRing(ptx::Shared& shared, const void* gates, int H, const WarpRole<F>& role)
      : values_(shared.take<Element>(kValues, 16) + (role.group * F::kOwners + role.own) * kOfWarp),
        H_(H),
        aligned_((reinterpret_cast<uintptr_t>(gates) | unsigned(H) * sizeof(Element)) % 16 == 0) {}

  static LSTM_DEVICE int column() { return lane() % 8; }  // of a tile, which this lane fetches

  // Begins to copy a gate's 8 units from `unit` on, of this lane's column. To be waited for like
  // cp.async; rows that are not aligned are copied at once.
  LSTM_DEVICE void fetch(int step, int pair, const Element* row, int unit) const {
    constexpr int kPerCopy = 16 / sizeof(Element);
    Element* const to = slot(step, pair) + lane() * F::kPitch;
    const Element* const from = row + lane() / 8 * H_ + unit;
    if (aligned_) {
      LSTM_UNROLL
      for (int e = 0; e < 8; e += kPerCopy)
        if (unit + e < H_) ptx::cp_async16(to + e, from + e);
    } else {
      for (int e = 0; e < 8; ++e)
        if (unit + e < H_) to[e] = from[e];
    }
  }

  // Gate k of unit g and columns 2q and 2q + 1.
  LSTM_DEVICE void read(int step, int pair, Compute (&gates)[4][2]) const {
    if constexpr (kHalf) {
      uint32_t r[4];
      ptx::ldmatrix_x4_trans(r, slot(step, pair) + lane() * F::kPitch);
      LSTM_UNROLL
      for (int k = 0; k < 4; ++k) {
        Element both[2];
        halves(r[k], both);
        gates[k][0] = to_compute(both[0]), gates[k][1] = to_compute(both[1]);
      }
    } else {
      LSTM_UNROLL
      for (int i = 0; i < 8; ++i)
        gates[i / 2][i % 2] =
            slot(step, pair)[(i / 2 * 8 + lane() % 4 * 2 + i % 2) * F::kPitch + lane() / 4];
    }
  }

 private:
  LSTM_DEVICE Element* slot(int step, int pair) const {
    return values_ + (step % F::kSlots * F::kAll + pair) * F::kSlotValues;
  }

  Element* values_;
  int H_;
  bool aligned_;
};

// Where a step's results of a pair go. Two neighbouring units of 16 bits go out as one word: movmatrix
// gives lane (g, q) units 2q and 2q + 1 of column g.
template <class F>
struct Outputs {
  using Element = typename F::Element;
  using Compute = typename F::Compute;

  Element* y;
  Element* gates;
  Compute* c;  // null: is not wanted
  int H, row_step;
  bool save;   // gates are kept
  bool words;  // rows begin at even elements, of 16 bits

  LSTM_DEVICE Outputs(const RecurrenceForward& p, int elements_of_row)
      : y(static_cast<Element*>(p.y)),
        gates(static_cast<Element*>(p.gates)),
        c(static_cast<Compute*>(p.c)),
        H(int(p.shape.H)),
        row_step(elements_of_row),
        save(p.save),
        words(sizeof(Element) == 2 && H % 2 == 0 &&
              (reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(gates)) % 4 == 0) {}

  // at: of unit `unit` (lane 0's) and the tile's column 0, in [T, B, D, H]. Bit j of in_batch and active
  // is for columns 2q + j, bit 2 for column g. m and c_value are 0 where not active.
  LSTM_DEVICE void store(int64_t at, int unit, unsigned in_batch, unsigned active,
                         const Compute (&m)[2], const Compute (&c_value)[2],
                         const Cell<Compute> (&cells)[2]) const {
    const int g = lane() / 4, q = lane() % 4;
    const auto value = [&](int k, int j) {
      const Cell<Compute>& cell = cells[j];
      return k == 0 ? cell.i : k == 1 ? cell.f : k == 2 ? cell.g : cell.o;
    };
    const int64_t gates_at = 4 * at - 3 * unit;
    if constexpr (sizeof(Element) == 2)
      if (words) {
        const int across = g * row_step + 2 * q;
        const bool exists = unit + 2 * q < H;
        const uint32_t y_word = ptx::movmatrix(packed<F::arithmetic>(m[0], m[1]));
        if (exists && in_batch & 4) ptx::store(y + at + across, y_word);
        if (save) {
          uint32_t word[4];
          LSTM_UNROLL
          for (int k = 0; k < 4; ++k)
            word[k] = ptx::movmatrix(packed<F::arithmetic>(value(k, 0), value(k, 1)));
          Element* const to = gates + gates_at + (across + 3 * g * row_step);
          if (exists && active & 4) {
            LSTM_UNROLL
            for (int k = 0; k < 4; ++k) ptx::store(to + k * H, word[k]);
          }
        }
      }
    if (unit + g >= H) return;
    LSTM_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (!(in_batch >> j & 1)) continue;
      const int column = (2 * q + j) * row_step;
      if (c) c[at + column + g] = c_value[j];
      if (words) continue;
      y[at + column + g] = to_element<Element>(m[j]);
      if (!save || !(active >> j & 1)) continue;
      Element* const to = gates + gates_at + (4 * column + g);
      LSTM_UNROLL
      for (int k = 0; k < 4; ++k) to[k * H] = to_element<Element>(value(k, j));
    }
  }
};

template <class F, class Team>
LSTM_DEVICE void run_forward(const ForwardParams<typename Team::Source>& params) {
  using Element = typename F::Element;
  using Compute = typename F::Compute;
  const RecurrenceForward& p = params.problem;
  const int H = int(p.shape.H);
  const WarpRole<F> role;
  const Part part = part_of(p.shape, p.lengths, p.reset, params.first + role.team, F::kColumns);
  const Schedule& schedule = part.schedule;
  const int steps = int(schedule.T);
  const int g = lane() / 4, q = lane() % 4;
  const Element* const gates = static_cast<const Element*>(p.gates);
  const Outputs<F> outputs(p, params.row_step);

  ptx::Shared shared;
  const GateRing<F> ring(shared, gates, H, role);
  Team team(shared, params.source, role, part.d, H);

  // The rings of the first steps.
  const int64_t time_step = schedule.reversed ? -params.time_step : params.time_step;
  int64_t tile_at = part.row(p.shape, schedule.time(0), part.b0) * H;  // in [T, B, D, H]
  int fetched_length[F::kAll];
  LSTM_UNROLL
  for (int i = 0; i < F::kAll; ++i)
    fetched_length[i] = part.length(8 * role.tile(i) + ring.column());
  const auto fetch = [&](int step, int64_t at) {
    if (step < steps) {
      const int t = int(schedule.time(step));
      LSTM_UNROLL
      for (int i = 0; i < F::kAll; ++i) {
        const int column = 8 * role.tile(i) + ring.column();
        if (t < fetched_length[i])
          ring.fetch(step, i, gates + 4 * (at + column * params.row_step), role.unit(i));
      }
    }
    ptx::cp_async_commit();  // one group a step, even an empty one: the wait counts groups
  };
  for (int step = 0; role.owner() && step < F::kSlots - 1; ++step)
    fetch(step, tile_at + step * time_step);

  // State.
  int length[F::kAll][2], across_length[F::kAll];
  unsigned in_batch[F::kAll];  // bits 0 and 1: columns 2q and 2q + 1; bit 2: column g
  Compute c[F::kAll][2];
  Element h[F::kAll][2];
  // Bits 0 and 1: no state of columns 2q and 2q + 1 crosses into this step; 2 and 3: into the next one.
  unsigned fresh[F::kAll];
  const auto state_at = [&](int i, int j) {  // in [D, B, H]
    return (part.d * p.shape.B + part.b(8 * role.tile(i) + 2 * q + j)) * H + role.unit(i) + g;
  };
  const auto exists = [&](int i, int j) {
    return 8 * role.tile(i) + 2 * q + j < part.rows && role.unit(i) + g < H;
  };
  const auto starts_fresh = [&](int i, int step) {
    return part.fresh(step, schedule.time(step), 8 * role.tile(i) + 2 * q, length[i]);
  };
  LSTM_UNROLL
  for (int i = 0; i < F::kAll; ++i) {
    LSTM_UNROLL
    for (int j = 0; j < 2; ++j) {
      const bool there = exists(i, j);
      length[i][j] = there ? part.length(8 * role.tile(i) + 2 * q + j) : 0;
      h[i][j] = there && p.h0 ? static_cast<const Element*>(p.h0)[state_at(i, j)]
                              : to_element<Element>(Compute(0));
      c[i][j] = load_either<F::arithmetic>(there ? p.c0 : nullptr, p.wide_c, state_at(i, j));
    }
    across_length[i] = part.length(8 * role.tile(i) + g);
    const int left = part.rows - 8 * role.tile(i);
    in_batch[i] =
        unsigned(2 * q < left) | unsigned(2 * q + 1 < left) << 1 | unsigned(g < left) << 2;
    fresh[i] = starts_fresh(i, 0) | starts_fresh(i, 1) << 2;
    if constexpr (Team::kTakesState)
      if (steps > 0)
        team.send(0, role.unit(i) / 8, role.tile(i),
                  fresh[i] & 1 ? Compute(0) : to_compute(h[i][0]),
                  fresh[i] & 2 ? Compute(0) : to_compute(h[i][1]));
  }

  for (int step = 0; step < steps; ++step, tile_at += time_step) {
    const int t = int(schedule.time(step));
    LSTM_UNROLL
    for (int turn = 0; turn < F::kTurns; ++turn) {
      Compute sums[F::kOwned][2][4] = {};
      if (step > 0 || Team::kTakesState) team.sums(step, turn, sums);
      if (!role.owner()) continue;
      if (turn == 0) {
        ptx::cp_async_wait<F::kSlots - 2>();
        ptx::warp_sync();  // the ring's slot of this step is there, that of the step before is read
      }

      LSTM_UNROLL
      for (int own = 0; own < F::kOwned; ++own) {
        const int i = turn * F::kOwned + own;
        Compute gates_x[4][2];
        ring.read(step, i, gates_x);
        Cell<Compute> cells[2];
        Compute m[2], c_value[2], sent[2];
        unsigned active = unsigned(t < across_length[i]) << 2;
        LSTM_UNROLL
        for (int j = 0; j < 2; ++j) {
          Cell<Compute>& cell = cells[j];
          const auto gate = [&](int k) { return sums[own][k / 2][k % 2 * 2 + j] + gates_x[k][j]; };
          cell.i = gate(0), cell.f = gate(1), cell.g = gate(2), cell.o = gate(3);
          cell_forward<DeviceMath<F::arithmetic>>(cell, fresh[i] >> j & 1 ? Compute(0) : c[i][j]);
          const bool live = t < length[i][j];
          active |= unsigned(live) << j;
          m[j] = live ? cell.m : Compute(0);
          c_value[j] = live ? cell.c : Compute(0);
          h[i][j] = live ? to_element<Element>(cell.m) : h[i][j];
          c[i][j] = live ? cell.c : c[i][j];
          // A row that has not begun needs its initial state, unless that is in gates_x already.
          const Compute next = Team::kTakesState && !live ? to_compute(h[i][j]) : m[j];
          sent[j] = fresh[i] >> (2 + j) & 1 ? Compute(0) : next;
        }
        if (step + 1 < steps) team.send(step + 1, role.unit(i) / 8, role.tile(i), sent[0], sent[1]);
        // h is on its way; nobody waits for the rest.
        fresh[i] = fresh[i] >> 2 | starts_fresh(i, step + 2) << 2;
        outputs.store(tile_at + 8 * role.tile(i) * params.row_step + role.unit(i), role.unit(i),
                      in_batch[i], active, m, c_value, cells);
      }
    }
    if (role.owner()) fetch(step + F::kSlots - 1, tile_at + (F::kSlots - 1) * time_step);
  }

  // State after each row's last step, and zeros where no row of the tile has steps.
  LSTM_UNROLL
  for (int i = 0; i < F::kAll && role.owner(); ++i) {
    LSTM_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (!exists(i, j)) continue;
      static_cast<Element*>(p.h_n)[state_at(i, j)] = h[i][j];
      store_either<F::arithmetic>(p.c_n, p.wide_c, state_at(i, j), c[i][j]);
      for (int64_t t = steps; t < p.shape.T; ++t) {
        const int64_t at =
            part.row(p.shape, t, part.b(8 * role.tile(i) + 2 * q + j)) * H + role.unit(i) + g;
        outputs.y[at] = to_element<Element>(Compute(0));
        if (outputs.c) outputs.c[at] = Compute(0);
      }
    }
  }
}

template <class F, class Team>
LSTM_KERNEL(F::kThreads, 1)
forward_kernel(LSTM_PARAMETER ForwardParams<typename Team::Source> params) {
  if constexpr (Team::kFamily != Family::rec_cluster || ptx::kHasClusters)
    run_forward<F, Team>(params);
}

// Parts [first, first + count) in one launch.
template <class F, class Team>
Status start_forward(const char* kernel, const RecurrenceForward& p,
                     const typename Team::Source& source, unsigned first, unsigned count,
                     Stream stream) {
  constexpr int64_t kBytes =
      Team::kSharedBytes + GateRing<F>::kValues * sizeof(typename F::Element);
  constexpr Family family = Team::kFamily;
  static_assert(kBytes <= (family == Family::rec_cta ? kCtaSharedBytes
                                                     : resident_shared_bytes(family, F::arithmetic,
                                                                             F::shape, F::kTiles)));
  const LaunchShape shape{.kernel = kernel,
                          .blocks = count * F::shape.blocks,
                          .threads = F::kThreads,
                          .shared_bytes = kBytes,
                          .cluster = family == Family::rec_cluster ? unsigned(F::shape.blocks) : 1,
                          .cooperative = family == Family::rec_group};
  return launch<forward_kernel<F, Team>>(
      shape, ForwardParams<typename Team::Source>(p, source, first), stream);
}

}  // namespace lstm_cuda::resident
