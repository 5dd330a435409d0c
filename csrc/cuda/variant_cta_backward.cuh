// Cells of other kinds than torch.nn.LSTM's for the kernel in rec_cta_backward.cuh: with options,
// and with layer norm besides. rec_step's kernels (step_variant.cuh) compute the same.
//
// A lane takes its cells in rounds of a loop, those of a unit at once, or one cell where there are
// too few registers: less code, and fewer values at once. Arrays with a value of each cell are
// turned on by a round's cells, so that no index depends on the round.
//
// With norm a step has two more barriers, for totals over the units of a row (unit_totals.cuh):
//   1. dh of all cells, through the output and zoneout, to the gradient of c normalised.
//      Totals of this, and of its product with c normalised, over H.
//   2. The gradients of c and of the pre-activations, and through gains those of w_hh h normalised.
//      Totals of these, and of their products with w_hh h normalised, over 4H.
//   3. The gradients of w_hh h: dgates.
#pragma once

#include "rec_cta_backward.cuh"
#include "variant.cuh"

namespace lstm_cuda::rec_cta {

template <class K>
class VariantCells {
  using Compute = typename K::Compute;
  using Tile = typename K::Tile;
  using Math = DeviceMath<K::arithmetic>;
  static constexpr bool kNorm = K::cell == CellKind::norm;
  // Cells of a round.
  static constexpr int kAtOnce = sizeof(Compute) == 8 || (kNorm && K::kPadded == 128) ? 1 : 2;

 public:
  LSTM_DEVICE VariantCells(ptx::Shared& shared, const LaneCells<K>& own)
      : own_(own), v_(own.params.variant), options_(v_.cell), totals_(shared) {}

  LSTM_DEVICE Compute dh_of(int i, Compute left, Compute product) const {
    if (v_.h_scale && own_.exists(i))
      product *= static_cast<const Compute*>(v_.h_scale)[own_.state_at(i)];
    return left + product;
  }

  LSTM_DEVICE void run(const StepBack& now, const Tile& tile, Compute (&dh)[4],
                       Compute (&dc)[4]) const {
    if constexpr (kNorm)
      run_with_norm(now, tile, dh, dc);
    else
      run_without(now, tile, dh, dc);
  }

 private:
  LSTM_DEVICE void run_without(const StepBack& now, const Tile& tile, Compute (&dh)[4],
                               Compute (&dc)[4]) const {
    each_cell(
        [&](int i, int j) {
          Compute c_prev;
          Cell<Compute> cell = load(now, i, c_prev), grad;
          const Compute dm = before_zoneout(now, i, dh[j]);
          const Compute s = activate<Math>(options_.output, cell.c);
          const Compute dc_step = variant_output_backward(options_, cell, s, dm, grad);
          finish(now, i, cell, c_prev, dc_step, dc[j], grad);
          own_.keep(now, tile, i, grad);
          add_peephole(now, i, cell, c_prev, grad);
        },
        dh, dc);
  }

  // Calls visit(i, j) for cell i, whose value in each of the arrays is number j meanwhile.
  template <class Visit, class... Arrays>
  static LSTM_DEVICE void each_cell(Visit visit, Arrays&... arrays) {
    LSTM_NO_UNROLL
    for (int round = 0; round < 4 / kAtOnce; ++round) {
      LSTM_UNROLL
      for (int j = 0; j < kAtOnce; ++j) visit(kAtOnce * round + j, j);
      (turn(arrays), ...);
    }
  }
  static LSTM_DEVICE void turn(Compute (&v)[4]) {
    const Compute before[4] = {v[0], v[1], v[2], v[3]};
    LSTM_UNROLL
    for (int j = 0; j < 4; ++j) v[j] = before[(j + kAtOnce) % 4];
  }

  LSTM_DEVICE UnitOfStep place(const StepBack& now, int i) const {
    return {now.t, own_.part.d, own_.part.b(own_.column(i)), own_.unit(i)};
  }

  // With c before zoneout, which is what the output was made of.
  LSTM_DEVICE Cell<Compute> load(const StepBack& now, int i, Compute& c_prev) const {
    Cell<Compute> cell = own_.load(now, i, c_prev);
    if (options_.zoneout_c > 0) cell.c = variant_state(options_, cell, c_prev);
    return cell;
  }

