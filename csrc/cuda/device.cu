#include "device.h"

#include <array>
#include <map>
#include <mutex>
#include <utility>

namespace lstm_cuda {

// The stream beside another, and the events with which each waits for the other.
struct Beside {
  cudaStream_t stream;
  cudaEvent_t forked, joined;
};

namespace {

// Nothing of it is left if that fails.
bool make(Beside& beside) {
  beside = {};
  if (cudaStreamCreateWithFlags(&beside.stream, cudaStreamNonBlocking) == cudaSuccess &&
      cudaEventCreateWithFlags(&beside.forked, cudaEventDisableTiming) == cudaSuccess &&
      cudaEventCreateWithFlags(&beside.joined, cudaEventDisableTiming) == cudaSuccess)
    return true;
  if (beside.forked) (void)cudaEventDestroy(beside.forked);
  if (beside.stream) (void)cudaStreamDestroy(beside.stream);
  (void)cudaGetLastError();
  return false;
}

// Each stream has its own, made once and kept: a few, for torch's streams are a few. So nothing waits
// for work of a third stream, and the one is captured only with the other. Threads that share a stream
// may share what is beside it: an event that another thread records once more stands for more, not
// less, of the same stream. (Not so for the one handle that is another stream in each thread.)
const Beside* beside_of(int device, Stream stream) {
  static std::mutex mutex;
  static std::map<std::pair<int, Stream>, Beside> all;
  if (stream == cudaStreamPerThread) return nullptr;
  const std::lock_guard lock(mutex);
  const auto found = all.find({device, stream});
  if (found != all.end()) return &found->second;
  // Making them is nothing that a capture would have to record.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  Beside made;
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  const bool good = make(made);
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  return good ? &all.emplace(std::pair(device, stream), made).first->second : nullptr;
}

}  // namespace

Fork::Fork(int device, Stream from, bool wanted) : from_(from) {
  const Beside* const found = wanted ? beside_of(device, from) : nullptr;
  if (!found) return;
  if (cudaEventRecord(found->forked, from) == cudaSuccess &&
      cudaStreamWaitEvent(found->stream, found->forked, 0) == cudaSuccess)
    beside_ = found;
  else
    (void)cudaGetLastError();  // then nothing is put there
}

Stream Fork::stream() const { return beside_ ? beside_->stream : from_; }

Status Fork::join() {
  Status status;
  const Beside* const forked = std::exchange(beside_, nullptr);
  if (!forked) return status;
  cudaError_t error = cudaEventRecord(forked->joined, forked->stream);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(from_, forked->joined, 0);
  if (error == cudaSuccess) return status;
  (void)cudaGetLastError();  // reported here
  std::snprintf(status.message, sizeof status.message, "two streams could not be joined: %s",
                cudaGetErrorString(error));
  return status;
}

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
