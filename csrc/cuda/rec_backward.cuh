// Backward recurrence with resident weights: one body for families rec_cluster and rec_group, which
// differ in how sums travel from block to block (the Reduce).
//
//   each step, from the last to the first:
//     dh = w_hh^T dgates[the step processed before] + dy[t];  cell backward (cell.h);  dgates[t]
//
// A cluster (group) of blocks has a part (part.cuh): 8, 16 or 32 batch rows of one recurrence, for
// all steps. It may step its column tiles in turns: sums of some travel while the others are multiplied.
// A block owns some of the hidden units. It turns dh of its units into dgates and
// multiplies these by its own gate rows of w_hh, which gives a part of dh of all hidden units: each
// owner gets its piece of that from every block (the sources), and adds them in the order of the
// sources. Sent are floats, for float16 and bfloat16 values rounded to that, as dh itself would be
// between two products.
//
// Products: row tiles of 16 hidden units, a few for each warp, of all column tiles; see resident.h
// for rows and depth. In the order that mma leaves them, lane (g, q) with four sums, 32 consecutive
// sums are 4 consecutive units, a quad, of 8 columns: those are the cells of one warp's lanes. A
// warp has, in each turn, one or a few consecutive quads of one column tile, so that a thread's cells
// of a turn share a batch row; warps that are left over have none. A thread has dh, dc and c of its
// cells in registers.
// Shared memory:
//   gates, c, dy  rings, each of one warp, filled by cp.async up to 4 steps ahead (less if there
//                 is no room)
//   dgates        as B operand, as many buffers as the Reduce asks for: what one thread writes of a
//                 cell is what one lane reads of a step in depth
//   weights       those that registers do not hold; scales of their rows
//   and what the Reduce needs.
// Protocol, beside the Reduce's own: one block_sync a turn. It ends these hazards: dgates are
// complete before any warp multiplies them (and, with two buffers, the former ones are multiplied
// before they are overwritten); the ring's slot of this step is read before it is filled again.
// Rings are a warp's own: its warp_sync at the start of a step makes the slots of this and of the
// next step, for whose copies each lane has waited, visible to all lanes. (c of the step before in
// the order of the recurrence is in the slot of the step that is processed next.)
// float32 and TF32: dgates have any range, but the operand is float16. Each column of a block's
// dgates is multiplied by the power of two that brings its largest value to [2^14, 2^15); what is
// sent has been divided by it again. A NaN stays in its column: scales are a column's own.
// Nothing is multiplied or sent in the last step, so that nothing is on its way to a block that has
// left.
// F::kCell: what cells other than torch.nn.LSTM's have besides is in variant_backward_cells.cuh.
#pragma once

#include "variant_backward_cells.cuh"

