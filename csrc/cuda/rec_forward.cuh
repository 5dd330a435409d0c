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

#include "forward_cells.cuh"
#include "forward_memory.cuh"

namespace lstm_cuda::resident {

// Source: where a team finds its weights and what it exchanges through.
template <class Source, CellKind cell>
struct ForwardParams {
  using Other = std::conditional_t<cell == CellKind::plain, Nothing, Variant>;
  RecurrenceForward problem;  // its lists of weights, and its variant, are in host memory
  Source source;
  [[no_unique_address]] Other other;
  unsigned first;     // the launch's first part
  int row_step;       // elements of [T, B, D, H] from row to row
  int64_t time_step;  // and from time to time

  ForwardParams(const RecurrenceForward& p, const Source& from, unsigned first_part)
      : problem(p),
        source(from),
        other{},
        first(first_part),
        row_step(int(p.shape.D * p.shape.H)),
        time_step(p.shape.B * p.shape.D * p.shape.H) {
    if constexpr (cell != CellKind::plain) other = *p.variant;
  }
};

template <class F, class Team>
using ForwardParamsOf = ForwardParams<typename Team::Source, F::kCell>;

template <class F, class Team>
LSTM_DEVICE void run_forward(const ForwardParamsOf<F, Team>& params) {
  using Element = typename F::Element;
  using Compute = typename F::Compute;
  using Given = typename F::Given;
  const RecurrenceForward& p = params.problem;
  const int H = int(p.shape.H);
  const WarpRole<F> role;
  const Part part = part_of(p.shape, p.lengths, p.reset, params.first + role.team, F::kColumns);
  const Schedule& schedule = part.schedule;
  const int steps = int(schedule.T);
  const int g = lane() / 4, q = lane() % 4;
  const auto* const gates =
      static_cast<const Given*>(F::kCell == CellKind::norm ? p.gates_x : p.gates);
  const Outputs<F> outputs(p, params.row_step);

  ptx::Shared shared;
  const GateRing<F> ring(shared, gates, H, role);
  const ForwardCells<F, Team> cell(shared, p, params.other);
  Team team(shared, params.source, role, part.d, H);
  cell.begin();

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
  }
  const auto place_of = [&](int i, int step, int t) {
    const auto first = [&](int j) { return t == part.first(length[i][j]); };
    return PairPlace{step,
                     t,
                     part.d,
                     role.tile(i),
                     role.unit(i),
                     part.b(8 * role.tile(i) + 2 * q),
                     {exists(i, 0), exists(i, 1)},
                     {t < length[i][0], t < length[i][1]},
                     {first(0), first(1)},
                     fresh[i]};
  };
  LSTM_UNROLL
  for (int i = 0; Team::kTakesState && i < F::kAll && steps > 0; ++i) {
    const PairPlace at = place_of(i, 0, int(schedule.time(0)));
    const auto sent = [&](int j) {
      return fresh[i] >> j & 1 ? Compute(0) : cell.read(at, j, to_compute(h[i][j]));
    };
    team.send(0, role.unit(i) / 8, role.tile(i), sent(0), sent(1));
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
        const PairPlace at = place_of(i, step, t);
        const Compute h_before[2] = {to_compute(h[i][0]), to_compute(h[i][1])};
        PairResult<Compute> result{};
        cell.both(at, sums[own], gates_x, c[i], h_before, result);
        Compute m[2], c_value[2], sent[2];
        unsigned active = unsigned(t < across_length[i]) << 2;
        LSTM_UNROLL
        for (int j = 0; j < 2; ++j) {
          const bool begins = fresh[i] >> j & 1;
          cell.column(at, j, sums[own], gates_x, begins ? Compute(0) : c[i][j],
                      begins ? Compute(0) : h_before[j], result);
          const bool live = t < length[i][j];
          active |= unsigned(live) << j;
          m[j] = live ? result.h[j] : Compute(0);
          c_value[j] = live ? result.c[j] : Compute(0);
          h[i][j] = live ? to_element<Element>(result.h[j]) : h[i][j];
          c[i][j] = live ? result.c[j] : c[i][j];
          // A row that has not begun needs its initial state, unless that is in gates_x already.
          const Compute next = Team::kTakesState && !live ? to_compute(h[i][j]) : m[j];
          sent[j] = fresh[i] >> (2 + j) & 1 ? Compute(0) : cell.read(at, j, next);
        }
        if (step + 1 < steps) team.send(step + 1, role.unit(i) / 8, role.tile(i), sent[0], sent[1]);
        // h is on its way; nobody waits for the rest.
        fresh[i] = fresh[i] >> 2 | starts_fresh(i, step + 2) << 2;
        outputs.store(tile_at + 8 * role.tile(i) * params.row_step + role.unit(i), role.unit(i),
                      in_batch[i], active, m, c_value, result.cells);
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
forward_kernel(LSTM_PARAMETER ForwardParamsOf<F, Team> params) {
  if constexpr (Team::kFamily != Family::rec_cluster || ptx::kHasClusters)
    run_forward<F, Team>(params);
}

// Parts [first, first + count) in one launch.
template <class F, class Team>
Status start_forward(const char* kernel, const RecurrenceForward& p,
                     const typename Team::Source& source, unsigned first, unsigned count,
                     Stream stream) {
  constexpr int64_t kBytes = Team::kSharedBytes + ForwardCells<F, Team>::kSharedBytes +
                             GateRing<F>::kValues * sizeof(typename F::Given);
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
  return launch<forward_kernel<F, Team>>(shape, ForwardParamsOf<F, Team>(p, source, first), stream);
}

}  // namespace lstm_cuda::resident
