// Cells with options, and those with layer norm besides, in the backward recurrence with resident
// weights of a cluster (rec_backward.cuh). What each of them computes is that of family rec_step
// (step_variant.cuh).
//
// Before dh has come (prepare): what zoneout keeps, c before it, and output(c). After it
// (differentiate): the gradients. Where rows are normalised these wait twice for totals over all
// units of a row (unit_totals.cuh), once for c, once for what the product gave. Each warp that has
// cells is a source.
// Shared memory:
//   weights  of peepholes and norm, of the block's units, zeros where there are none
//   sums     the gradients of these over all steps so far, of each cell: only its thread uses them.
//            In registers there would be no room for them beside the weights of the product
//   totals   two slots
// Protocol of the totals: a block sends totals of step s + 1 after sums of step s have come to it
// from all blocks (receive). Each of those sent them after its block_sync of step s, which its
// threads reach when they have read all totals of step s. So one slot for c and one for products
// are enough. In the last step, where no sums are sent, all threads with cells wait for both totals:
// then nothing more is on its way to their block.
#pragma once

#include "rec_backward_cells.cuh"
#include "unit_totals.cuh"
#include "variant.cuh"

namespace lstm_cuda::resident {

// Of torch.nn.LSTM's cell: nothing.
template <class F>
class VariantCells {
 public:
  static constexpr std::size_t kSharedBytes = 0;
  struct Known {};

  LSTM_DEVICE VariantCells(ptx::Shared&, const BackwardParams&, const Part&, unsigned, int) {}
  LSTM_DEVICE void begin() const {}
};

template <class F>
  requires(F::kCell != CellKind::plain)
class VariantCells<F> {
  using Cells = CellsOfTurn<F>;
  using Gates = Cell<float>[F::kCells];
  static constexpr bool kNorm = F::kCell == CellKind::norm;
  static constexpr int kCells = F::kCells, kThreads = 32 * F::kCellWarps;
  // Rows of weights and of their gradients: peepholes of i, f, o; gains of products; gain and shift
  // of c.
  static constexpr int kPeepholes = 3, kGainOfC = 7, kShiftOfC = 8, kRows = kNorm ? 9 : kPeepholes;
  static_assert(F::kTurns == 1, "a slot of totals is of a step");

  using ClusterTotalsOfF =
      ClusterTotals<F::shape.blocks, F::shape.blocks * F::kWarpsOfTile, F::kTiles, 2>;
  using Totals = std::conditional_t<kNorm, ClusterTotalsOfF, NoTotals>;
  enum Slot { kOfC, kOfProducts };

 public:
  static constexpr std::size_t kSharedBytes =
      kRows * (F::kUnits + kThreads * kCells) * sizeof(float) + Totals::kSharedBytes;

  // Of one cell in one step, before dh has come.
  struct Known {
    float output, h_scale, keep_h, keep_c;
    // With norm: c normalised and by what it was multiplied for that; the same of products.
    float c_normed, c_rstd, normed[4], rstd;
  };

  // unit: of this lane's first cell.
  LSTM_DEVICE VariantCells(ptx::Shared& shared, const BackwardParams& params, const Part& part,
                           unsigned block, int unit)
      : weights_(shared.take<float>(kRows * F::kUnits, 16)),
        sums_(shared.take<float>(kRows * kThreads * kCells, 16)),
        totals_(shared),
        p_(params.problem),
        v_(params.variant),
        d_(part.d),
        block_(int(block)),
        unit_(unit) {
    const int64_t H = p_.shape.H;
    for (int i = int(ptx::thread_index()); i < kRows * F::kUnits; i += F::kThreads) {
      const int row = i / F::kUnits, of_block = block_ * F::kUnits + i % F::kUnits;
      const void* const from = row < kPeepholes ? v_.peephole : v_.norm;
      const int64_t at = row < kPeepholes ? d_ * kPeepholes + row : d_ * 6 + row - kPeepholes;
      weights_[i] = from && of_block < H ? static_cast<const float*>(from)[at * H + of_block] : 0;
    }
    if (warp() < F::kCellWarps)
      for (int i = 0; i < kRows * kCells; ++i) sum(i / kCells, i % kCells) = 0;
  }

  // After the first cluster_sync, which also makes the weights complete.
  LSTM_DEVICE void begin() const { totals_.begin(); }

