// Stacks, and the switch from one to another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(LSTM_EMULATE_UCONTEXT)
#include <ucontext.h>
#define LSTM_USE_UCONTEXT 1
#endif

namespace lstm_cuda::emulation {

inline constexpr std::size_t kPage = 4096, kStackBytes = 256 << 10;

struct Context {
  char* stack = nullptr;  // its lowest byte
  std::size_t stack_bytes = kStackBytes;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's fiber
#if defined(LSTM_USE_UCONTEXT)
  ucontext_t machine{};
#else
  void* stack_pointer = nullptr;
#endif
};

// The first switch to the context calls `entry`, which never returns.
void prepare(Context& context, void (*entry)());

// Goes on with `to`, until something switches back to `from`. `final`: nothing will.
void switch_context(Context& from, Context& to, bool final = false);

// The first thing that `entry` does. `launcher`: the context whose stack only the sanitizer knows.
void enter_context(Context& launcher);

// mprotect, or the end: the rest would not find what it should.
void protect(void* p, std::size_t bytes, int protection);

// Memory that outlives a launch, so that thousands of small ones need not map and unmap theirs.
// Under ThreadSanitizer it is mapped anew each time, which makes it forget who used it before.
class Region {
 public:
  char* take(std::size_t bytes, int protection);  // ends what was taken before
  bool fresh() const { return fresh_; }           // whether that mapped it, with that protection
  std::size_t bytes() const { return bytes_; }
  char* base() const { return base_; }

 private:
  char* base_ = nullptr;
  std::size_t bytes_ = 0;
  bool fresh_ = false;
};

}  // namespace lstm_cuda::emulation
