// How g++'s ThreadSanitizer makes a thread: it maps 790 KB for the state, of which a fiber of ours needs
// little, and writes zeros where only zeros are. Page faults would take most of a program's time.
// build.py links the runtime's mmap and memset to those below, which leave such memory alone.
#include <cstdint>

#include "sanitizers.hpp"

extern "C" {
using Mmap = std::uintptr_t(void*, std::uintptr_t, int, int, int, unsigned long long);
using Memset = void*(void*, int, std::uintptr_t);
#define LSTM_MMAP(prefix) prefix##_ZN11__sanitizer13internal_mmapEPvmiiiy
#define LSTM_MEMSET(prefix) prefix##_ZN11__sanitizer15internal_memsetEPvim
__attribute__((weak)) Mmap LSTM_MMAP(__real_);
__attribute__((weak)) Memset LSTM_MEMSET(__real_);
Mmap LSTM_MMAP(__wrap_);
Memset LSTM_MEMSET(__wrap_);
}

namespace {

constexpr std::uintptr_t kLarge = 64 << 10;
constinit thread_local bool making = false;                          // a thread
constinit thread_local std::uintptr_t mapped = 0, mapped_bytes = 0;  // for it, last

}  // namespace

std::uintptr_t LSTM_MMAP(__wrap_)(void* at, std::uintptr_t bytes, int protection, int flags, int fd,
                                  unsigned long long offset) {
  const std::uintptr_t start = LSTM_MMAP(__real_)(at, bytes, protection, flags, fd, offset);
  if (making && !at) mapped = start, mapped_bytes = bytes;
  return start;
}

// It zeroes all of the state, then again the large arrays in it, before it uses them.
void* LSTM_MEMSET(__wrap_)(void* to, int value, std::uintptr_t bytes) {
  const auto start = reinterpret_cast<std::uintptr_t>(to);
  const bool in_new_memory = start >= mapped && start + bytes <= mapped + mapped_bytes;
  if (making && value == 0 && bytes >= kLarge && in_new_memory) return to;
  return LSTM_MEMSET(__real_)(to, value, bytes);
}

namespace lstm_cuda::emulation {

void* create_fiber() {
  making = true, mapped_bytes = 0;
  void* fiber = __tsan_create_fiber(0);
  making = false;
  return fiber;
}

}  // namespace lstm_cuda::emulation
