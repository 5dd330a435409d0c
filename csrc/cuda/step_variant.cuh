// Family rec_step for other cells than torch.nn.LSTM's: one body for all options.
//
//   forward    variant_forward:  as step_forward, with the cell that the options ask for
//   backward   variant_backward: as step_backward
//   with norm  these two leave a row's products in memory, and another launch, a block for each row of
//              the batch, does what needs the whole row: variant_forward_row, variant_backward_row
#pragma once

#include "rec_step.cuh"

namespace lstm_cuda {

// Where a cell adds its part to the gradients of peepholes and norm, which follow each other by H.
template <class Compute>
LSTM_DEVICE Compute* sums_of(const StepBackward& p, const Place& at) {
  const int64_t rows = (p.variant.peephole ? 3 : 0) + (p.variant.norm ? 6 : 0);
  return static_cast<Compute*>(p.variant.dmore) + (at.d * p.shape.B + at.b) * rows * p.shape.H +
         at.unit;
}

// What forward finds in the place of pre-activations: all but the product with h.
template <Arithmetic arithmetic>
LSTM_DEVICE auto given_gates(const StepForward& p, const Place& at) {
  using T = StepTypes<arithmetic>;
  using Compute = typename T::Compute;
  const int64_t H = p.shape.H;
  Cell<Compute> cell{};
  if (p.gates_x) {
    const Compute* const x = static_cast<const Compute*>(p.gates_x) + at.gates;
    cell.i = x[0], cell.f = x[H], cell.g = x[2 * H], cell.o = x[3 * H];
  } else {
    const auto* const x = T::at(p.gates, 0) + at.gates;
    cell.i = to_compute(x[0]), cell.f = to_compute(x[H]);
    cell.g = to_compute(x[2 * H]), cell.o = to_compute(x[3 * H]);
  }
  return cell;
}

// The end of a cell's step: zoneout of c and, unless projected, of m, and what is kept of all.
template <Arithmetic arithmetic, class Compute>
LSTM_DEVICE void finish_forward(const StepForward& p, const Schedule& schedule, const Place& at,
                                bool fresh, const Cell<Compute>& cell, Compute c_prev, Compute m) {
  using Element = typename Types<arithmetic>::Element;
  const Variant& v = p.variant;
  const Compute c = zoned_out(v, Choice::c, at, c_prev, cell.c);
  Element h = to_element<Element>(m), read = operand<arithmetic>(h);
  if (!p.shape.projected) h = output_of<arithmetic>(v, p.h_state, at, at.state, fresh, m, read);
  keep_cell<arithmetic>(p, schedule, at, cell, c, h, read);
}

template <Arithmetic arithmetic, StepTile tile>
LSTM_KERNEL(StepTileOf<tile>::kThreads, step_blocks<arithmetic, tile>())
variant_forward(LSTM_PARAMETER StepForward p) {
  using T = StepTypes<arithmetic>;
  using Compute = typename T::Compute;
  StepProduct<arithmetic, StepTileOf<tile>, 4> product(p.product);
  const int64_t B = p.shape.B, H = p.shape.H, d = product.direction();
  const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
  const int64_t t = schedule.time(p.step);
  product.run();
  product.each_in_turn([&](int64_t unit, int64_t b, const Compute(&sums)[4]) {
    if (p.row) {
      Compute* const row = static_cast<Compute*>(p.row) + (d * B + b) * 5 * H + unit;
      LSTM_UNROLL
      for (int gate = 0; gate < 4; ++gate) row[gate * H] = sums[gate];
      return;
    }
    const Place at = place_of<arithmetic>(p, t, d, b, unit);
    if (!takes_part<arithmetic>(p, schedule, at)) return;
    const bool fresh = schedule.fresh(t, b);
    Cell<Compute> cell = given_gates<arithmetic>(p, at);
    if (!fresh) cell.i += sums[0], cell.f += sums[1], cell.g += sums[2], cell.o += sums[3];
    const Compute c_prev = state_before<arithmetic>(p, at, fresh);
    const CellOptions& options = p.variant.cell;
    variant_cell<DeviceMath<arithmetic>>(options, peephole_of<Compute>(p.variant, H, at), cell,
                                         c_prev);
    const Compute m = cell.o * activate<DeviceMath<arithmetic>>(options.output, cell.c);
    finish_forward<arithmetic>(p, schedule, at, fresh, cell, c_prev, m);
  });
}

// The rest of a cell's gradients, from that of c which its output brings.
template <Arithmetic arithmetic, class Compute>
LSTM_DEVICE void finish_backward(const StepBackward& p, const Schedule& schedule, const Place& at,
                                 const Cell<Compute>& cell, Compute c_prev, Compute dc,
                                 Cell<Compute>& grad) {
  using T = StepTypes<arithmetic>;
  const Variant& v = p.variant;
  const int64_t H = p.shape.H;
  Compute later =
      later_gradient<arithmetic>(p, at, is_carried(p, schedule, at.b), at.t == schedule.last(at.b));
  Compute kept = 0;
  if (v.cell.zoneout_c > 0) {
    const Compute keep = kept_part<Compute>(v, Choice::c, at);
    kept = keep * later;
    later *= 1 - keep;
  }
  dc += later;
  variant_cell_backward(v.cell, peephole_of<Compute>(v, H, at), cell, c_prev, dc, grad);
  keep_dc<arithmetic>(p, schedule, at, schedule.fresh(at.t, at.b), dc + kept);
  if (p.dgates_x) {
    Compute* const dgates = static_cast<Compute*>(p.dgates_x) + at.gates;
    dgates[0] = grad.i, dgates[H] = grad.f, dgates[2 * H] = grad.g, dgates[3 * H] = grad.o;
  }
  if (p.m) T::at(p.m, 0)[at.cell] = T::element(cell.m);
  if (v.peephole && v.dmore) {
    Compute* const dw = sums_of<Compute>(p, at);
    dw[0] += grad.i * c_prev, dw[H] += grad.f * c_prev, dw[2 * H] += grad.o * cell.c;
  }
}

// What variant_backward does besides for a cell that takes no part.
template <Arithmetic arithmetic>
LSTM_DEVICE bool variant_takes_part(const StepBackward& p, const Schedule& schedule,
                                    const Place& at) {
  using T = StepTypes<arithmetic>;
  using Compute = typename T::Compute;
  if (takes_part<arithmetic>(p, schedule, at)) return true;
  LSTM_UNROLL
  for (int gate = 0; gate < 4; ++gate) {
    if (p.dgates_x) static_cast<Compute*>(p.dgates_x)[at.gates + gate * p.shape.H] = 0;
  }
  if (p.m) T::at(p.m, 0)[at.cell] = T::element(Compute(0));
  return false;
}

template <Arithmetic arithmetic, StepTile tile>
LSTM_KERNEL(StepTileOf<tile>::kThreads, step_blocks<arithmetic, tile>())
variant_backward(LSTM_PARAMETER StepBackward p) {
  using T = StepTypes<arithmetic>;
  using Compute = typename T::Compute;
  StepProduct<arithmetic, StepTileOf<tile>, 1> product(p.product);
  const int64_t B = p.shape.B, H = p.shape.H, d = product.direction();
  const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
  const int64_t t = schedule.time(p.step);
  product.run();
  product.each_in_turn([&](int64_t unit, int64_t b, const Compute(&sums)[1]) {
    const Place at = place_of<arithmetic>(p, t, d, b, unit);
    if (!variant_takes_part<arithmetic>(p, schedule, at)) return;
    Compute dm = sums[0];
    if (!p.shape.projected) {
      const Compute outer = outer_gradient<arithmetic>(p, at.cell, at.state, t == schedule.last(b));
      dm = output_gradient(p.variant, p.dh_state, at, at.state, is_carried(p, schedule, b), dm,
                           outer);
    }
    if (p.row) {
      static_cast<Compute*>(p.row)[(d * B + b) * 8 * H + unit] = dm;
      return;
    }
    const CellOptions& options = p.variant.cell;
    Cell<Compute> cell, grad;
    const Compute c_prev = load_cell<arithmetic>(p, schedule, at, schedule.fresh(t, b), cell);
    if (options.zoneout_c > 0) cell.c = variant_state(options, cell, c_prev);
    const Compute s = activate<DeviceMath<arithmetic>>(options.output, cell.c);
    const Compute dc = variant_output_backward(options, cell, s, dm, grad);
    finish_backward<arithmetic>(p, schedule, at, cell, c_prev, dc, grad);
    keep_gradients<arithmetic>(p, at, grad);
  });
}

// ---- with norm: whole rows ----

constexpr int kRowThreads = 256;

// Totals over a block, of two values at once, in the same order each time.
template <class Compute>
class RowTotals {
 public:
  static constexpr int64_t kBytes = kRowThreads / 32 * 2 * sizeof(Compute);