  // at: of the turn's first cell in [T, B, D, H]. In: gates, with c of the step; c before it.
  LSTM_DEVICE void prepare(const Cells& cells, int t, int64_t at, const float (&before)[kCells],
                           Gates& gates, Known (&known)[kCells]) const {
    const CellOptions& options = v_.cell;
    LSTM_UNROLL
    for (int j = 0; j < kCells; ++j) {
      const bool there = exists(cells, j), active = there && cells.has(t);
      const UnitOfStep place{t, d_, cells.b, unit_ + 4 * j};
      Known& k = known[j];
      k.h_scale =
          v_.h_scale && there ? static_cast<const float*>(v_.h_scale)[state_at(cells, j)] : 1.f;
      k.keep_h = options.zoneout_h > 0 ? kept_part<float>(v_, Choice::h, place) : 0.f;
      k.keep_c = options.zoneout_c > 0 ? kept_part<float>(v_, Choice::c, place) : 0.f;
      if (options.zoneout_c > 0) gates[j].c = variant_state(options, gates[j], before[j]);
      float shown = gates[j].c;
      if constexpr (kNorm) {
        const int64_t row = (t * p_.shape.B + cells.b) * p_.shape.D + d_;
        const float* const of_c = static_cast<const float*>(p_.c_norms) + 2 * row;
        const float* const normed = static_cast<const float*>(v_.normed) + 4 * at + unit_;
        LSTM_UNROLL
        for (int gate = 0; gate < 4; ++gate)
          k.normed[gate] = active ? normed[gate * p_.shape.H + 4 * j] : 0.f;
        k.rstd = active ? static_cast<const float*>(v_.rstd)[row] : 0.f;
        k.c_rstd = active ? of_c[1] : 0.f;
        k.c_normed = active ? (gates[j].c - of_c[0]) * k.c_rstd : 0.f;
        shown = k.c_normed * weight(kGainOfC, j) + weight(kShiftOfC, j);
      }
      k.output = activate<DeviceMath<F::arithmetic>>(options.output, shown);
    }
  }

  // In: what has come from other blocks; in the cells dh from outside, and dc, all that comes to c
  // but through h. Out: d, the gradients of what the product gave; dh and dc for the step before.
  LSTM_DEVICE void differentiate(Cells& cells, int step, int t, int64_t at,
                                 const float (&crossed)[kCells], const float (&before)[kCells],
                                 const Known (&known)[kCells], Gates& gates, Gates& d) const {
    const bool fresh = cells.flags & Cells::kFresh;
    float dc[kCells];  // that h brings
    LSTM_UNROLL
    for (int j = 0; j < kCells; ++j) {
      const bool active = exists(cells, j) && cells.has(t);
      const float keep = known[j].keep_h;
      if (active && cells.flags & Cells::kCrossed) cells.dh[j] += crossed[j] * known[j].h_scale;
      const float dh = cells.dh[j];
      // No state crosses into a fresh step, so no gradient leaves it.
      if (active) cells.dh[j] = fresh || !(keep > 0) ? 0.f : keep * dh;
      dc[j] = variant_output_backward(v_.cell, gates[j], known[j].output, (1 - keep) * dh, d[j]);
      if (!active) dc[j] = 0;
    }
    if constexpr (kNorm) through_norm_of_c(step, known, dc);
    LSTM_UNROLL
    for (int j = 0; j < kCells; ++j) {
      const bool active = exists(cells, j) && cells.has(t);
      const float keep = known[j].keep_c, kept = keep > 0 ? keep * cells.dc[j] : 0.f;
      float dc_step = dc[j] + (1 - keep) * cells.dc[j];
      const Peephole<float> peephole{weight(0, j), weight(1, j), weight(2, j)};
      variant_cell_backward(v_.cell, peephole, gates[j], before[j], dc_step, d[j]);
      if (active) cells.dc[j] = fresh ? 0.f : dc_step + kept;
      if (!active) d[j] = {};
      store_of_x(cells, at, j, d[j]);
      if (v_.peephole && v_.dmore && active) {
        sum(0, j) += d[j].i * before[j];
        sum(1, j) += d[j].f * before[j];
        sum(2, j) += d[j].o * gates[j].c;
      }
    }
    if constexpr (kNorm) through_norm_of_products(step, known, d);
  }

  // The gradients of gates_x, where those are wanted.
  LSTM_DEVICE void store_of_x(const Cells& cells, int64_t at, int j, const Cell<float>& d) const {
    if (!p_.dgates_x || !exists(cells, j)) return;
    const float values[4] = {d.i, d.f, d.g, d.o};
    float* const to = static_cast<float*>(p_.dgates_x) + 4 * at + unit_ + 4 * j;
    LSTM_UNROLL
    for (int gate = 0; gate < 4; ++gate) to[gate * p_.shape.H] = values[gate];
  }