  // The gradient of h before zoneout. dh, all that comes from steps after this, gets what zoneout
  // leaves to the h before: nothing over the boundary of a fresh step.
  LSTM_DEVICE Compute before_zoneout(const StepBack& now, int i, Compute& dh) const {
    Compute dm = own_.p.dy ? dh + own_.dy(now, i) : dh, left = 0;
    if (options_.zoneout_h > 0) {
      const Compute keep = kept_part<Compute>(v_, Choice::h, place(now, i));
      left = keep * dm;
      dm = (1 - keep) * dm;
    }
    dh = own_.active(i, now.t) ? (now.is_fresh(i) ? Compute(0) : left) : dh;
    return dm;
  }

  // From the gradient of c that its output brings, and dc, all that comes from steps after this, to
  // those of the pre-activations and of c before.
  LSTM_DEVICE void finish(const StepBack& now, int i, const Cell<Compute>& cell, Compute c_prev,
                          Compute dc_step, Compute& dc, Cell<Compute>& grad) const {
    const bool active = own_.active(i, now.t);
    Compute later = own_.p.dc ? dc + own_.dc(now, i) : dc, kept = 0;
    if (options_.zoneout_c > 0) {
      const Compute keep = kept_part<Compute>(v_, Choice::c, place(now, i));
      kept = keep * later;
      later *= 1 - keep;
    }
    dc_step += later;
    const Peephole<Compute> w = own_.unit(i) < own_.H
                                    ? peephole_of<Compute>(v_, own_.H, place(now, i))
                                    : Peephole<Compute>{0, 0, 0};
    variant_cell_backward(options_, w, cell, c_prev, dc_step, grad);
    dc = active ? (now.is_fresh(i) ? Compute(0) : dc_step + kept) : dc;
    if (own_.p.dgates_x && own_.exists(i)) {
      const Compute values[4] = {grad.i, grad.f, grad.g, grad.o};
      Compute* const out = static_cast<Compute*>(own_.p.dgates_x) +
                           now.gates_at(own_.params, own_.column(i)) + own_.unit(i);
      LSTM_UNROLL
      for (int k = 0; k < 4; ++k) out[k * own_.H] = active ? values[k] : Compute(0);
    }
  }

  // ---- gradients of peepholes and norm ----

  // Where a cell's row of the batch adds its own, row by row of H; null where nothing is added.
  LSTM_DEVICE Compute* sums_of(const StepBack& now, int i) const {
    if (!v_.dmore || !own_.active(i, now.t)) return nullptr;
    const int rows = (v_.peephole ? 3 : 0) + (kNorm ? 6 : 0);
    const int64_t row = own_.part.d * own_.p.shape.B + own_.part.b(own_.column(i));
    return static_cast<Compute*>(v_.dmore) + row * rows * own_.H + own_.unit(i);
  }
  // Nobody but this thread has the values of a cell, so they are added in the order of the steps.
  LSTM_DEVICE void add_peephole(const StepBack& now, int i, const Cell<Compute>& cell,
                                Compute c_prev, const Cell<Compute>& grad) const {
    Compute* const dw = sums_of(now, i);
    if (!dw || !v_.peephole) return;
    dw[0] += grad.i * c_prev;
    dw[own_.H] += grad.f * c_prev;
    dw[2 * own_.H] += grad.o * cell.c;
  }

  LSTM_DEVICE void add_output_norm(const StepBack& now, int i, Compute dshown,
                                   Compute c_normed) const {
    Compute* const dgain = sums_of(now, i);
    if (!dgain) return;
    const int first = v_.peephole ? 3 : 0;
    dgain[(first + 4) * own_.H] += dshown * c_normed;
    dgain[(first + 5) * own_.H] += dshown;
  }
  LSTM_DEVICE void add_product_norm(const StepBack& now, int i, const Compute (&grads)[4],
                                    const Compute (&normed)[4]) const {
    Compute* const dgain = sums_of(now, i);
    if (!dgain) return;
    LSTM_UNROLL
    for (int k = 0; k < 4; ++k) dgain[((v_.peephole ? 3 : 0) + k) * own_.H] += grads[k] * normed[k];
  }

