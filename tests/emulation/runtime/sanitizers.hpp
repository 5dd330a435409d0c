// What the runtime tells AddressSanitizer and ThreadSanitizer. Their functions are weak here: null
// in a program without them.
//
// To ThreadSanitizer each fiber is a thread of its own, and a switch from one to another orders
// nothing. Order comes from clocks alone: what a thread did before release(clock) happens before
// what another does after acquire(clock). The runtime makes such an edge exactly where the GPU
// orders memory: at barriers, at mbarriers, at release and acquire, and where an asynchronous copy
// completes; not at a shuffle, a ballot or an mma.
#pragma once

#include <cstddef>

extern "C" {
#define LSTM_WEAK __attribute__((weak))
LSTM_WEAK void __sanitizer_start_switch_fiber(void**, const void*, std::size_t);
LSTM_WEAK void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*);
LSTM_WEAK void __asan_poison_memory_region(const volatile void*, std::size_t);
LSTM_WEAK void __asan_unpoison_memory_region(const volatile void*, std::size_t);
LSTM_WEAK void* __asan_region_is_poisoned(void*, std::size_t);
LSTM_WEAK void* __tsan_get_current_fiber();
LSTM_WEAK void* __tsan_create_fiber(unsigned);
LSTM_WEAK void __tsan_destroy_fiber(void*);
LSTM_WEAK void __tsan_switch_to_fiber(void*, unsigned);
LSTM_WEAK void __tsan_set_fiber_name(void*, const char*);
LSTM_WEAK void __tsan_acquire(void*);
LSTM_WEAK void __tsan_release(void*);
LSTM_WEAK void __tsan_write_range(void*, std::size_t);
LSTM_WEAK void __tsan_read4_pc(void*, void*);
LSTM_WEAK void __tsan_write4_pc(void*, void*);
LSTM_WEAK void AnnotateIgnoreReadsBegin(const char*, int);
LSTM_WEAK void AnnotateIgnoreReadsEnd(const char*, int);
LSTM_WEAK void AnnotateIgnoreWritesBegin(const char*, int);
LSTM_WEAK void AnnotateIgnoreWritesEnd(const char*, int);
#undef LSTM_WEAK
}

namespace lstm_cuda::emulation {

inline bool under_asan() { return __asan_region_is_poisoned; }
inline bool under_tsan() { return __tsan_create_fiber; }

// Its address is all that counts. Clocks lie in memory that is allocated for one launch or one
// wave: freeing it makes ThreadSanitizer forget them, so that no edge leads from one wave to the
// next.
struct Clock {
  char unused = 0;
};
inline void release(const void* clock) {
  if (__tsan_release) __tsan_release(const_cast<void*>(clock));
}
inline void acquire(const void* clock) {
  if (__tsan_acquire) __tsan_acquire(const_cast<void*>(clock));
}

void* create_fiber();  // to ThreadSanitizer: __tsan_create_fiber(0), but quicker

// To ThreadSanitizer we are now that fiber; no edge.
inline void impersonate(void* fiber) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber, 1);
}

// While one lives, ThreadSanitizer looks away: the runtime allocates and copies for itself.
class Quiet {
 public:
  Quiet() {
    if (AnnotateIgnoreWritesBegin) begin(), ++open_;
  }
  ~Quiet() {
    if (AnnotateIgnoreWritesBegin) end(), --open_;
  }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;

  // A fiber that fails never leaves its scopes.
  static void end_all() {
    for (; open_ > 0; --open_) end();
  }

 private:
  friend class QuietLaunch;
  static void begin() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  static void end() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
  static inline int open_ = 0;  // in the running fiber: no scope outlives a switch
};

// The same for the thread that launches, whose scope spans all switches.
class QuietLaunch {
 public:
  QuietLaunch() {
    if (AnnotateIgnoreWritesBegin) Quiet::begin();
  }
  ~QuietLaunch() {
    if (AnnotateIgnoreWritesBegin) Quiet::end();
  }
  QuietLaunch(const QuietLaunch&) = delete;
  QuietLaunch& operator=(const QuietLaunch&) = delete;
};

}  // namespace lstm_cuda::emulation
