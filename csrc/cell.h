// One LSTM cell, forward and backward: the only place below Python where the formula stands.
//
//   Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000:
//     i, f, o = sigmoid(gates)   g = tanh(gates)   c = f c_prev + i g   m = o tanh(c)
//   h is m, or its projection w_hr m (Sak, Senior & Beaufays 2014).
//
// Values are of any type with arithmetic (a number or a vector of numbers); Math brings sigmoid and
// tanh for it.
#pragma once

#include <type_traits>

#include "host_device.h"
#include "recurrence.h"

namespace lstm_cuda {

template <class V>
struct Cell {
  V i, f, g, o;  // before or after activation
  V c, m;        // cell state and unprojected output
};

// In: i, f, g, o before activation. Out: all six.
template <class Math, class V>
LSTM_HOST_DEVICE void cell_forward(Cell<V>& cell, const V& c_prev) {
  cell.i = Math::sigmoid(cell.i);
  cell.f = Math::sigmoid(cell.f);
  cell.g = Math::tanh(cell.g);
  cell.o = Math::sigmoid(cell.o);
  cell.c = cell.f * c_prev + cell.i * cell.g;
  cell.m = cell.o * Math::tanh(cell.c);
}

// With tanh(c) = s, the chain rule gives, for the gates before activation,
//   do = dm s o(1-o)      dc += dm o (1-s^2)
//   di = dc g i(1-i)      df = dc c_prev f(1-f)      dg = dc i (1-g^2)
// In: i, f, g, o activated and c. Out: d holds the gradients of the pre-activations, dc the
// gradient of c_prev, cell.m the unprojected output (which the projection's own gradient needs).
template <class Math, class V>
LSTM_HOST_DEVICE void cell_backward(Cell<V>& cell, const V& c_prev, const V& dm, V& dc,
                                    Cell<V>& d) {
  const V s = Math::tanh(cell.c);
  cell.m = cell.o * s;
  d.o = dm * s * cell.o * (1 - cell.o);
  dc = dc + dm * cell.o * (1 - s * s);
  d.i = dc * cell.g * cell.i * (1 - cell.i);
  d.f = dc * c_prev * cell.f * (1 - cell.f);
  d.g = dc * cell.i * (1 - cell.g * cell.g);
  dc = dc * cell.f;
}

// The functions below are the parts, within one step, of what lstm_cuda/recurrence.py writes out:
// `cell` is activated and has its c; changes go forwards, gradients (d...) backwards.

// What changes of pre-activations make of the activated gates, or gradients the other way round.
template <class V>
LSTM_HOST_DEVICE Cell<V> cell_slopes(const Cell<V>& cell) {
  return {cell.i * (1 - cell.i),
          cell.f * (1 - cell.f),
          1 - cell.g * cell.g,
          cell.o * (1 - cell.o),
          V{},
          V{}};
}

// In: changes of the activated gates and, in change.c and change.m, what comes from elsewhere.
// Out: the changes of c and m.
template <class Math, class V>
LSTM_HOST_DEVICE void cell_tangent(const Cell<V>& cell, const V& c_prev, Cell<V>& change) {
  const V s = Math::tanh(cell.c);
  change.c = change.c + cell.g * change.i + c_prev * change.f + cell.i * change.g;
  change.m = change.m + cell.o * (1 - s * s) * change.c + s * change.o;
}

// What the gradients of c and m (d.c, d.m) bring to the activated gates, where s = tanh(c).
template <class V>
LSTM_HOST_DEVICE void cell_gates_adjoint(const Cell<V>& cell, const V& c_prev, const V& s,
                                         Cell<V>& d) {
  d.i = d.i + cell.g * d.c;
  d.f = d.f + c_prev * d.c;
  d.g = d.g + cell.i * d.c;
  d.o = d.o + s * d.m;
}

// The transpose of cell_tangent. In: the gradients of the activated gates and of c that come from
// elsewhere, and that of m. Out: all that comes to the gates and to c.
template <class Math, class V>
LSTM_HOST_DEVICE void cell_adjoint(const Cell<V>& cell, const V& c_prev, Cell<V>& d) {
  const V s = Math::tanh(cell.c);
  d.c = d.c + cell.o * (1 - s * s) * d.m;
  cell_gates_adjoint(cell, c_prev, s, d);
}

// The gradient, by i, f, g, o and c, of what is linear in changes and in gradients; that by c_prev
// is d.c times the change of f. In: the changes of the pre-activations (z), of c and of c_prev; the
// gradients of the gates that come from elsewhere; all that comes to c and m.
template <class Math, class V>
LSTM_HOST_DEVICE Cell<V> cell_gradients(const Cell<V>& cell, const V& c_prev, const Cell<V>& z,
                                        const V& change_c, const V& change_c_prev, Cell<V> d) {
  const V s = Math::tanh(cell.c), through_tanh = d.m * (1 - s * s);
  cell_gates_adjoint(cell, c_prev, s, d);
  const Cell<V> slope = cell_slopes(cell);
  return {d.i * (1 - 2 * cell.i) * z.i + d.c * slope.g * z.g,
          d.f * (1 - 2 * cell.f) * z.f + d.c * change_c_prev,
          d.c * slope.i * z.i - 2 * d.g * cell.g * z.g,
          d.o * (1 - 2 * cell.o) * z.o + through_tanh * change_c,
          through_tanh * (slope.o * z.o - 2 * s * cell.o * change_c),
          V{}};
}

// ---- other cells --------------------------------------------------------------------------------
//
//   z_i += w_ci c_prev   z_f += w_cf c_prev                 peepholes, Gers & Schmidhuber 2000
//   f = 1                                                   Hochreiter & Schmidhuber 1997
//   f = 1 - i                                               Greff et al. 2017
//   c = clip(f c_prev + i g)   z_o += w_co c   m = o output(c)
// and what is kept of the state, Krueger et al. 2017:
//   c' = k c_prev + (1 - k) c   h' = k h_prev + (1 - k) h

constexpr double kNormEpsilon = 1e-5;  // added to variances

template <class Math, class V>
LSTM_HOST_DEVICE V activate(Activation activation, const V& z) {
  const V zero{}, one = zero + 1;
  switch (activation) {
    case Activation::tanh:
      return Math::tanh(z);
    case Activation::sigmoid:
      return Math::sigmoid(z);
    case Activation::relu:
      return z < zero ? zero : z;
    case Activation::hard_sigmoid_keras: {
      const V a = z / 6 + V(one / 2);
      return a < zero ? zero : (a > one ? one : a);
    }
    case Activation::hard_sigmoid_onnx: {
      const V a = z / 5 + V(one / 2);
      return a < zero ? zero : (a > one ? one : a);
    }
    case Activation::hard_tanh:
      return z < -one ? -one : (z > one ? one : z);
    case Activation::softsign:
      return z / (1 + (z < zero ? -z : z));
    case Activation::identity:
      return z;
  }
  return z;
}

// The derivative, from what `activate` gave.
template <class V>
LSTM_HOST_DEVICE V activation_slope(Activation activation, const V& a) {
  const V zero{}, one = zero + 1;
  switch (activation) {
    case Activation::tanh:
      return 1 - a * a;
    case Activation::sigmoid:
      return a * (1 - a);
    case Activation::relu:
      return a > zero ? one : zero;
    case Activation::hard_sigmoid_keras:
      return a > zero ? (a < one ? V(one / 6) : zero) : zero;
    case Activation::hard_sigmoid_onnx:
      return a > zero ? (a < one ? V(one / 5) : zero) : zero;
    case Activation::hard_tanh:
      return a > -one ? (a < one ? one : zero) : zero;
    case Activation::softsign: {
      const V rest = 1 - (a < zero ? -a : a);
      return rest * rest;
    }
    case Activation::identity:
      return one;
  }
  return one;
}

template <class V>
struct Peephole {
  V i, f, o;  // zeros without
};

template <class V>
LSTM_HOST_DEVICE V constant(double value) {
  if constexpr (std::is_arithmetic_v<V>) {
    return V(value);
  } else {
    const V zero{};
    return zero + std::remove_cvref_t<decltype(zero[0])>(value);
  }
}

template <class V>
LSTM_HOST_DEVICE V clipped(const V& c, double clip) {
  if (clip <= 0) return c;
  const V high = constant<V>(clip);
  return c < -high ? -high : (c > high ? high : c);
}

// In: i, f, g, o before activation. Out: i, f, g, o and c.
template <class Math, class V>
LSTM_HOST_DEVICE void variant_cell(const CellOptions& options, const Peephole<V>& w, Cell<V>& cell,
                                   const V& c_prev) {
  const V one = V{} + 1;
  cell.i = activate<Math>(options.recurrent, V(cell.i + w.i * c_prev));
  cell.f = options.forget == Forget::none ? one
           : options.forget == Forget::coupled
               ? V(1 - cell.i)
               : activate<Math>(options.recurrent, V(cell.f + w.f * c_prev));
  cell.g = activate<Math>(options.candidate, cell.g);
  cell.c = clipped(V(cell.f * c_prev + cell.i * cell.g), options.clip);
  cell.o = activate<Math>(options.recurrent, V(cell.o + w.o * cell.c));
}

// c of variant_cell, from the activated gates.
template <class V>
LSTM_HOST_DEVICE V variant_state(const CellOptions& options, const Cell<V>& cell, const V& c_prev) {
  return clipped(V(cell.f * c_prev + cell.i * cell.g), options.clip);
}

// The transpose of variant_cell, in two parts. In: the activated gates, c of variant_cell and
// output(c), or of c normalised, as s; dm. The gradient of what `output` is of comes out.
template <class V>
LSTM_HOST_DEVICE V variant_output_backward(const CellOptions& options, Cell<V>& cell, const V& s,
                                           const V& dm, Cell<V>& d) {
  cell.m = cell.o * s;
  d.o = dm * s * activation_slope(options.recurrent, cell.o);
  return dm * cell.o * activation_slope(options.output, s);
}

// In: d.o, and in dc all that comes to c but through the peephole of o. Out: the gradients of the
// pre-activations in d, that of c_prev in dc.
template <class V>
LSTM_HOST_DEVICE void variant_cell_backward(const CellOptions& options, const Peephole<V>& w,
                                            const Cell<V>& cell, const V& c_prev, V& dc,
                                            Cell<V>& d) {
  const V zero{};
  dc = dc + w.o * d.o;
  if (options.clip > 0) {
    const V c = cell.f * c_prev + cell.i * cell.g, high = constant<V>(options.clip);
    dc = c > high ? zero : (c < -high ? zero : dc);
  }
  const bool coupled = options.forget == Forget::coupled;
  d.i = dc * (coupled ? V(cell.g - c_prev) : cell.g) * activation_slope(options.recurrent, cell.i);
  d.f = options.forget == Forget::own ? V(dc * c_prev * activation_slope(options.recurrent, cell.f))
                                      : zero;
  d.g = dc * cell.i * activation_slope(options.candidate, cell.g);
  dc = dc * cell.f + w.i * d.i + w.f * d.f;
}

}  // namespace lstm_cuda
