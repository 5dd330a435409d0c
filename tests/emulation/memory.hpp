// Memory that kernels can use, for programs that run under emulation and on a GPU alike.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"

namespace lstm_cuda::emulation {

[[noreturn]] inline void give_up(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(3);
}

#if !defined(LSTM_EMULATE)
inline void must(cudaError_t error) {
  if (error != cudaSuccess) give_up(cudaGetErrorString(error));
}
#endif

// Elements in device memory; NaN (-1 in integers) until written.
template <class T>
class DeviceBuffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit DeviceBuffer(std::size_t count) : count_(count) {
#if defined(LSTM_EMULATE)
    data_ = static_cast<T*>(device_alloc(bytes()));
#else
    must(cudaMalloc(&data_, bytes()));
    must(cudaMemset(data_, 0xFF, bytes()));
#endif
  }
  explicit DeviceBuffer(const std::vector<T>& values) : DeviceBuffer(values.size()) {
    copy(data_, values.data());
  }
  ~DeviceBuffer() {
#if defined(LSTM_EMULATE)
    if (!device_free(data_, bytes())) give_up("a kernel wrote past the end of a buffer");
#else
    cudaFree(data_);
#endif
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  T* data() const { return data_; }
  std::size_t bytes() const { return count_ * sizeof(T); }

  // As it is when all launches so far have ended.
  std::vector<T> values() const {
    std::vector<T> values(count_);
    copy(values.data(), data_);
    return values;
  }

 private:
  void copy(void* to, const void* from) const {
    if (count_ == 0) return;  // of nothing, there may be no pointers
#if defined(LSTM_EMULATE)
    std::memcpy(to, from, bytes());
#else
    must(cudaMemcpy(to, from, bytes(), cudaMemcpyDefault));
#endif
  }

  std::size_t count_;
  T* data_ = nullptr;
};

}  // namespace lstm_cuda::emulation
