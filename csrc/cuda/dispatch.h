// What choices of a kernel family depend on besides the problem: what was asked for, and what this
// process has seen fail. Compiled in every build.
#pragma once

#include "plan.h"

namespace lstm_cuda {

// From now on every call uses this family; "" ends that. Of a cluster or group also so many batch rows,
// and turns; 0 leaves them free.
struct Forced {
  const char* name;
  int columns, turns;
};
bool force_kernel(const Forced& forced);  // false if there is no such name
Forced forced_kernel();

// What plan_cuda is asked on this device, now.
CudaRequest cuda_request(int device, bool allow_tf32, bool backward);

// The family could not be launched on this device, and is not tried there again.
void remember_refusal(int device, Family family);

}  // namespace lstm_cuda