namespace lstm_cuda::resident {

// For cell_backward where tanh(c) stands in the place of c: it is found before dh has come.
struct TanhKnown {
  static LSTM_DEVICE float tanh(float tanh_c) { return tanh_c; }
};

// Shared memory of a block, all in all.
template <class F, template <class> class ReduceOf>
struct BackwardShared {
  using Operand = resident::Operand<F, ReduceOf<F>::kOperands>;
  static constexpr int64_t kOthers =
      ReduceOf<F>::kSharedBytes + Operand::kSharedBytes + RowScales<F>::kValues * sizeof(float) +
      VariantCells<F>::kSharedBytes + F::shape.warps * F::Weights::kPieces * 16;
  static constexpr int64_t kSlotBytes = InputRing<F, 2>::kSlotBytes;
  static constexpr int kSlots =
      int(std::min<int64_t>(4, (kResidentSharedBytes - kOthers) / kSlotBytes));
  static_assert(kSlots >= 2, "a step needs its own slot and c of the next one's");
  using Ring = InputRing<F, kSlots>;
  static constexpr int64_t kBytes = kOthers + kSlots * kSlotBytes;
};

template <class F, template <class> class ReduceOf>
LSTM_DEVICE void run_backward(const BackwardParams& params) {
  using Element = typename F::Element;
  using Cells = CellsOfTurn<F>;
  using Known = typename VariantCells<F>::Known;
  using InShared = BackwardShared<F, ReduceOf>;
  constexpr int kSlots = InShared::kSlots;
  constexpr bool kPlain = F::kCell == CellKind::plain;
  const RecurrenceBackward& p = params.problem;
  const int H = int(p.shape.H);
  const unsigned block = ptx::block_index() % F::shape.blocks;
  const unsigned in_launch = ptx::block_index() / F::shape.blocks;
  const Part part = part_of(p.shape, p.lengths, p.reset, params.first + in_launch, F::kColumns);
  const int steps = int(part.schedule.T);

  // This thread's cells, if it has any: in each turn units unit, unit + 4, ... of one batch row.
  const bool has_cells = F::kCellWarps == F::shape.warps || warp() < F::kCellWarps;
  const int tile = warp() % F::kTiles, quad = warp() / F::kTiles * F::kCells;
  const int column = 8 * tile + column_of_quad();  // of the first turn
  const int unit = int(block) * F::kUnits + 4 * quad + unit_of_quad();
  const auto exists = [&](const Cells& cells, int j) { return cells.in_batch && unit + 4 * j < H; };
  const auto state_at = [&](const Cells& cells, int j) {  // in [D, B, H]
    return (unsigned(part.d) * p.shape.B + cells.b) * H + unit + 4 * j;
  };

  ptx::Shared shared;
  ReduceOf<F> reduce(shared, params.words, in_launch, block);
  const typename InShared::Operand operand(shared);
  const typename InShared::Ring ring(shared, params, unit);
  const RowScales<F> scales(
      shared, params.weights.unscale + (part.d * F::shape.blocks + block) * F::shape.hidden);
  const VariantCells<F> others(shared, params, part, block, unit);
  typename F::Weights weights;
  weights.load(params.weights.fragments,
               first_piece(F::fragments, part.d, int(block), warp(), F::kParts), shared);
  reduce.begin();
  others.begin();

  // Steps go from the last to the first. Time t, the row of [T, B, D, H] and what they change by.
  int t = int(part.schedule.time(steps - 1));
  const int next = int(part.schedule.time(0) - part.schedule.time(1));
  int64_t row = part.row(p.shape, t, part.b(column)) * H;  // of the first turn
  const int64_t next_row = next * params.time_step;
  const int next_turn = 8 * F::kTiles * int(p.shape.D) * H;
  Cells all[F::kTurns];
  LSTM_UNROLL
  for (int turn = 0; turn < F::kTurns; ++turn)
    all[turn].begin(p, part, 8 * F::kTiles * turn + column, has_cells, t);

  const auto store = [&](const Cells& cells, int64_t at, int j,
                         const Element(&gates)[4]) {  // at: in [T, B, D, H]
    LSTM_UNROLL
    for (int k = 0; k < 4; ++k)
      if (exists(cells, j))
        static_cast<Element*>(p.dgates)[4 * at + unit + (k * H + 4 * j)] = gates[k];
  };
  const auto fetch = [&](int step, int ahead) {
    LSTM_UNROLL
    for (int turn = 0; turn < F::kTurns; ++turn)
      if (all[turn].has(t + ahead * next))
        ring.fetch(step + ahead, turn, row + turn * next_turn + ahead * next_row);
    ptx::cp_async_commit();  // one group a step, even an empty one: the wait counts groups
  };

  if (has_cells) {
    // Zeros where no row of the tile has steps.
    const Element zeros[4] = {};
    LSTM_NO_UNROLL
    for (int64_t time = steps; time < p.shape.T; ++time) {
      LSTM_UNROLL
      for (int i = 0; i < F::kTurns * F::kCells; ++i) {
        const Cells& cells = all[i / F::kCells];
        const int64_t at = part.row(p.shape, time, cells.b) * H;
        store(cells, at, i % F::kCells, zeros);
        if constexpr (!kPlain) others.store_of_x(cells, at, i % F::kCells, {});
      }
    }
    LSTM_UNROLL
    for (int ahead = 0; ahead < kSlots; ++ahead) fetch(0, ahead);
    ptx::cp_async_wait<kSlots - 1>();
    ptx::warp_sync();  // the slot of step 0 is there, for all lanes
  }
  // dh and dc of a row that has not begun are those of its final state, so nothing has to be added
  // at its last step.
  LSTM_UNROLL
  for (int i = 0; i < F::kTurns * F::kCells; ++i) {
    const int turn = i / F::kCells, j = i % F::kCells;
    Cells& cells = all[turn];
    const bool there = exists(cells, j);
    cells.dh[j] =
        there && p.dh_n ? to_compute(static_cast<const Element*>(p.dh_n)[state_at(cells, j)]) : 0.f;
    cells.dc[j] = there ? load_either<F::arithmetic>(p.dc_n, p.wide_c, state_at(cells, j)) : 0.f;
    cells.c[j] = has_cells ? ring.c(0, turn, j) : 0.f;
  }

  // Before dh of this step has come: all that does not need it.
  const auto prepare = [&](int step, int turn, Cell<float>(&gates)[F::kCells],
                           float (&before)[F::kCells], Known(&known)[F::kCells]) {
    Cells& cells = all[turn];
    LSTM_UNROLL
    for (int j = 0; j < F::kCells; ++j) {
      const bool active = exists(cells, j) && cells.has(t);
      gates[j] = {ring.gate(step, turn, j, 0),
                  ring.gate(step, turn, j, 1),
                  ring.gate(step, turn, j, 2),
                  ring.gate(step, turn, j, 3),
                  kPlain ? DeviceMath<F::arithmetic>::tanh(cells.c[j]) : cells.c[j],
                  0};
      cells.c[j] = before[j] = ring.c(step + 1, turn, j);
      if (active && t == cells.own.first(0))
        before[j] = load_either<F::arithmetic>(p.c0, p.wide_c, state_at(cells, j));
      if (cells.flags & Cells::kFresh) before[j] = 0;
      if (kPlain && cells.flags & Cells::kCrossed) cells.dh[j] = 0;
      if (p.dy && active) cells.dh[j] += ring.dy(step, turn, j);
      if (p.dc && active)
        cells.dc[j] += static_cast<const float*>(p.dc)[row + turn * next_turn + unit + 4 * j];
    }
    if constexpr (!kPlain) others.prepare(cells, t, row, before, gates, known);
  };
  // dgates of this step, in registers and as operand.
  const auto differentiate = [&](int step, int turn, Cell<float>(&gates)[F::kCells],
                                 const float (&before)[F::kCells], const Known(&known)[F::kCells],
                                 const float (&sums)[F::kCells], Element(&dgates)[F::kCells][4]) {
    Cells& cells = all[turn];
    const bool fresh = cells.flags & Cells::kFresh;
    uint32_t size = 0;
    Cell<float> of_others[F::kCells];
    if constexpr (!kPlain)
      others.differentiate(cells, step, t, row, sums, before, known, gates, of_others);
    LSTM_UNROLL
    for (int j = 0; j < F::kCells; ++j) {
      const bool active = exists(cells, j) && cells.has(t);
      Cell<float> d;
      if constexpr (kPlain) {
        if (cells.flags & Cells::kCrossed) cells.dh[j] += sums[j];
        float dc_step = cells.dc[j];
        cell_backward<TanhKnown>(gates[j], before[j], cells.dh[j], dc_step, d);
        // No state crosses into a fresh step, so no gradient leaves it.
        cells.dc[j] = active ? (fresh ? 0.f : dc_step) : cells.dc[j];
        cells.dh[j] = active ? 0.f : cells.dh[j];
      } else {
        d = of_others[j];
      }
      const float values[4] = {d.i, d.f, d.g, d.o};
      LSTM_UNROLL
      for (int k = 0; k < 4; ++k) {
        dgates[j][k] = to_element<Element>(active ? values[k] : 0.f);
        if constexpr (F::kScaled) size = larger(size, operand.size_of(dgates[j][k]));
      }
      operand.store(step * F::kTurns + turn, tile, quad + j, dgates[j]);
    }
    if constexpr (F::kScaled) operand.store_size(step * F::kTurns + turn, size);
  };

  for (int step = 0; step < steps; ++step, t += next, row += next_row) {
    if (has_cells) {
      ptx::cp_async_wait<kSlots - 2>();
      ptx::warp_sync();  // the slots of this step and of the next are there, for all lanes
    }
    LSTM_UNROLL
    for (int turn = 0; turn < F::kTurns; ++turn) {
      Cells& cells = all[turn];
      const uint8_t fresh_next = cells.starts_fresh(t + next);
      Cell<float> gates[F::kCells];
      float before[F::kCells], sums[F::kCells] = {};
      Known known[F::kCells];
      if (has_cells) prepare(step, turn, gates, before, known);
      if (step > 0) reduce.receive(step - 1, turn, has_cells, tile, quad, sums);
      Element dgates[F::kCells][4];
      if (has_cells) differentiate(step, turn, gates, before, known, sums, dgates);
      cells.flags = (cells.has(t) && !(cells.flags & Cells::kFresh) ? Cells::kCrossed : 0) |
                    (fresh_next ? Cells::kFresh : 0);
      ptx::block_sync();  // the hazards of the protocol above
      if (step + 1 < steps)
        Multiplier<F, typename InShared::Operand, ReduceOf<F>>{weights, operand, scales,
                                                               reduce,  step,    turn}
            .run();

      // Sums are on their way; the rest is nobody's wait.
      LSTM_UNROLL
      for (int j = 0; j < F::kCells && has_cells; ++j)
        store(cells, row + turn * next_turn, j, dgates[j]);
    }
    if (has_cells) fetch(step, kSlots);
  }

  LSTM_UNROLL
  for (int i = 0; i < F::kTurns * F::kCells; ++i) {
    const int j = i % F::kCells;
    const Cells& cells = all[i / F::kCells];
    if (p.dc0 && exists(cells, j))
      store_either<F::arithmetic>(p.dc0, p.wide_c, state_at(cells, j), cells.dc[j]);
  }
  if constexpr (!kPlain) others.finish(all[0]);
}

template <class F, template <class> class ReduceOf>
LSTM_KERNEL(F::kThreads, 1)
backward_kernel(LSTM_PARAMETER BackwardParams params) {
  if constexpr (ReduceOf<F>::kFamily != Family::rec_cluster || ptx::kHasClusters)
    run_backward<F, ReduceOf>(params);
}

// Parts [first, first + count) in one launch.
template <class F, template <class> class ReduceOf>
Status start_backward(const char* name, BackwardParams params, unsigned first, unsigned count,
                      Stream stream) {
  using InShared = BackwardShared<F, ReduceOf>;
  constexpr Family family = ReduceOf<F>::kFamily;
  static_assert(InShared::kBytes <=
                resident_shared_bytes(family, F::arithmetic, F::shape, F::kTiles));
  constexpr unsigned kQuadBytes = 4 * sizeof(typename F::Element);
  const auto places = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const RecurrenceBackward& p = params.problem;
  params.first = first;
  params.aligned = p.shape.H % 4 == 0 && places(p.c) % 16 == 0 &&
                   (places(p.gates) | places(p.dy)) % kQuadBytes == 0;
  const LaunchShape launch_shape{
      .kernel = name,
      .blocks = count * F::shape.blocks,
      .threads = F::kThreads,
      .shared_bytes = InShared::kBytes,
      .cluster = family == Family::rec_cluster ? unsigned(F::shape.blocks) : 1,
      .cooperative = family == Family::rec_group};
  return launch<backward_kernel<F, ReduceOf>>(launch_shape, params, stream);
}

inline BackwardParams backward_params(const RecurrenceBackward& p, const PackedWeights& weights,
                                      void* words) {
  return {.problem = p,
          .weights = weights,
          .words = static_cast<uint32_t*>(words),
          .first = 0,
          .time_step = p.shape.B * p.shape.D * p.shape.H,
          .aligned = false,
          .variant = p.variant ? *p.variant : Variant{}};
}

}  // namespace lstm_cuda::resident
