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

#include "../schedule.h"
#include "families.h"
#include "step_product.cuh"
#include "variant.cuh"

namespace lstm_cuda {

// What one launch needs. Names and shapes as in families.h; the step is of the recurrence's order.
struct StepForward {
  StepOperands product;
  LayerShape shape;
  int64_t step;
  const void *h0, *c0;
  const int64_t* lengths;
  const uint8_t* reset;
  void* gates;
  bool save, wide_c;
  void *y, *h_n, *c_n, *c;
  void* c_state;                    // [D, B, H] compute
  void* out;                        // the next slot of h_ring, or m: what the next product reads
  const void* kept;                 // the last slot of h_ring (not projected)
  int64_t out_pitch, out_stride_d;  // bytes
  // Of other cells:
  Variant variant;
  const void* gates_x;
  void* h_state;  // [D, B, P] compute, h of the step before; null without zoneout of h
  void* row;  // [D, B, 5H] compute, with norm: w_hh h, for the kernel of rows, and room; or null
};

struct StepBackward {
  StepOperands product;
  LayerShape shape;
  int64_t step;
  const void* c0;
  const int64_t* lengths;
  const uint8_t* reset;
  const void *gates, *c, *dy, *dh_n, *dc_n, *dc;
  void *dgates, *dc0;
  bool wide_c;
  void* dc_state;                   // [D, B, H] compute
  void* out;                        // the next slot of dgates_ring
  const void* kept;                 // its last slot
  int64_t out_pitch, out_stride_d;  // bytes
  int64_t gate_pitch;               // bytes from gate to gate in a row of dgates_ring
  // Of other cells:
  Variant variant;
  void *dgates_x, *m;
  void* dh_state;  // [D, B, P] compute, what zoneout leaves to the h before; or null
  void* row;       // [D, B, 8H] compute, with norm: dm, and room for the kernel of rows; or null
};

// How each is started; defined in the .cu file of the kernel's name.
Status launch_step_forward(const StepForward& p, const CudaPlan& plan, bool overlap, Stream stream);
Status launch_step_backward(const StepBackward& p, const CudaPlan& plan, bool overlap,
                            Stream stream);
// Of other cells.
Status launch_variant_forward(const StepForward& p, const CudaPlan& plan, bool overlap,
                              Stream stream);
Status launch_variant_backward(const StepBackward& p, const CudaPlan& plan, bool overlap,
                               Stream stream);

enum class Projection {
  h,    // forward: h = w_hr m
  dh,   // backward: dh = dgates w_hh + dy, for dm = w_hr^T dh
  dh0,  // after the last step back
};

struct StepProject {
  StepOperands product;
  LayerShape shape;
  Projection what;
  int64_t step;
  const int64_t* lengths;
  const uint8_t* reset;
  const void *dy, *dh_n, *h0;
  void *y, *h_n, *dh, *dh0;
  void* out;                        // h: the next slot of h_ring; dh: the operand dh
  const void* kept;                 // h: the last slot of h_ring
  int64_t out_pitch, out_stride_d;  // bytes
  // Of other cells:
  Variant variant;
  void* state;  // h: h_state; dh, dh0: dh_state
};

Status launch_step_project(const StepProject& p, const CudaPlan& plan, bool variant, bool overlap,
                           Stream stream);

template <Arithmetic arithmetic>
struct StepTypes : Types<arithmetic> {
  using typename Types<arithmetic>::Element;
  using typename Types<arithmetic>::Compute;

