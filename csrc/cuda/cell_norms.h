// What layer norm's backward pass needs of c, where a step's kernel has too little time for it.
#pragma once

#include "families.h"

namespace lstm_cuda {

// to[T, B, D, 2], compute: of each row of c before zoneout the mean, and what c less that is
// multiplied by to be normal; untouched past a row's length. gates [T, B, D, 4H] and c [T, B, D, H]
// as the forward pass left them.
Status cell_norms(const LayerShape& shape, const Variant& variant, const void* gates, const void* c,
                  const void* c0, bool wide_c, const int64_t* lengths, const uint8_t* reset,
                  void* to, Stream stream);

}  // namespace lstm_cuda
