// Operands of the large products that torch multiplies, where they are not in memory already.
#pragma once

#include "families.h"

namespace lstm_cuda {

// to[D, 4H] = b_ih + b_hh.
Status add_biases(const LayerShape& shape, const void* const* b_ih, const void* const* b_hh,
                  void* to, Stream stream);

// to[T, B, inputs * I] = x with any strides, and 0 past a row's length, whatever stands there.
Status copy_input(const LayerShape& shape, const void* x, int64_t x_stride_t, int64_t x_stride_b,
                  const int64_t* lengths, void* to, Stream stream);

// to[T, B, D, P] = the h that each step began with: y of the step before, h0 or zeros; 0 past a
// row's length.
Status copy_previous_h(const LayerShape& shape, const void* y, const void* h0,
                       const int64_t* lengths, const uint8_t* reset, void* to, Stream stream);

// to[T, B, D, H] = o tanh(c), the unprojected output; 0 past a row's length. gates [T, B, D, 4H] and
// to are in the layer's dtype, c [T, B, D, H] in the compute type.
Status cell_outputs(const LayerShape& shape, const void* gates, const void* c,
                    const int64_t* lengths, void* to, Stream stream);

// What a layer with a projection needs around a recurrence without one (ops_projection.h).

// to[D, B, P] = y [T, B, D, P] of each row's last step; h0 (null: zeros) where a row has no steps.
Status last_outputs(const LayerShape& shape, const void* y, const void* h0, const int64_t* lengths,
                    void* to, Stream stream);

// to[T, B, D, P] = the whole gradient of h: dy (null: zeros), and what comes back from the step after,
// `product` = dgates w_hh [T, B, D, P] of that, if the state crosses into it, or of a row's last step
// dh_n (null: zeros); 0 past a row's length.
Status output_gradients(const LayerShape& shape, const void* dy, const void* dh_n,
                        const void* product, const int64_t* lengths, const uint8_t* reset, void* to,
                        Stream stream);

// Products of the initial state, which families rec_cluster and rec_group leave to others.

// gates[T, B, D, 4H] += product [D, B, 4H], in each row's first step, unless no state crosses into that.
Status add_initial_product(const LayerShape& shape, const void* product, const int64_t* lengths,
                           const uint8_t* reset, void* gates, Stream stream);

// to[D, B, 4H] = dgates [T, B, D, 4H] of each row's first step, or zeros where no state crosses into
// that, or there is none.
Status first_dgates(const LayerShape& shape, const void* dgates, const int64_t* lengths,
                    const uint8_t* reset, void* to, Stream stream);

// dh0[D, B, P], where there is dgates w_hh of each row's first step: times h_scale (null: 1), and what
// zoneout `kept` for it besides (null: nothing), both [D, B, P] in the compute type. Rows that no product
// reaches have dh_n (null: zeros) where there are no steps, zeros where no state crosses into the first.
Status finish_dh0(const LayerShape& shape, const void* dh_n, const int64_t* lengths,
                  const uint8_t* reset, const void* h_scale, const void* kept, void* dh0,
                  Stream stream);

}  // namespace lstm_cuda
