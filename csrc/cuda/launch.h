// Starting kernels, and what comes of it. The same call starts a kernel on a GPU or, compiled with
// LSTM_EMULATE, under the tests' emulation, so that grids and shared-memory sizes are tested too.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdio>

#if !defined(LSTM_EMULATE)
#include <cuda_runtime.h>
#endif

namespace lstm_cuda {

// Nothing below the torch side throws: what went wrong is said in words here.
struct Status {
  char message[512] = "";  // empty: all is well

  bool ok() const { return message[0] == 0; }
};

struct LaunchShape {
  const char* kernel;  // its name in messages
  unsigned blocks, threads;
  std::size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;  // all blocks must be resident together
  bool overlap = false;  // may start before its predecessor ends; the kernel then waits by itself
};

}  // namespace lstm_cuda

#if defined(LSTM_EMULATE)
#include "launch_host.hpp"
#else

namespace lstm_cuda {

using Stream = cudaStream_t;

inline Status refused(const LaunchShape& shape, cudaError_t error) {
  Status status;
  std::snprintf(
      status.message, sizeof status.message,
      "the launch of %s (%u blocks of %u threads, %zu bytes of shared memory%s) failed: %s",
      shape.kernel, shape.blocks, shape.threads, shape.shared_bytes,
      shape.cooperative ? ", cooperative" : "", cudaGetErrorString(error));
  return status;
}

// Runs kernel(params) on the stream. Safe while the stream is being captured.
template <auto kernel, class Params>
Status launch(const LaunchShape& shape, const Params& params, Stream stream) {
  if (shape.blocks == 0) return {};
  if (shape.shared_bytes > 48 * 1024) {  // more than a kernel gets without asking
    // Asked once for each kernel and device: it would cost half of a launch.
    static std::atomic<int> granted[64] = {};
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    std::atomic<int>& known = granted[device & 63];
    if (error == cudaSuccess && known < int(shape.shared_bytes)) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(shape.shared_bytes));
      if (error == cudaSuccess) known = int(shape.shared_bytes);
    }
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      return refused(shape, error);
    }
  }
  cudaLaunchAttribute attributes[3];
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (shape.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();  // reported here: it must not surface at somebody else's next call
  return refused(shape, error);
}

}  // namespace lstm_cuda

#endif
