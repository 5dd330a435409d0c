// The problem as the kernels see it: plain sizes, strides and pointers. Nothing here knows torch or
// CUDA.
//
// A layer is D independent recurrences (directions, members of an ensemble) over time T and batch B:
//   gates_x[t] = x[t] w_ih^T + b_ih + b_hh
//   h[t], c[t] = cell(gates_x[t] + h[t-1] w_hh^T, c[t-1])
// G = 4H rows of weights in torch's order i, f, g, o. Without projection P = H. All weights are
// contiguous.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace lstm_cuda {

enum class Dtype { float64, float32, float16, bfloat16 };

constexpr int kMaxRecurrences = 64;  // D of one call

struct LayerShape {
  Dtype dtype;         // of every floating tensor but the reserve
  int64_t T, B, D;     // time, batch, recurrences
  int64_t I, H, P;     // input, hidden and output (projected) sizes
  uint64_t reversed;   // bit d: recurrence d runs from the last step to the first
  bool projected;      // h = w_hr (o * tanh(c)); otherwise h = o * tanh(c)
  int64_t inputs = 1;  // that x holds side by side; D / inputs recurrences in a row read each

  LSTM_HOST_DEVICE int64_t input_of(int64_t d) const { return d / (D / inputs); }
};

// The steps of a longer sequence that a call leaves to others: how many come before and after its
// own, in the order of the recurrences. On CPUs no result depends on how a sequence is cut.
struct Others {
  int64_t before, after;
};

// What a cell computes (cell.h). The defaults are torch.nn.LSTM's.
enum class Activation : uint8_t {
  tanh,
  sigmoid,
  relu,
  hard_sigmoid_keras,
  hard_sigmoid_onnx,
  hard_tanh,
  softsign,
  identity
};
enum class Forget : uint8_t { own, none, coupled };  // f has weights, is 1, is 1 - i

struct CellOptions {
  Forget forget = Forget::own;
  Activation recurrent = Activation::sigmoid;  // of i, f and o
  Activation candidate = Activation::tanh;     // of g
  Activation output = Activation::tanh;        // of c
  double clip = 0;                             // bound of |c|; 0: none
  double zoneout_h = 0, zoneout_c = 0;         // probabilities
};

// A layer whose cell is another than torch.nn.LSTM's. All in the compute type.
struct Variant {
  CellOptions cell;
  const void* peephole;  // [D, 3, H]: w_ci, w_cf, w_co; or null
  const void* norm;      // [D, 6, H]: gains of w_hh h (four rows) and of c, shift of c; or null
  const void* h_scale;   // [D, B, P], of h where it meets w_hh; or null
  const int64_t* seed;   // [D], zoneout's choices are drawn (random.h); null: the mean of them
  int64_t first_step;    // of those choices: the time in the whole sequence of what is time 0 here
  void* normed;  // [T, B, D, 4H], w_hh h normalised, before gains; null without norm or save
  void* rstd;    // [T, B, D], by what it was multiplied for that; likewise
  void* dmore;   // [D, 3 + 6, H], gradients of peephole and norm where those are; backward
};

// Of which kind a cell's kernels are: torch.nn.LSTM's; with options; with layer norm and options.
enum class CellKind : uint8_t { plain, options, norm };

LSTM_HOST_DEVICE CellKind kind_of(const Variant* variant) {
  if (!variant) return CellKind::plain;
  return variant->norm ? CellKind::norm : CellKind::options;
}

// Whether h may be larger than 1 where w_hh meets it.
LSTM_HOST_DEVICE bool has_large_h(const Variant& variant) {
  const auto unbounded = [](Activation a) {
    return a == Activation::relu || a == Activation::identity;
  };
  return variant.h_scale || unbounded(variant.cell.output) || unbounded(variant.cell.recurrent);
}

// The reserve (gates, c) is in the compute type: double for float64, float for all others.
struct LayerForward {
  LayerShape shape;
  Others others;
  const void* x;  // [T, B, inputs * I], last dimension contiguous
  int64_t x_stride_t, x_stride_b;
  const void* const* w_ih;  // D pointers, [4H, I]; null: x is gates_x [T, B, D * 4H], compute type
  const void* const* w_hh;  // D pointers, [4H, P]
  const void* const* b_ih;  // D pointers, [4H]; null without bias
  const void* const* b_hh;  // D pointers, [4H]; null without bias
  const void* const* w_hr;  // D pointers, [P, H]; null unless projected
  const void* h0;           // [D, B, P] or null (zeros)
  const void* c0;           // [D, B, H] or null (zeros); as wide_c says
  bool wide_c;              // c0 and c_n are in the compute type, not in the shape's dtype
  const int64_t* lengths;   // [B], each in 0..T, or null (all T)
  const uint8_t* reset;     // [T, B], 0 or 1, or null (never)
  void* y;                  // [T, B, D, P]
  void* h_n;                // [D, B, P]
  void* c_n;                // [D, B, H], as wide_c says
  void* gates;              // [T, B, D, 4H], activated, or null (inference)
  void* c;                  // [T, B, D, H] or null; gates implies c
  const Variant* variant;   // null: torch.nn.LSTM's cell
};