  static LSTM_DEVICE Element element(Compute v) { return to_element<Element>(v); }
  static LSTM_DEVICE Compute value(const void* p, int64_t index) {
    return to_compute(static_cast<const Element*>(p)[index]);
  }
  static LSTM_DEVICE Compute value_or_zero(const void* p, int64_t index) {
    return p ? value(p, index) : Compute(0);
  }
  static LSTM_DEVICE Element* at(void* p, int64_t bytes) {
    return reinterpret_cast<Element*>(static_cast<std::byte*>(p) + bytes);
  }
  static LSTM_DEVICE const Element* at(const void* p, int64_t bytes) {
    return reinterpret_cast<const Element*>(static_cast<const std::byte*>(p) + bytes);
  }
};

// Blocks of one kernel that the registers of a multiprocessor have room for at least.
template <Arithmetic arithmetic, StepTile tile>
constexpr unsigned step_blocks() {
  return StepTileOf<tile>::kBlocks - (arithmetic == Arithmetic::float64 ? 1 : 0);
}

// A cell of one step, and where it is.
struct Place : UnitOfStep {
  int64_t cell;   // in [T, B, D, H]
  int64_t gates;  // its gate i in [T, B, D, 4H]
  int64_t state;  // in [D, B, H]
  int64_t out;    // in `out` and `kept`, bytes
};
template <Arithmetic arithmetic, class Step>
LSTM_DEVICE Place place_of(const Step& p, int64_t t, int64_t d, int64_t b, int64_t unit) {
  constexpr int64_t bytes = sizeof(typename Types<arithmetic>::Element);
  const int64_t B = p.shape.B, D = p.shape.D, H = p.shape.H, row = (t * B + b) * D + d;
  return {{t, d, b, unit},
          row * H + unit,
          row * 4 * H + unit,
          (d * B + b) * H + unit,
          d * p.out_stride_d + b * p.out_pitch + unit * bytes};
}

// ---- around a cell, forward ----

// Whether the cell takes part in the step. If not, its results and its state are done with here.
template <Arithmetic arithmetic>
LSTM_DEVICE bool takes_part(const StepForward& p, const Schedule& schedule, const Place& at) {
  using T = StepTypes<arithmetic>;
  using Compute = typename T::Compute;
  if (p.step == 0 && schedule.length(at.b) == 0) {
    store_either<arithmetic>(p.c_n, p.wide_c, at.state,
                             load_either<arithmetic>(p.c0, p.wide_c, at.state));
    if (!p.shape.projected)
      T::at(p.h_n, 0)[at.state] = T::element(T::value_or_zero(p.h0, at.state));
  }
  if (schedule.active(at.t, at.b)) return true;
  if (p.c) static_cast<Compute*>(p.c)[at.cell] = 0;
  if (!p.shape.projected) {
    T::at(p.y, 0)[at.cell] = T::element(Compute(0));
    *T::at(p.out, at.out) = *T::at(p.kept, at.out);
  }
  return false;
}

template <Arithmetic arithmetic>
LSTM_DEVICE auto state_before(const StepForward& p, const Place& at, bool fresh) {
  using Compute = typename Types<arithmetic>::Compute;
  const Compute* const c_state = static_cast<const Compute*>(p.c_state) + at.state;
  return fresh ? Compute(0) : *c_state;
}

// State for the step after, and results: c, and h (projected: m) as it is and as products read it.
template <Arithmetic arithmetic, class Compute, class Element>
LSTM_DEVICE void keep_cell(const StepForward& p, const Schedule& schedule, const Place& at,
                           const Cell<Compute>& cell, Compute c, Element h, Element read) {
  using T = StepTypes<arithmetic>;
  const int64_t H = p.shape.H;
  *T::at(p.out, at.out) = read;
  static_cast<Compute*>(p.c_state)[at.state] = c;
  if (p.c) static_cast<Compute*>(p.c)[at.cell] = c;
  if (p.save) {
    Element* const gates = T::at(p.gates, 0) + at.gates;
    gates[0] = T::element(cell.i);
    gates[H] = T::element(cell.f);
    gates[2 * H] = T::element(cell.g);
    gates[3 * H] = T::element(cell.o);
  }
  if (!p.shape.projected) T::at(p.y, 0)[at.cell] = h;
  if (at.t == schedule.last(at.b)) {
    store_either<arithmetic>(p.c_n, p.wide_c, at.state, c);
    if (!p.shape.projected) T::at(p.h_n, 0)[at.state] = h;
  }
}

// ---- around a cell, backward ----

template <Arithmetic arithmetic>
LSTM_DEVICE bool takes_part(const StepBackward& p, const Schedule& schedule, const Place& at) {
  using T = StepTypes<arithmetic>;
  if (p.dc0 && p.step == 0 && schedule.length(at.b) == 0)
    store_either<arithmetic>(p.dc0, p.wide_c, at.state,
                             load_either<arithmetic>(p.dc_n, p.wide_c, at.state));
  if (schedule.active(at.t, at.b)) return true;
  LSTM_UNROLL
  for (int gate = 0; gate < 4; ++gate) {
    const int64_t out = at.out + gate * p.gate_pitch;
    T::at(p.dgates, 0)[at.gates + gate * p.shape.H] = T::element(typename T::Compute(0));
    *T::at(p.out, out) = *T::at(p.kept, out);
  }
  return false;
}

// No gradient comes over a boundary: not from the step that was processed before this one.
template <class Step>
LSTM_DEVICE bool is_carried(const Step& p, const Schedule& schedule, int64_t b) {
  return p.step + 1 < p.shape.T && !schedule.fresh(schedule.time(p.step + 1), b);
}

// What comes to h from outside the recurrence.
template <Arithmetic arithmetic, class Step>
LSTM_DEVICE auto outer_gradient(const Step& p, int64_t y_at, int64_t state_at, bool last) {
  using T = StepTypes<arithmetic>;
  typename T::Compute dh = T::value_or_zero(p.dy, y_at);
  if (last) dh += T::value_or_zero(p.dh_n, state_at);
  return dh;
}

// What comes to c, but through h.
template <Arithmetic arithmetic>
LSTM_DEVICE auto later_gradient(const StepBackward& p, const Place& at, bool carried, bool last) {
  using Compute = typename Types<arithmetic>::Compute;
  Compute dc = carried ? static_cast<const Compute*>(p.dc_state)[at.state] : Compute(0);
  if (p.dc) dc += static_cast<const Compute*>(p.dc)[at.cell];
  if (last) dc += load_either<arithmetic>(p.dc_n, p.wide_c, at.state);
  return dc;
}

// The cell that forward left, and c before it.
template <Arithmetic arithmetic, class Compute>
LSTM_DEVICE Compute load_cell(const StepBackward& p, const Schedule& schedule, const Place& at,
                              bool fresh, Cell<Compute>& cell) {
  using T = StepTypes<arithmetic>;
  const int64_t B = p.shape.B, D = p.shape.D, H = p.shape.H;
  const Compute* const c = static_cast<const Compute*>(p.c);
  const int64_t before = schedule.previous(at.t, at.b);
  cell.i = T::value(p.gates, at.gates);
  cell.f = T::value(p.gates, at.gates + H);
  cell.g = T::value(p.gates, at.gates + 2 * H);
  cell.o = T::value(p.gates, at.gates + 3 * H);
  cell.c = c[at.cell];
  if (fresh) return Compute(0);
  return before < 0 ? load_either<arithmetic>(p.c0, p.wide_c, at.state)
                    : c[((before * B + at.b) * D + at.d) * H + at.unit];
}

// The gradients of the gates, as a result and as the next product reads them.
template <Arithmetic arithmetic, class Compute>
LSTM_DEVICE void keep_gradients(const StepBackward& p, const Place& at, const Cell<Compute>& grad) {
  using T = StepTypes<arithmetic>;
  const typename T::Element rounded[4] = {T::element(grad.i), T::element(grad.f),
                                          T::element(grad.g), T::element(grad.o)};
  LSTM_UNROLL
  for (int gate = 0; gate < 4; ++gate) {
    T::at(p.dgates, 0)[at.gates + gate * p.shape.H] = rounded[gate];
    *T::at(p.out, at.out + gate * p.gate_pitch) = operand<arithmetic>(rounded[gate]);
  }
}

template <Arithmetic arithmetic, class Compute>
LSTM_DEVICE void keep_dc(const StepBackward& p, const Schedule& schedule, const Place& at,
                         bool fresh, Compute dc) {
  static_cast<Compute*>(p.dc_state)[at.state] = dc;
  if (p.dc0 && at.t == schedule.first(at.b))
    store_either<arithmetic>(p.dc0, p.wide_c, at.state, fresh ? Compute(0) : dc);
}

// ---- kernels ----

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
