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

}  // namespace lstm_cuda
