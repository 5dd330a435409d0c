// The device a call runs on.
#pragma once

#include "launch.h"
#include "plan.h"

namespace lstm_cuda {

// Properties that plans depend on; asked of the driver once for each device.
Status cuda_device(int index, CudaDevice& device);

}  // namespace lstm_cuda
