// Whether the layers of a stack run side by side, each one chunk of time behind the layer below.
// A pure function, compiled in every build.
#pragma once

#include "plan.h"

namespace lstm_cuda {

// Into how many chunks of time a stack of equal layers is cut; 1: into none, layers run one after the
// other. `shape` is one layer's.
int wavefront_chunks(int layers, const LayerShape& shape, const CudaRequest& request,
                     const CudaDevice& device);

}  // namespace lstm_cuda
