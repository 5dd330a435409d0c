// What choices of a kernel family depend on besides the problem: what was asked for, and what this
// process has seen fail. Compiled in every build.
#pragma once

#include "plan.h"

namespace lstm_cuda {

// From now on every call uses this family; "" ends that. False if there is no such name.
bool force_kernel(const char* name);
const char* forced_kernel();

// What plan_cuda is asked on this device, now.
CudaRequest cuda_request(int device, bool allow_tf32, bool backward);

// The family could not be launched on this device, and is not tried there again.
void remember_refusal(int device, Family family);

}  // namespace lstm_cuda
