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
#pragma once

#include "../schedule.h"
#include "families.h"
#include "step_product.cuh"

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
};

// How each is started; defined in the .cu file of the kernel's name.
Status launch_step_forward(const StepForward& p, const CudaPlan& plan, bool overlap, Stream stream);
Status launch_step_backward(const StepBackward& p, const CudaPlan& plan, bool overlap,
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
};

Status launch_step_project(const StepProject& p, const CudaPlan& plan, bool overlap, Stream stream);

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
    const int64_t cell_at = ((t * B + b) * D + d) * H + unit;  // in [T, B, D, H]
    const int64_t state_at = (d * B + b) * H + unit;           // in [D, B, H]
    Compute* const c_state = static_cast<Compute*>(p.c_state) + state_at;
    const int64_t out_at = d * p.out_stride_d + b * p.out_pitch + unit * int64_t(sizeof(Element));
    if (p.step == 0 && schedule.length(b) == 0) {
      store_either<arithmetic>(p.c_n, p.wide_c, state_at,
                               load_either<arithmetic>(p.c0, p.wide_c, state_at));
      if (!p.shape.projected)
        T::at(p.h_n, 0)[state_at] = T::element(T::value_or_zero(p.h0, state_at));
    }
    if (!schedule.active(t, b)) {
      if (p.c) static_cast<Compute*>(p.c)[cell_at] = 0;
      if (!p.shape.projected) {
        T::at(p.y, 0)[cell_at] = T::element(Compute(0));
        *T::at(p.out, out_at) = *T::at(p.kept, out_at);
      }
      return;
    }
    Element* const x = gates + ((t * B + b) * D + d) * 4 * H + unit;
    const bool fresh = schedule.fresh(t, b);
    Cell<Compute> cell;
    cell.i = to_compute(x[0]) + (fresh ? 0 : sums[0]);
    cell.f = to_compute(x[H]) + (fresh ? 0 : sums[1]);
    cell.g = to_compute(x[2 * H]) + (fresh ? 0 : sums[2]);
    cell.o = to_compute(x[3 * H]) + (fresh ? 0 : sums[3]);
    cell_forward<DeviceMath<arithmetic>>(cell, fresh ? Compute(0) : *c_state);
    const Element m = T::element(cell.m);
    *T::at(p.out, out_at) = operand<arithmetic>(m);
    *c_state = cell.c;
    if (p.c) static_cast<Compute*>(p.c)[cell_at] = cell.c;
    if (p.save) {
      x[0] = T::element(cell.i);
      x[H] = T::element(cell.f);
      x[2 * H] = T::element(cell.g);
      x[3 * H] = T::element(cell.o);
    }
    if (!p.shape.projected) T::at(p.y, 0)[cell_at] = m;
    if (t == schedule.last(b)) {
      store_either<arithmetic>(p.c_n, p.wide_c, state_at, cell.c);
      if (!p.shape.projected) T::at(p.h_n, 0)[state_at] = m;
    }
  });
}

