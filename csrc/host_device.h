// For the few functions that the CPU path, the CUDA kernels and their emulation share.
#pragma once

#if defined(__CUDACC__)
#define LSTM_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: a copy left over from a file compiled for a wider instruction set must never be
// linked elsewhere.
#define LSTM_HOST_DEVICE inline __attribute__((always_inline))
#endif
