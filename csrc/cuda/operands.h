// Operands of the large products that torch multiplies, where they are not in memory already.
#pragma once

#include "families.h"

namespace lstm_cuda {

// to[D, 4H] = b_ih + b_hh.
Status add_biases(const LayerShape& shape, const void* const* b_ih, const void* const* b_hh,
                  void* to, Stream stream);

// to[T, B, I] = x with any strides, and 0 past a row's length, whatever stands there.
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

}  // namespace lstm_cuda