  LSTM_DEVICE RowTotals() {
    ptx::Shared shared;
    of_warps_ = shared.take<Compute>(kRowThreads / 32 * 2, 16);
  }

  LSTM_DEVICE void add_up(Compute& a, Compute& b) {
    LSTM_UNROLL
    for (unsigned lanes = 16; lanes > 0; lanes /= 2) {
      a += ptx::shuffle_xor(a, lanes);
      b += ptx::shuffle_xor(b, lanes);
    }
    if (lane() == 0) of_warps_[2 * warp()] = a, of_warps_[2 * warp() + 1] = b;
    ptx::block_sync();  // the totals of all warps are there
    a = b = 0;
    for (int k = 0; k < kRowThreads / 32; ++k) a += of_warps_[2 * k], b += of_warps_[2 * k + 1];
    ptx::block_sync();  // they are read no more
  }

 private:
  Compute* of_warps_;
};

// For a row of `count` values, for the thread's share of which `each` calls visit(value).
template <class Compute, class Each>
LSTM_DEVICE Normed<Compute> normed_of(RowTotals<Compute>& totals, int64_t count, Each each) {
  Compute sum = 0, squares = 0, nothing = 0;
  each([&](Compute v) { sum += v; });
  totals.add_up(sum, nothing);
  const Compute mean = sum / Compute(count);
  each([&](Compute v) { squares += (v - mean) * (v - mean); });
  totals.add_up(squares, nothing);
  return {mean, squares / Compute(count)};
}

template <class Visit>
LSTM_DEVICE void each_unit(int64_t H, Visit visit) {
  for (int64_t unit = ptx::thread_index(); unit < H; unit += kRowThreads) visit(unit);
}

// Starts one block for each recurrence and row of the batch.
template <Arithmetic arithmetic, auto kernel, class Params>
Status start_rows(const char* name, const Params& p, bool overlap, Stream stream) {
  LaunchShape shape{name, unsigned(p.shape.D * p.shape.B), unsigned(kRowThreads),
                    std::size_t(RowTotals<typename Types<arithmetic>::Compute>::kBytes)};
  shape.overlap = overlap;
  return launch<kernel>(shape, p, stream);
}

// The row of a block, after the launch that left its products.
template <Arithmetic arithmetic, class Step>
struct BlockRow {
  using Compute = typename Types<arithmetic>::Compute;