  // After the last step.
  LSTM_DEVICE void finish(const Cells& cells) const {
    LSTM_UNROLL
    for (int j = 0; j < kCells; ++j) {
      if (!exists(cells, j)) continue;
      if (p_.dh_kept)
        static_cast<float*>(p_.dh_kept)[state_at(cells, j)] = cells.length ? cells.dh[j] : 0.f;
      if (!v_.dmore) continue;
      const int first = v_.peephole ? 0 : kPeepholes, rows = v_.norm ? kRows : kPeepholes;
      float* to = static_cast<float*>(v_.dmore) + unit_ + 4 * j +
                  (d_ * p_.shape.B + cells.b) * (rows - first) * p_.shape.H;
      for (int row = first; row < rows; ++row, to += p_.shape.H) *to += sum(row, j);
    }
  }

 private:
  // In: the gradient of what `output` is of. Out: that of c.
  LSTM_DEVICE void through_norm_of_c(int step, const Known (&known)[kCells],
                                     float (&dc)[kCells]) const {
    float total = 0, weighted = 0;
    LSTM_UNROLL
    for (int j = 0; j < kCells; ++j) {
      if (v_.dmore) {
        sum(kGainOfC, j) += dc[j] * known[j].c_normed;
        sum(kShiftOfC, j) += dc[j];
      }
      dc[j] *= weight(kGainOfC, j);
      total += dc[j];
      weighted += dc[j] * known[j].c_normed;
    }
    add_up(kOfC, step, total, weighted);
    const float part = 1.f / float(p_.shape.H);
    LSTM_UNROLL
    for (int j = 0; j < kCells; ++j)
      dc[j] = (dc[j] - total * part - known[j].c_normed * (weighted * part)) * known[j].c_rstd;
  }

  // In: the gradients of pre-activations. Out: those of the product.
  LSTM_DEVICE void through_norm_of_products(int step, const Known (&known)[kCells],
                                            Gates& d) const {
    float total = 0, weighted = 0;
    LSTM_UNROLL
    for (int j = 0; j < kCells; ++j) {
      float* const values[4] = {&d[j].i, &d[j].f, &d[j].g, &d[j].o};
      LSTM_UNROLL
      for (int gate = 0; gate < 4; ++gate) {
        if (v_.dmore) sum(kPeepholes + gate, j) += *values[gate] * known[j].normed[gate];
        *values[gate] *= weight(kPeepholes + gate, j);
        total += *values[gate];
        weighted += *values[gate] * known[j].normed[gate];
      }
    }
    add_up(kOfProducts, step, total, weighted);
    const float part = 1.f / float(4 * p_.shape.H);
    LSTM_UNROLL
    for (int j = 0; j < kCells; ++j) {
      float* const values[4] = {&d[j].i, &d[j].f, &d[j].g, &d[j].o};
      LSTM_UNROLL
      for (int gate = 0; gate < 4; ++gate)
        *values[gate] = (*values[gate] - total * part - known[j].normed[gate] * (weighted * part)) *
                        known[j].rstd;
    }
  }

  // Of this thread's cells in, of its batch row out.
  LSTM_DEVICE void add_up(Slot slot, int step, float& a, float& b) const {
    using Lanes = Quarter<2, 16>;
    const Lanes at{column_of_quad(), unit_of_quad()};
    const int tile = warp() % F::kTiles, source = block_ * F::kWarpsOfTile + warp() / F::kTiles;
    totals_.put(slot, tile, source, at, Lanes::sum(a), Lanes::sum(b));
    totals_.wait(slot, step);
    a = b = 0;
    totals_.each(slot, tile, at, [&](int, float of_source, float other) {
      a += of_source;
      b += other;
    });
    a = Lanes::sum(a), b = Lanes::sum(b);
  }

  LSTM_DEVICE bool exists(const Cells& cells, int j) const {
    return cells.in_batch && unit_ + 4 * j < int(p_.shape.H);
  }
  LSTM_DEVICE int64_t state_at(const Cells& cells, int j) const {  // in [D, B, H]
    return (d_ * p_.shape.B + cells.b) * p_.shape.H + unit_ + 4 * j;
  }
  LSTM_DEVICE float weight(int row, int j) const {
    return weights_[row * F::kUnits + unit_ - block_ * F::kUnits + 4 * j];
  }
  LSTM_DEVICE float& sum(int row, int j) const {
    return sums_[(row * kCells + j) * kThreads + int(ptx::thread_index())];
  }

  float *weights_, *sums_;
  Totals totals_;
  const RecurrenceBackward& p_;
  const Variant& v_;
  int d_, block_, unit_;
};

}  // namespace lstm_cuda::resident