// Gradients that come in have the outputs' types, those that go out the compute type.
struct LayerBackward {
  LayerShape shape;
  Others others;
  const void* x;  // as in LayerForward
  int64_t x_stride_t, x_stride_b;
  const void* const* w_ih;
  const void* const* w_hh;
  const void* const* w_hr;
  const void* h0;
  const void* c0;
  bool wide_c;
  const int64_t* lengths;
  const uint8_t* reset;
  const void* y;  // what the forward pass gave
  const void* gates;
  const void* c;
  const void* dy;      // [T, B, D, P] or null (zero)
  const void* dh_n;    // [D, B, P] or null
  const void* dc_n;    // [D, B, H] or null
  const void* dc;      // [T, B, D, H], gradient of the reserve's c (compute type), or null
  const void* dgates;  // [T, B, D, 4H], that of its gates, likewise
  void* dx;            // [T, B, inputs * I] or null (not wanted)
  void* dh0;           // [D, B, P] or null (not wanted)
  void* dc0;           // [D, B, H] or null
  void* dw_ih;         // [D, 4H, I]; null: no weight gradient is wanted
  void* dw_hh;         // [D, 4H, P]
  void* db;            // [D, 4H]
  void* dw_hr;         // [D, P, H] if projected
  // What the calls for the steps after and before these hand on; null if there are none. The call for
  // the first steps has all gradients of weights.
  const void*
      carry_in;     // [D, B, 4H], dgates of the steps after these, of the compute type; or null
  void* carry_out;  // the same of the first of these; or null
  void* sums;       // of weight gradients; null if none is wanted
  const Variant* variant;  // as in LayerForward
  bool sums_weights() const { return dw_hh || sums; }
};

// What lstm_cuda/recurrence.py writes out, and what its letters mean. All in the compute type. A run
// of a layer, its steps in the order of its recurrences:
struct Cells {
  int64_t T, D, B, H;
  const void* gates;     // [T, D, B, 4H], activated
  const void* c;         // [T, D, B, H]
  const void* c0;        // [D, B, H] or null (zeros)
  const uint8_t* fresh;  // [T, D, B], 0 or 1, or null (never)
};

// The gradients, by a run's cells, of what is linear in tangents and in adjoints.
struct CellGradients {
  Cells cells;
  const void* source_gates;  // [T, D, B, 4H] or null: that of the adjoints
  const void* dc;            // [T, D, B, H], the adjoints
  const void* dm;            // [T, D, B, H]
  const void* z;             // [T, D, B, 4H], the tangents
  const void* change_c;      // [T, D, B, H]
  void* dgates;              // [T, D, B, 4H]
  void* dcells;              // [T, D, B, H]
  void* dc0;                 // [D, B, H]; null without c0
};

// A sequence [T, D, B, features], of any strides but the last, which is 1.
struct Sequence {
  const void* data;
  int64_t stride_t, stride_d, stride_b;
};

// A run's tangents or, transposed, its adjoints: then z, c and m are dz, dc and dm.
struct LinearRecurrence {
  Cells cells;
  bool transposed;
  int64_t I;
  Sequence source_x;         // I features; null (zeros), or given with V and not transposed
  const void* source_z;      // [T, D, B, 4H]; each source may be null (zeros)
  const void* source_gates;  // [T, D, B, 4H]; null unless transposed
  const void* source_c;      // [T, D, B, H]
  const void* source_m;      // [T, D, B, H]
  const void* W;             // [D, 4H, H]
  const void* V;             // [D, 4H, I] or null
  void* x;                   // [T, D, B, I]; null if not wanted, or not transposed
  void* z;                   // [T, D, B, 4H]; null if not wanted, of tangents
  void* c;                   // [T, D, B, H]
  void* m;                   // [T, D, B, H]
  // Of tangents, to be made on the way, from adjoints (its z and change_c are not read); or null.
  const CellGradients* gradients;
};

// out[t, d, b] = a[t, d, b] w[d]
struct Product {
  int64_t T, D, B, m, n;
  Sequence a;  // m features
  const void*
      w;  // [D, m, n], with these strides between rows and between columns; one of them is 1
  int64_t w_stride_d, w_stride_row, w_stride_column;
  void* out;  // [T, D, B, n]
};

// out[d] = the sum over t and b of the outer products of a[t, d, b] and b[t, d, b]
struct OuterProducts {
  int64_t T, D, B, m, n;
  Sequence a, b;  // m and n features
  void* out;      // [D, m, n]
};

}  // namespace lstm_cuda