  const Step& p;
  int64_t H, d, b;
  Schedule schedule;
  int64_t t, row;  // in [T, B, D]
  bool fresh;
  const Compute* gain;  // [6, H], as Variant::norm has them

  LSTM_DEVICE explicit BlockRow(const Step& step)
      : p(step),
        H(step.shape.H),
        d(ptx::block_index() / step.shape.B),
        b(ptx::block_index() % step.shape.B),
        schedule(schedule_of(step.shape, d, step.lengths, step.reset)),
        t(schedule.time(step.step)),
        row((t * step.shape.B + b) * step.shape.D + d),
        fresh(schedule.fresh(t, b)),
        gain(static_cast<const Compute*>(step.variant.norm) + d * 6 * H) {
    ptx::dependency_wait();
    ptx::dependency_release();
  }

  LSTM_DEVICE bool active() const { return schedule.active(t, b); }
  LSTM_DEVICE Place place(int64_t unit) const { return place_of<arithmetic>(p, t, d, b, unit); }
  // Its room, of so many rows of H.
  LSTM_DEVICE Compute* room(int64_t rows) const {
    return static_cast<Compute*>(p.row) + (d * p.shape.B + b) * rows * H;
  }
};

template <Arithmetic arithmetic>
LSTM_KERNEL(kRowThreads, 1)
variant_forward_row(LSTM_PARAMETER StepForward p) {
  using Compute = typename Types<arithmetic>::Compute;
  using Math = DeviceMath<arithmetic>;
  RowTotals<Compute> totals;
  const BlockRow<arithmetic, StepForward> of(p);
  const int64_t H = of.H;
  const Schedule& schedule = of.schedule;
  const bool fresh = of.fresh;
  const CellOptions& options = p.variant.cell;
  const Compute* const gain = of.gain;
  Compute* const row = of.room(5);
  if (!of.active()) {
    each_unit(H, [&](int64_t unit) { takes_part<arithmetic>(p, schedule, of.place(unit)); });
    return;
  }
  // Nothing comes of h where a row begins afresh.
  const auto product = [&](int64_t k) { return fresh ? Compute(0) : row[k]; };
  const auto of_h = normed_of(totals, 4 * H, [&](auto visit) {
    each_unit(H, [&](int64_t unit) {
      for (int gate = 0; gate < 4; ++gate) visit(product(gate * H + unit));
    });
  });
  Compute* const kept = static_cast<Compute*>(p.variant.normed);
  if (kept && ptx::thread_index() == 0) static_cast<Compute*>(p.variant.rstd)[of.row] = of_h.rstd;
  Compute* const c = row + 4 * H;
  each_unit(H, [&](int64_t unit) {
    const Place at = of.place(unit);
    Cell<Compute> cell = given_gates<arithmetic>(p, at);
    Compute* const gates[4] = {&cell.i, &cell.f, &cell.g, &cell.o};
    LSTM_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t k = gate * H + unit;
      const Compute normed = of_h(product(k));
      if (kept) kept[of.row * 4 * H + k] = normed;
      *gates[gate] += normed * gain[k];
    }
    variant_cell<Math>(options, peephole_of<Compute>(p.variant, H, at), cell,
                       state_before<arithmetic>(p, at, fresh));
    LSTM_UNROLL
    for (int gate = 0; gate < 4; ++gate) row[gate * H + unit] = *gates[gate];
    c[unit] = cell.c;
  });
  const auto of_c = normed_of(
      totals, H, [&](auto visit) { each_unit(H, [&](int64_t unit) { visit(c[unit]); }); });
  each_unit(H, [&](int64_t unit) {
    const Place at = of.place(unit);
    const Cell<Compute> cell{row[unit],         row[H + unit], row[2 * H + unit],
                             row[3 * H + unit], c[unit],       0};
    const Compute shown = of_c(cell.c) * gain[4 * H + unit] + gain[5 * H + unit];
    finish_forward<arithmetic>(p, schedule, at, fresh, cell, state_before<arithmetic>(p, at, fresh),
                               cell.o * activate<Math>(options.output, shown));
  });
}

