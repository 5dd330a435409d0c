// x86-64 with avx512_bf16.
#include "prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif

#define LSTM_CPU_ISA avx512_bf16
#define LSTM_VECTOR_BYTES 64
#define LSTM_VECTOR_REGISTERS 32
#define LSTM_CPU_BFLOAT16_PAIRS

#include "kernels.h"

namespace lstm_cuda::LSTM_CPU_ISA {

extern const CpuKernels kernels = {{
    LSTM_LAYER(double, Plain<double>),
    LSTM_LAYER(float, Plain<float>),
    LSTM_LAYER(Float16, Plain<float>),
    LSTM_LAYER(BFloat16, Pairs),
}};

}  // namespace lstm_cuda::LSTM_CPU_ISA

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