  // ---- norm ----

  LSTM_DEVICE void run_with_norm(const StepBack& now, const Tile& tile, Compute (&dh)[4],
                                 Compute (&dc)[4]) const {
    prefetch(now);
    Held held(tile, own_);
    PairTotals of_c{}, of_h{};
    each_cell(
        [&](int i, int j) {
          Compute c_prev;
          Cell<Compute> cell = load(now, i, c_prev), grad;
          const Compute dm = before_zoneout(now, i, dh[j]);
          const Compute c_normed = norm_of_c(now, i)(cell.c), gain = gain_of(4, i);
          const Compute s = activate<Math>(options_.output, c_normed * gain + gain_of(5, i));
          const Compute dshown = variant_output_backward(options_, cell, s, dm, grad);
          add_output_norm(now, i, dshown, c_normed);
          held.at(0, i, j) = dshown * gain;
          held.at(3, i, j) = grad.o;
          of_c.add(i, own_.active(i, now.t), dshown * gain, c_normed);
        },
        dh, held);
    total(0, own_.H, of_c);

    each_cell(
        [&](int i, int j) {
          Compute c_prev, normed[4];
          const Cell<Compute> cell = load(now, i, c_prev);
          Cell<Compute> grad;
          grad.o = held.at(3, i, j);
          const Normed<Compute> norm = norm_of_c(now, i);
          finish(now, i, cell, c_prev, norm.rstd * of_c.rest(i, held.at(0, i, j), norm(cell.c)),
                 dc[j], grad);
          load_normed(now, i, normed);
          const Compute grads[4] = {grad.i, grad.f, grad.g, grad.o};
          LSTM_UNROLL
          for (int k = 0; k < 4; ++k) {
            const Compute dnormed = grads[k] * gain_of(k, i);
            held.at(k, i, j) = dnormed;
            of_h.add(i, own_.active(i, now.t), dnormed, normed[k]);
          }
          add_peephole(now, i, cell, c_prev, grad);
          add_product_norm(now, i, grads, normed);
        },
        dc, held);
    total(1, 4 * own_.H, of_h);

    each_cell(
        [&](int i, int j) {
          Compute normed[4], grads[4];
          load_normed(now, i, normed);
          const Compute rstd =
              is_live(now, i) ? static_cast<const Compute*>(v_.rstd)[row_of(now, i)] : Compute(0);
          LSTM_UNROLL
          for (int k = 0; k < 4; ++k) grads[k] = rstd * of_h.rest(i, held.at(k, i, j), normed[k]);
          own_.keep(now, tile, i, {grads[0], grads[1], grads[2], grads[3], Compute(0), Compute(0)});
        },
        held);
  }

  // Four values of each cell that one part of a step leaves to the next: where its operand will be,
  // if that has their type, else in registers.
  struct Held {
    const Tile& tile;
    const LaneCells<K>& own;
    Compute registers[4][4];

    LSTM_DEVICE Held(const Tile& of_step, const LaneCells<K>& of_lane)
        : tile(of_step), own(of_lane) {}

    LSTM_DEVICE Compute& at(int k, int i, int j) {
      if constexpr (std::is_same_v<typename K::Element, Compute>)
        return tile.at(k * K::kPadded + own.unit(i), own.column(i));
      else
        return registers[k][j];
    }
  };
  static LSTM_DEVICE void turn(Held& held) {
    if constexpr (!std::is_same_v<typename K::Element, Compute>) {
      LSTM_UNROLL
      for (int k = 0; k < 4; ++k) turn(held.registers[k]);
    }
  }

  // Of gradients of normal values v, over a lane's cells of both columns and then over their whole
  // rows: the mean, and that of their products with v.
  struct PairTotals {
    Compute sum[2], weighted[2];

