// Family rec_step: one launch for each product of a time step, with the cell in its epilogue. Runs
// any size and type on any device; the other families are measured against it and fall back to it.
//
//   forward    step_forward:  gates_x + h w_hh^T, cell, h (projected: m, and then step_project)
//   backward   step_backward: dgates w_hh + dy (projected: after step_project, dm), cell, dgates
//   at its end, where dh0 is wanted, once more step_project
//
// State travels from launch to launch in scratch memory, in the form that the next product reads:
//   h_ring, dgates_ring: [2][D][B rounded up][depth], the slot of step s being s % 2. Two slots, for
//   blocks of a launch still read the one while others write the other. Rows and depth are padded
//   with zeros once, before the first step.
//   m, dh: one slot, [D][B rounded up][depth]: written by one launch, read by the next.
// A row that is past its length copies its state from slot to slot: a row that runs backwards in time
// so keeps h0 until its first step, and its gradient from then until dh0 is computed.
//
// Launches may overlap: a block waits for the launch before it just before it reads state, and lets
// the next one start only then. So whatever was launched two before has ended for certain, and
// weights, packed before the first step, may be read earlier.
//
// Kernels of other cells (step_variant.cuh) take the same places and share what surrounds a cell.
#pragma once

#include "step_cells.cuh"

