// Starting kernels, and what comes of it. The same call starts a kernel on a GPU or, compiled with
// LSTM_EMULATE, under the tests' emulation, so that grids and shared-memory sizes are tested too.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdio>

#if !defined(LSTM_EMULATE)
#include <cuda_runtime.h>

#include <mutex>
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
  unsigned cluster = 1;      // blocks that run together; above 8 not every device can
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
  char cluster[32] = "";
  if (shape.cluster > 1)
    std::snprintf(cluster, sizeof cluster, " in clusters of %u", shape.cluster);
  Status status;
  std::snprintf(
      status.message, sizeof status.message,
      "the launch of %s (%u blocks of %u threads%s, %zu bytes of shared memory%s) failed: %s",
      shape.kernel, shape.blocks, shape.threads, cluster, shape.shared_bytes,
      shape.cooperative ? ", cooperative" : "", cudaGetErrorString(error));
  return status;
}

// Lets the kernel have as much of something as `value`, where the driver must be asked. It is asked
// once for each kernel and device: that costs half of a launch.
template <auto kernel, cudaFuncAttribute attribute>
cudaError_t grant(int value) {
  static std::atomic<int> granted[64] = {};
  static std::mutex mutex;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  std::atomic<int>& known = granted[device & 63];
  if (error != cudaSuccess || known >= value) return error;
  const std::lock_guard lock(mutex);  // nobody may lower what another thread has just been granted
  if (known >= value) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, attribute, value);
  if (error == cudaSuccess) known = value;
  return error;
}

// Runs kernel(params) on the stream. Safe while the stream is being captured.
template <auto kernel, class Params>
Status launch(const LaunchShape& shape, const Params& params, Stream stream) {
  if (shape.blocks == 0) return {};
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > 48 * 1024)
    error = grant<kernel, cudaFuncAttributeMaxDynamicSharedMemorySize>(int(shape.shared_bytes));
  if (error == cudaSuccess && shape.cluster > 8)
    error = grant<kernel, cudaFuncAttributeNonPortableClusterSizeAllowed>(1);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // as below
    return refused(shape, error);
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
  error = cudaLaunchKernelEx(&config, kernel, params);
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();  // reported here: it must not surface at somebody else's next call
  return refused(shape, error);
}

}  // namespace lstm_cuda

#endif
