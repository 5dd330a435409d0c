// The device a call runs on.
#pragma once

#include "launch.h"
#include "plan.h"

namespace lstm_cuda {

// Properties that plans depend on; asked of the driver once for each device.
Status cuda_device(int index, CudaDevice& device);

// True where work put on the stream is not run but recorded, for a CUDA graph.
bool capturing(Stream stream);

}  // namespace lstm_cuda