namespace lstm_cuda {

// Blocks of one kernel that the registers of a multiprocessor have room for at least.
template <Arithmetic arithmetic, StepTile tile>
constexpr unsigned step_blocks() {
  return StepTileOf<tile>::kBlocks - (arithmetic == Arithmetic::float64 ? 1 : 0);
}

template <Arithmetic arithmetic, StepTile tile>
LSTM_KERNEL(StepTileOf<tile>::kThreads, step_blocks<arithmetic, tile>())
step_forward(LSTM_PARAMETER StepForward p) {
  using T = StepTypes<arithmetic>;
  using Compute = typename T::Compute;
  using Element = typename T::Element;
  StepProduct<arithmetic, StepTileOf<tile>, 4> product(p.product);
  const int64_t B = p.shape.B, D = p.shape.D, H = p.shape.H, d = product.direction();
  const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
  const int64_t t = schedule.time(p.step);
  Element* const gates = static_cast<Element*>(p.gates);
  product.each_segment([&](int64_t unit, int64_t b, int gate) {
    ptx::prefetch_l2(gates + (((t * B + b) * D + d) * 4 + gate) * H + unit);
  });
  product.run();
  product.each([&](int64_t unit, int64_t b, const Compute(&sums)[4]) {
    const Place at = place_of<arithmetic>(p, t, d, b, unit);
    if (!takes_part<arithmetic>(p, schedule, at)) return;
    const Element* const x = gates + at.gates;
    const bool fresh = schedule.fresh(t, b);
    Cell<Compute> cell;
    cell.i = to_compute(x[0]) + (fresh ? 0 : sums[0]);
    cell.f = to_compute(x[H]) + (fresh ? 0 : sums[1]);
    cell.g = to_compute(x[2 * H]) + (fresh ? 0 : sums[2]);
    cell.o = to_compute(x[3 * H]) + (fresh ? 0 : sums[3]);
    cell_forward<DeviceMath<arithmetic>>(cell, state_before<arithmetic>(p, at, fresh));
    const Element m = T::element(cell.m);
    keep_cell<arithmetic>(p, schedule, at, cell, cell.c, m, operand<arithmetic>(m));
  });
}

template <Arithmetic arithmetic, StepTile tile>
LSTM_KERNEL(StepTileOf<tile>::kThreads, step_blocks<arithmetic, tile>())
step_backward(LSTM_PARAMETER StepBackward p) {
  using T = StepTypes<arithmetic>;
  using Compute = typename T::Compute;
  StepProduct<arithmetic, StepTileOf<tile>, 1> product(p.product);
  const int64_t B = p.shape.B, D = p.shape.D, H = p.shape.H, d = product.direction();
  const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
  const int64_t t = schedule.time(p.step);
  product.each_segment([&](int64_t unit, int64_t b, int gate) {
    ptx::prefetch_l2(T::at(p.gates, 0) + (((t * B + b) * D + d) * 4 + gate) * H + unit);
  });
  product.run();
  const auto visit = [&](int64_t unit, int64_t b, const Compute(&sums)[1]) {
    const Place at = place_of<arithmetic>(p, t, d, b, unit);
    if (!takes_part<arithmetic>(p, schedule, at)) return;
    const bool last = t == schedule.last(b), carried = is_carried(p, schedule, b),
               fresh = schedule.fresh(t, b);
    Compute dm = sums[0];
    if (!p.shape.projected)
      dm = (carried ? dm : 0) + outer_gradient<arithmetic>(p, at.cell, at.state, last);
    Compute dc = later_gradient<arithmetic>(p, at, carried, last);
    Cell<Compute> cell, grad;
    const Compute c_prev = load_cell<arithmetic>(p, schedule, at, fresh, cell);
    cell_backward<DeviceMath<arithmetic>>(cell, c_prev, dm, dc, grad);
    keep_gradients<arithmetic>(p, at, grad);
    keep_dc<arithmetic>(p, schedule, at, fresh, dc);
  };
  // A thread of the large tile has 64 cells.
  if constexpr (tile == StepTile::large)
    product.each_in_turn(visit);
  else
    product.each(visit);
}

// `variant`: of another cell than torch.nn.LSTM's.
template <Arithmetic arithmetic, StepTile tile, bool variant>
LSTM_KERNEL(StepTileOf<tile>::kThreads, step_blocks<arithmetic, tile>())
step_project(LSTM_PARAMETER StepProject p) {
  using T = StepTypes<arithmetic>;
  using Compute = typename T::Compute;
  using Element = typename T::Element;
  StepProduct<arithmetic, StepTileOf<tile>, 1> product(p.product);
  product.run();
  const int64_t B = p.shape.B, D = p.shape.D, P = p.shape.P, d = product.direction();
  const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
  const int64_t t = schedule.time(p.step);
  const auto visit = [&](int64_t unit, int64_t b, const Compute(&sums)[1]) {
    const int64_t y_at = ((t * B + b) * D + d) * P + unit;  // in [T, B, D, P]
    const int64_t state_at = (d * B + b) * P + unit;        // in [D, B, P]
    const int64_t out_at = d * p.out_stride_d + b * p.out_pitch + unit * int64_t(sizeof(Element));
    const bool active = schedule.active(t, b);
    if (p.what == Projection::h) {
      if (p.step == 0 && schedule.length(b) == 0)
        T::at(p.h_n, 0)[state_at] = T::element(T::value_or_zero(p.h0, state_at));
      if (!active) {
        T::at(p.y, 0)[y_at] = T::element(Compute(0));
        *T::at(p.out, out_at) = *T::at(p.kept, out_at);
        return;
      }
      Element h = T::element(sums[0]), read = operand<arithmetic>(h);
      if constexpr (variant)
        h = output_of<arithmetic>(p.variant, p.state, {t, d, b, unit}, state_at,
                                  schedule.fresh(t, b), sums[0], read);
      T::at(p.y, 0)[y_at] = h;
      *T::at(p.out, out_at) = read;
      if (t == schedule.last(b)) T::at(p.h_n, 0)[state_at] = h;
    } else if (p.what == Projection::dh) {
      Compute dh = 0;
      if (active) {
        const Compute outer = outer_gradient<arithmetic>(p, y_at, state_at, t == schedule.last(b));
        const bool carried = is_carried(p, schedule, b);
        if constexpr (variant)
          dh = output_gradient(p.variant, p.state, {t, d, b, unit}, state_at, carried, sums[0],
                               outer);
        else
          dh = (carried ? sums[0] : 0) + outer;
      }
      const Element rounded = T::element(dh);
      T::at(p.dh, 0)[y_at] = rounded;
      if (active) *T::at(p.out, out_at) = operand<arithmetic>(rounded);
    } else {
      // The state of a row of length 0 has passed through; else the first step's gradient has,
      // unless that step began afresh.
      Compute dh0 = sums[0];
      if constexpr (variant) dh0 = recurrent_gradient(p.variant, p.state, state_at, sums[0]);
      if (schedule.length(b) == 0)
        dh0 = T::value_or_zero(p.dh_n, state_at);
      else if (schedule.fresh(schedule.first(b), b))
        dh0 = 0;
      T::at(p.dh0, 0)[state_at] = T::element(dh0);
    }
  };
  if constexpr (variant)
    product.each_in_turn(visit);
  else
    product.each(visit);
}

// Calls start<arithmetic, tile>() for the plan's. There is no large tile of float64, nor unless
// `large`.
template <bool large, class Start>
Status choose_step(const CudaPlan& plan, Start start) {
  return by_arithmetic(plan.arithmetic, [&]<Arithmetic a>() {
    if (plan.tile == StepTile::small) return start.template operator()<a, StepTile::small>();
    if constexpr (large && a != Arithmetic::float64)
      if (plan.tile == StepTile::large) return start.template operator()<a, StepTile::large>();
    return start.template operator()<a, StepTile::medium>();
  });
}

// Starts the kernel that has the given tile; `Product` says its grid and shared memory.
template <class Product, auto kernel, class Params>
Status start_step(const char* name, const Params& p, bool overlap, Stream stream) {
  using Tile = typename Product::Tile;
  LaunchShape shape{name, Product::blocks(p.product, p.shape.D), unsigned(Tile::kThreads),
                    std::size_t(Tile::kSharedBytes)};
  shape.overlap = overlap;
  return launch<kernel>(shape, p, stream);
}

}  // namespace lstm_cuda
