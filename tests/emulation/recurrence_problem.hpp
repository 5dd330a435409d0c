// A recurrence: what is given, and by plain loops in float64 what should come out. They share nothing
// with the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace lstm_cuda::test {

// What numbers are like. All but the first are chosen to be hard on the arithmetic.
enum class Inputs {
  usual,
  weights_differ,    // by powers of two, from row to row and along a row
  tiny_weights,      // far below what float16 holds
  denormal_weights,  // of which dh0, where it is as small, has few bits: not for those who give it
  saturated,         // gates near 0 and 1
  closed_output,     // h near 0, and weights that make up for it
  large_gradients,   // far above what float16 holds
  tiny_gradients,    // far below
  gradients_differ,  // from row to row, and from unit to unit
  nan_row,           // batch row 1 has a NaN
};

struct Case {
  int64_t T, B, D, H, P;  // P = 0: not projected
  uint64_t reversed;
  bool lengths, reset, state, all_gradients;
  Inputs inputs = Inputs::usual;
  int tiles = 1;   // of 8 batch rows, of a cluster or group
  int groups = 1;  // at once
  int turns = 1;   // in which a cluster takes its tiles

  // Whether the cell state comes and goes in the compute type: of some cases, of every family.
  bool wide_c() const { return state && reset; }
};

using Values = std::vector<double>;

// One problem: what is given, rounded to what the element type holds, and what should come out.
struct Problem {
  Case c;
  int64_t P;
  Values gates_x, w_hh, w_hr, h0, c0, dy, dh_n, dc_n, dc;
  std::vector<int64_t> lengths;
  std::vector<uint8_t> reset;
  Values y, h_n, c_n, cells, gates;  // forward
  Values dgates, dh, dh0, dc0;       // backward

  int64_t length(int64_t b) const { return c.lengths ? lengths[size_t(b)] : c.T; }
  int64_t row(int64_t t, int64_t b, int64_t d) const { return (t * c.B + b) * c.D + d; }

  // Row b's steps of recurrence d in order, each with whether it starts from zeros.
  std::vector<std::pair<int64_t, bool>> steps(int64_t b, int64_t d) const;
  // gates_x with h0 w_hh^T in each row's first step, as families with resident weights want it.
  Values gates_with_h0() const;
  void forward();
  void backward();
};

}  // namespace lstm_cuda::test