// Of the room of a row: dm, and then the cell's own
//   c, the gradient of c normalised, d.o, and four rows of gradients of w_hh h normalised
template <Arithmetic arithmetic>
LSTM_KERNEL(kRowThreads, 1)
variant_backward_row(LSTM_PARAMETER StepBackward p) {
  using Compute = typename Types<arithmetic>::Compute;
  using Math = DeviceMath<arithmetic>;
  RowTotals<Compute> totals;
  const BlockRow<arithmetic, StepBackward> of(p);
  const int64_t H = of.H;
  const Schedule& schedule = of.schedule;
  const bool fresh = of.fresh;
  const CellOptions& options = p.variant.cell;
  const Compute* const gain = of.gain;
  const Compute* const normed = static_cast<const Compute*>(p.variant.normed) + of.row * 4 * H;
  Compute* const dm = of.room(8);
  Compute *const c = dm + H, *const dnormed = dm + 2 * H, *const d_o = dm + 3 * H,
                 *const dproduct = dm + 4 * H;
  if (!of.active()) return;  // variant_backward has done what there is to do

  each_unit(H, [&](int64_t unit) {
    Cell<Compute> cell;
    const Compute c_prev = load_cell<arithmetic>(p, schedule, of.place(unit), fresh, cell);
    c[unit] = options.zoneout_c > 0 ? variant_state(options, cell, c_prev) : cell.c;
  });
  const auto of_c = normed_of(
      totals, H, [&](auto visit) { each_unit(H, [&](int64_t unit) { visit(c[unit]); }); });
  Compute sum = 0, weighted = 0;
  each_unit(H, [&](int64_t unit) {
    const Place at = of.place(unit);
    Cell<Compute> cell, grad;
    load_cell<arithmetic>(p, schedule, at, fresh, cell);
    const Compute c_normed = of_c(c[unit]), gain_c = gain[4 * H + unit];
    const Compute s = activate<Math>(options.output, c_normed * gain_c + gain[5 * H + unit]);
    const Compute dshown = variant_output_backward(options, cell, s, dm[unit], grad);
    if (p.variant.dmore) {
      Compute* const dgain = sums_of<Compute>(p, at) + (p.variant.peephole ? 3 * H : 0);
      dgain[4 * H] += dshown * c_normed;
      dgain[5 * H] += dshown;
    }
    dm[unit] = cell.m;  // its gradient is needed no more
    d_o[unit] = grad.o;
    dnormed[unit] = dshown * gain_c;
    sum += dnormed[unit];
    weighted += dnormed[unit] * c_normed;
  });
  totals.add_up(sum, weighted);
  const Compute mean_c = sum / Compute(H), weighted_c = weighted / Compute(H);
  sum = weighted = 0;
  each_unit(H, [&](int64_t unit) {
    const Place at = of.place(unit);
    Cell<Compute> cell, grad;
    const Compute c_prev = load_cell<arithmetic>(p, schedule, at, fresh, cell);
    cell.c = c[unit];
    cell.m = dm[unit];
    grad.o = d_o[unit];
    const Compute dc = (dnormed[unit] - mean_c - of_c(cell.c) * weighted_c) * of_c.rstd;
    finish_backward<arithmetic>(p, schedule, at, cell, c_prev, dc, grad);
    const Compute of_gates[4] = {grad.i, grad.f, grad.g, grad.o};
    LSTM_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t k = gate * H + unit;
      if (p.variant.dmore)
        sums_of<Compute>(p, at)[((p.variant.peephole ? 3 : 0) + gate) * H] +=
            of_gates[gate] * normed[k];
      dproduct[k] = of_gates[gate] * gain[k];
      sum += dproduct[k];
      weighted += dproduct[k] * normed[k];
    }
  });
  totals.add_up(sum, weighted);
  const Compute mean_h = sum / Compute(4 * H), weighted_h = weighted / Compute(4 * H),
                rstd = static_cast<const Compute*>(p.variant.rstd)[of.row];
  each_unit(H, [&](int64_t unit) {
    const auto of_product = [&](int64_t k) {
      return (dproduct[k] - mean_h - normed[k] * weighted_h) * rstd;
    };
    keep_gradients<arithmetic>(
        p, of.place(unit),
        Cell<Compute>{of_product(unit), of_product(H + unit), of_product(2 * H + unit),
                      of_product(3 * H + unit), 0, 0});
  });
}

}  // namespace lstm_cuda
