// The recurrence as the CUDA kernel families see it, and their entry points. Large products are
// not theirs: gates_x comes in, dgates goes out.
//
// All pointers but the lists of weights are to device memory. "Element" is the tensors' dtype,
// "compute" is double for float64 and float for all others.
#pragma once

#include "../recurrence.h"
#include "launch.h"
#include "plan.h"

namespace lstm_cuda {

struct RecurrenceForward {
  LayerShape shape;
  const void* const* w_hh;  // D pointers, each [4H, P], Element
  const void* const* w_hr;  // D pointers, each [P, H], Element; null unless projected
  const void* h0;           // [D, B, P] Element, or null (zeros)
  const void* c0;           // [D, B, H] Element (wide_c: compute), or null (zeros)
  const int64_t* lengths;   // [B] or null (all T); values outside 0..T are clamped
  const uint8_t* reset;     // [T, B], 0 or 1, or null (never)
  void* gates;              // [T, B, D, 4H] Element. In: gates_x, biases included; out: activated
                            // gates if `save` (then c is not null), otherwise only read
  bool save;
  bool wide_c;  // c0 and c_n are compute, so that a sequence run in chunks of time loses nothing
  void* y;      // [T, B, D, P] Element; zeros past a row's length
  void* h_n;    // [D, B, P] Element
  void* c_n;    // [D, B, H] Element (wide_c: compute)
  void* c;      // [T, B, D, H] compute, or null; zeros past a row's length
  // Of other cells:
  const Variant* variant;  // null: torch.nn.LSTM's; normed and rstd are written if `save`
  const void* gates_x;    // [T, B, D, 4H] compute, with norm: nothing is read from gates; else null
  const void* h_operand;  // h0 times h_scale, Element; null without one of them. For rec_step
  const void* h0_product;  // [D, B, 4H] Element, w_hh h0, with norm and h0. For rec_cluster
};

struct RecurrenceBackward {
  LayerShape shape;
  const void* const* w_hh;
  const void* const* w_hr;
  const void* c0;  // as in forward
  const int64_t* lengths;
  const uint8_t* reset;
  const void* gates;  // [T, B, D, 4H] Element, activated, as forward left them
  const void* c;      // [T, B, D, H] compute
  const void* dy;     // [T, B, D, P] Element, or null (zero)
  const void* dh_n;   // [D, B, P] Element, or null
  const void* dc_n;   // [D, B, H] Element (wide_c: compute), or null
  const void* dc;     // [T, B, D, H] compute, gradient of c, or null
  void* dgates;       // [T, B, D, 4H] Element, gradient of gates_x; zeros past a row's length
  void* dh;           // [T, B, D, P] Element, whole gradient of h, zeros past a row's length;
                      // null unless projected
  void* dh0;          // [D, B, P] Element, or null (not wanted)
  void* dc0;          // [D, B, H] Element (wide_c: compute), or null
  bool wide_c;        // as in forward; dc_n and dc0 too
  // Of other cells:
  const Variant* variant;  // as in forward; dmore: [D, B, 3 + 6, H], where each batch row adds its
                           // own, or null. With norm dgates is the gradient of w_hh h
  void* dgates_x;          // [T, B, D, 4H] compute, that of gates_x; or null
  void* m;  // [T, B, D, H] Element, the unprojected output, zeros past a row's length; or null
  const void*
      c_norms;    // [T, B, D, 2] compute, with norm: of c before zoneout, the mean and what it
                  // is multiplied by. For rec_cta and rec_cluster
  void* dh_kept;  // [D, B, H] compute, what zoneout of h leaves to h0; or null. For rec_cluster
};

// The weights of families rec_cluster and rec_group, as pack.h makes them.
struct PackedWeights {
  const void* fragments;  // see resident.h
  const float* unscale;   // forward: [D][4][padded H], what turns a row's sums into true ones;
                          // backward: [D][blocks][padded H]. All 1 for float16 and bfloat16
};

// Each returns as soon as the work is on the stream. T and B are at least 1. `scratch` is device
// memory of at least the size that the plan names (uninitialised, aligned to 256 bytes).
int64_t rec_step_scratch(const LayerShape& shape, const CudaPlan& plan, const Variant* variant,
                         bool backward);
Status rec_step_forward(const RecurrenceForward& p, const CudaPlan& plan, void* scratch,
                        Stream stream);
Status rec_step_backward(const RecurrenceBackward& p, const CudaPlan& plan, void* scratch,
                         Stream stream);

// Takes no scratch memory.
Status rec_cta_forward(const RecurrenceForward& p, const CudaPlan& plan, Stream stream);
Status rec_cta_backward(const RecurrenceBackward& p, const CudaPlan& plan, Stream stream);

// The same of other cells.
Status variant_cta_forward(const RecurrenceForward& p, const CudaPlan& plan, Stream stream);
Status variant_cta_backward(const RecurrenceBackward& p, const CudaPlan& plan, Stream stream);

// No projection. Products of the initial state are not theirs: forward finds h0 w_hh^T in the
// gates_x of each row's first step, unless that is fresh (h0 itself is needed for h_n); backward
// leaves dh0 alone. See operands.h.
Status rec_cluster_forward(const RecurrenceForward& p, const CudaPlan& plan,
                           const PackedWeights& weights, Stream stream);
Status rec_cluster_backward(const RecurrenceBackward& p, const CudaPlan& plan,
                            const PackedWeights& weights, Stream stream);

// The same of other cells. With norm, forward finds w_hh h0 in h0_product.
Status variant_cluster_forward(const RecurrenceForward& p, const CudaPlan& plan,
                               const PackedWeights& weights, Stream stream);
Status variant_cluster_backward(const RecurrenceBackward& p, const CudaPlan& plan,
                                const PackedWeights& weights, Stream stream);

// As rec_cluster. `words` is memory of rec_group_words bytes, zeroed on the stream before.
int64_t rec_group_words(const LayerShape& shape, const CudaPlan& plan, bool backward);
Status rec_group_forward(const RecurrenceForward& p, const CudaPlan& plan,
                         const PackedWeights& weights, void* words, Stream stream);
Status rec_group_backward(const RecurrenceBackward& p, const CudaPlan& plan,
                          const PackedWeights& weights, void* words, Stream stream);

}  // namespace lstm_cuda
