// Denormal numbers are taken as zero inside the kernels.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

// Gradients decay below the least normal number on long sequences, where every operation on them
// would take a hundred times as long. They are taken as zero inside the kernels; the caller's mode
// is restored.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t(1) << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