template <Arithmetic arithmetic, StepTile tile>
LSTM_KERNEL(StepTileOf<tile>::kThreads, step_blocks<arithmetic, tile>())
step_backward(LSTM_PARAMETER StepBackward p) {
  using T = StepTypes<arithmetic>;
  using Compute = typename T::Compute;
  using Element = typename T::Element;
  StepProduct<arithmetic, StepTileOf<tile>, 1> product(p.product);
  const int64_t B = p.shape.B, D = p.shape.D, H = p.shape.H, d = product.direction();
  const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
  const int64_t t = schedule.time(p.step);
  product.each_segment([&](int64_t unit, int64_t b, int gate) {
    ptx::prefetch_l2(T::at(p.gates, 0) + (((t * B + b) * D + d) * 4 + gate) * H + unit);
  });
  product.run();
  product.each([&](int64_t unit, int64_t b, const Compute(&sums)[1]) {
    const int64_t cell_at = ((t * B + b) * D + d) * H + unit;
    const int64_t state_at = (d * B + b) * H + unit;
    Compute* const dc_state = static_cast<Compute*>(p.dc_state) + state_at;
    Element* const dgates = T::at(p.dgates, 0) + ((t * B + b) * D + d) * 4 * H + unit;
    const int64_t out_at = d * p.out_stride_d + b * p.out_pitch + unit * int64_t(sizeof(Element));
    if (p.dc0 && p.step == 0 && schedule.length(b) == 0)
      store_either<arithmetic>(p.dc0, p.wide_c, state_at,
                               load_either<arithmetic>(p.dc_n, p.wide_c, state_at));
    if (!schedule.active(t, b)) {
      LSTM_UNROLL
      for (int gate = 0; gate < 4; ++gate) {
        dgates[gate * H] = T::element(Compute(0));
        *T::at(p.out, out_at + gate * p.gate_pitch) = *T::at(p.kept, out_at + gate * p.gate_pitch);
      }
      return;
    }
    const bool last = t == schedule.last(b);
    // No gradient comes over a boundary: not from the step that was processed before this one.
    const bool carried = p.step + 1 < p.shape.T && !schedule.fresh(schedule.time(p.step + 1), b);
    Compute dm = sums[0];
    if (!p.shape.projected) {
      dm = carried ? dm : 0;
      dm += T::value_or_zero(p.dy, cell_at);
      if (last) dm += T::value_or_zero(p.dh_n, state_at);
    }
    Compute dc = carried ? *dc_state : 0;
    if (p.dc) dc += static_cast<const Compute*>(p.dc)[cell_at];
    if (last) dc += load_either<arithmetic>(p.dc_n, p.wide_c, state_at);

    const Compute* const c = static_cast<const Compute*>(p.c);
    const bool fresh = schedule.fresh(t, b);
    const int64_t before = schedule.previous(t, b);
    Compute c_prev = 0;
    if (!fresh)
      c_prev = before < 0 ? load_either<arithmetic>(p.c0, p.wide_c, state_at)
                          : c[((before * B + b) * D + d) * H + unit];
    const int64_t gates_at = ((t * B + b) * D + d) * 4 * H + unit;
    Cell<Compute> cell, grad;
    cell.i = T::value(p.gates, gates_at);
    cell.f = T::value(p.gates, gates_at + H);
    cell.g = T::value(p.gates, gates_at + 2 * H);
    cell.o = T::value(p.gates, gates_at + 3 * H);
    cell.c = c[cell_at];
    cell_backward<DeviceMath<arithmetic>>(cell, c_prev, dm, dc, grad);
    *dc_state = dc;
    const Element rounded[4] = {T::element(grad.i), T::element(grad.f), T::element(grad.g),
                                T::element(grad.o)};
    LSTM_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      dgates[gate * H] = rounded[gate];
      *T::at(p.out, out_at + gate * p.gate_pitch) = operand<arithmetic>(rounded[gate]);
    }
    if (p.dc0 && t == schedule.first(b))
      store_either<arithmetic>(p.dc0, p.wide_c, state_at, fresh ? Compute(0) : dc);
  });
}

template <Arithmetic arithmetic, StepTile tile>
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
  product.each([&](int64_t unit, int64_t b, const Compute(&sums)[1]) {
    const int64_t y_at = ((t * B + b) * D + d) * P + unit;  // in [T, B, D, P]
    const int64_t state_at = (d * B + b) * P + unit;        // in [D, B, P]
    const int64_t out_at = d * p.out_stride_d + b * p.out_pitch + unit * int64_t(sizeof(Element));
    const bool active = schedule.active(t, b);
    if (p.what == Projection::h) {
      if (p.step == 0 && schedule.length(b) == 0)
        T::at(p.h_n, 0)[state_at] = T::element(T::value_or_zero(p.h0, state_at));
      const Element h = T::element(active ? sums[0] : Compute(0));
      T::at(p.y, 0)[y_at] = h;
      *T::at(p.out, out_at) = active ? operand<arithmetic>(h) : *T::at(p.kept, out_at);
      if (active && t == schedule.last(b)) T::at(p.h_n, 0)[state_at] = h;
    } else if (p.what == Projection::dh) {
      const bool carried = p.step + 1 < p.shape.T && !schedule.fresh(schedule.time(p.step + 1), b);
      Compute dh = carried ? sums[0] : 0;
      dh += T::value_or_zero(p.dy, y_at);
      if (t == schedule.last(b)) dh += T::value_or_zero(p.dh_n, state_at);
      const Element rounded = T::element(active ? dh : Compute(0));
      T::at(p.dh, 0)[y_at] = rounded;
      if (active) *T::at(p.out, out_at) = operand<arithmetic>(rounded);
    } else {
      // The state of a row of length 0 has passed through; else the first step's gradient has,
      // unless that step began afresh.
      Compute dh0 = sums[0];
      if (schedule.length(b) == 0)
        dh0 = T::value_or_zero(p.dh_n, state_at);
      else if (schedule.fresh(schedule.first(b), b))
        dh0 = 0;
      T::at(p.dh0, 0)[state_at] = T::element(dh0);
    }
  });
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
