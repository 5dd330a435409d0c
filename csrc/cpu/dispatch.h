// The entry points for the CPU, one table for each instruction set, and which of them this machine
// runs.
#pragma once

#include "../plan.h"
#include "../recurrence.h"
#include "parallel.h"

namespace lstm_cuda {

struct CpuKernels {
  // With a null block nothing is run; the return value is the scratch memory that is needed, in
  // bytes.
  struct Entry {
    int64_t (*forward)(const LayerForward&, const CpuPlan&, const Parallel&, void* block);
    int64_t (*backward)(const LayerBackward&, const CpuPlan&, const Parallel&, void* block);
    // In the dtype's compute type.
    int64_t (*changes)(const LinearRecurrence&, const Parallel&, void* block);
    int64_t (*cell_gradients)(const CellGradients&, const Parallel&, void* block);
    int64_t (*product)(const Product&, const Parallel&, void* block);
    int64_t (*outer_products)(const OuterProducts&, const Parallel&, void* block);
  };
  Entry by_dtype[4];  // in the order of Dtype

  const Entry& operator[](Dtype dtype) const { return by_dtype[int(dtype)]; }
};

#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx512_bf16 {
extern const CpuKernels kernels;
}
#endif
namespace generic {
extern const CpuKernels kernels;
}

const CpuKernels& cpu_kernels();

// Names of what is compiled in and runs here, from the narrowest to the widest.
int cpu_capability_count();
const char* cpu_capability_name(int index);
const char* cpu_capability();

// Uses nothing wider than `name`; false if there is no such name.
bool set_cpu_capability(const char* name);

}  // namespace lstm_cuda
