// Any processor: 128-bit vectors, as the compiler's baseline has them (SSE2, NEON).
#include "prelude.h"

#define LSTM_CPU_ISA generic
#define LSTM_VECTOR_BYTES 16
#if defined(__aarch64__)
#define LSTM_VECTOR_REGISTERS 32
#else
#define LSTM_VECTOR_REGISTERS 16
#endif

#include "kernels.h"

namespace lstm_cuda::LSTM_CPU_ISA {

extern const CpuKernels kernels = {{
    LSTM_LAYER(double, Plain<double>),
    LSTM_LAYER(float, Plain<float>),
    LSTM_LAYER(Float16, Plain<float>),
    LSTM_LAYER(BFloat16, Plain<float>),
}};

}  // namespace lstm_cuda::LSTM_CPU_ISA
