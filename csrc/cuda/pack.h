// Weights for families rec_cluster and rec_group: w_hh as mma fragments (resident.h), rounded to what
// products read.
//
// Where operands are float16 and weights are not (TF32 and float32), rows of weights are scaled
// (scale.cuh), and sums are multiplied by `unscale`, the inverse. For float32 a weight w is two parts,
// high = float16(w) and low = float16((w - high) 2^11), zero where w is not finite.
#pragma once

#include "families.h"

namespace lstm_cuda {

constexpr float kLowPart = 2048.f;  // the low part of a float32 operand is multiplied by this

// Bytes of packed weights and their scales.
int64_t packed_bytes(const LayerShape& shape, const CudaPlan& plan, bool backward);

// Where in these bytes is what.
PackedWeights packed_weights(const LayerShape& shape, const CudaPlan& plan, bool backward,
                             const void* packed);

// One launch: packs w_hh (D pointers, each [4H, H] of the shape's dtype) and fills `words` with zeros
// (null: nothing; a multiple of 16 bytes).
Status pack_weights(const LayerShape& shape, const CudaPlan& plan, bool backward,
                    const void* const* w_hh, void* packed, void* words, int64_t word_bytes,
                    Stream stream);

}  // namespace lstm_cuda
