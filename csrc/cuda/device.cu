#include "device.h"

#include <array>
#include <mutex>

namespace lstm_cuda {

Status cuda_device(int index, CudaDevice& device) {
  static std::mutex mutex;
  static std::array<CudaDevice, 64> known{};
  Status status;
  if (index < 0 || index >= int(known.size())) {
    std::snprintf(status.message, sizeof status.message, "there is no CUDA device %d", index);
    return status;
  }
  const std::lock_guard lock(mutex);
  CudaDevice& entry = known[size_t(index)];
  if (entry.architecture == 0) {
    int major = 0, minor = 0, multiprocessors = 0, shared = 0;
    const std::pair<cudaDeviceAttr, int*> wanted[] = {
        {cudaDevAttrComputeCapabilityMajor, &major},
        {cudaDevAttrComputeCapabilityMinor, &minor},
        {cudaDevAttrMultiProcessorCount, &multiprocessors},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared}};
    for (const auto& [attribute, value] : wanted) {
      const cudaError_t error = cudaDeviceGetAttribute(value, attribute, index);
      if (error == cudaSuccess) continue;
      std::snprintf(status.message, sizeof status.message,
                    "CUDA device %d does not answer about itself: %s", index,
                    cudaGetErrorString(error));
      (void)cudaGetLastError();  // reported here
      return status;
    }
    entry = {10 * major + minor, multiprocessors, shared};
  }
  device = entry;
  return status;
}

bool capturing(Stream stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &capture) == cudaSuccess)
    return capture != cudaStreamCaptureStatusNone;
  // The default stream cannot say, because another one is being captured, which must not wait for it.
  (void)cudaGetLastError();
  return true;
}

}  // namespace lstm_cuda
