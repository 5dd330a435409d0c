// A step of family rec_step around its product and its cell: what one launch is told, where a cell's values
// are, which rows take part, what is kept for the step after and as results. Plain cells and others
// (step_variant.cuh) share it.
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

}  // namespace lstm_cuda
