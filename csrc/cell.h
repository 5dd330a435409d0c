// One LSTM cell, forward and backward: the only place below Python where the formula stands.
//
//   Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000:
//     i, f, o = sigmoid(gates)   g = tanh(gates)   c = f c_prev + i g   m = o tanh(c)
//   h is m, or its projection w_hr m (Sak, Senior & Beaufays 2014).
//
// Values are of any type with arithmetic (a number or a vector of numbers); Math brings sigmoid and
// tanh for it.
#pragma once

#include "host_device.h"

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

}  // namespace lstm_cuda
