// Bump allocation in one block that the caller provides; with a null block it only counts.
#pragma once

#include <cstdint>

namespace lstm_cuda {

class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

  template <class U>
  U* take(int64_t count) {
    U* p = block_ ? reinterpret_cast<U*>(block_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(U)) + 63) / 64 * 64;
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

}  // namespace lstm_cuda