    LSTM_DEVICE void add(int i, bool active, Compute gradient, Compute v) {
      LSTM_UNROLL
      for (int j = 0; j < 2; ++j) {
        sum[j] = active && i % 2 == j ? sum[j] + gradient : sum[j];
        weighted[j] = active && i % 2 == j ? weighted[j] + gradient * v : weighted[j];
      }
    }
    // What is left of a gradient before the norm, but for the factor.
    LSTM_DEVICE Compute rest(int i, Compute gradient, Compute v) const {
      return gradient - (i % 2 ? sum[1] : sum[0]) - v * (i % 2 ? weighted[1] : weighted[0]);
    }
  };

  // Brings nearer what the next step reads past the rings, where it would wait for memory.
  LSTM_DEVICE void prefetch(const StepBack& now) const {
    using Ring = typename K::Gates;
    const Schedule& schedule = own_.part.schedule;
    const int column = Ring::column_to_fetch(), t = schedule.reversed ? now.t + 1 : now.t - 1;
    if (column >= own_.part.rows || now.step + 1 == schedule.T) return;
    const int64_t row = own_.part.row(own_.p.shape, t, own_.part.b(column));
    const int of_column = int(ptx::thread_index()) % Ring::kThreadsOfColumn;
    const int k = of_column * (4 * K::kPadded / Ring::kThreadsOfColumn);  // 64 or 128 bytes each
    if (k < 4 * own_.H)
      ptx::prefetch_l2(static_cast<const Compute*>(v_.normed) + row * 4 * own_.H + k);
    if (of_column == 0) {
      ptx::prefetch_l2(static_cast<const Compute*>(own_.p.c_norms) + 2 * row);
      ptx::prefetch_l2(static_cast<const Compute*>(v_.rstd) + row);
    }
  }

  LSTM_DEVICE bool is_live(const StepBack& now, int i) const { return now.t < own_.length(i); }
  LSTM_DEVICE int64_t row_of(const StepBack& now, int i) const {  // in [T, B, D]
    return own_.part.row(own_.p.shape, now.t, own_.part.b(own_.column(i)));
  }
  LSTM_DEVICE Normed<Compute> norm_of_c(const StepBack& now, int i) const {
    if (!is_live(now, i)) return Normed<Compute>::of_saved(0, 0);
    const Compute* const norms = static_cast<const Compute*>(own_.p.c_norms) + 2 * row_of(now, i);
    return Normed<Compute>::of_saved(norms[0], norms[1]);
  }

  LSTM_DEVICE Compute gain_of(int row, int i) const {
    if (own_.unit(i) >= own_.H) return 0;
    return static_cast<const Compute*>(v_.norm)[(own_.part.d * 6 + row) * own_.H + own_.unit(i)];
  }

  // A cell's four values of w_hh h normalised.
  LSTM_DEVICE void load_normed(const StepBack& now, int i, Compute (&normed)[4]) const {
    const bool active = own_.active(i, now.t);
    const Compute* const from = static_cast<const Compute*>(v_.normed) +
                                now.gates_at(own_.params, own_.column(i)) + own_.unit(i);
    LSTM_UNROLL
    for (int k = 0; k < 4; ++k) normed[k] = active ? from[k * own_.H] : Compute(0);
  }

  // From a lane's sums to means over `count` values of its rows.
  LSTM_DEVICE void total(int slot, int count, PairTotals& of) const {
    const QuarterOfPair at;
    const auto of_warp = [&](const Compute(&both)[2]) {
      const Compute swapped[2] = {both[1], both[0]};
      return at.sum(at.own(both) + ptx::shuffle_xor(at.own(swapped), 4));
    };
    const Compute sum = of_warp(of.sum), weighted = of_warp(of.weighted);
    totals_.put(slot, 0, warp(), at, sum, weighted);
    totals_.wait(slot, 0);
    Compute sum_of_row = 0, weighted_of_row = 0;
    totals_.each(slot, 0, at, [&](int, Compute of_source, Compute weighted_of_source) {
      sum_of_row += of_source;
      weighted_of_row += weighted_of_source;
    });
    at.spread(at.sum(sum_of_row) / Compute(count), of.sum);
    at.spread(at.sum(weighted_of_row) / Compute(count), of.weighted);
  }

  const LaneCells<K>& own_;
  const Variant& v_;
  const CellOptions& options_;
  const std::conditional_t<kNorm, typename K::Totals, NoTotals> totals_;
};

}  // namespace lstm_cuda::rec_cta
