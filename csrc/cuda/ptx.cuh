// What a kernel may use beyond plain C++. Two implementations of one contract:
//   ptx_device.cuh  nvcc: one function, one instruction
//   ptx_host.hpp    a host compiler with LSTM_EMULATE (tests/emulation): the kernel's same source
//                   runs on the CPU, where each promise below is checked
//
//   LSTM_DEVICE LSTM_KERNEL(threads[, blocks]) LSTM_PARAMETER LSTM_UNROLL LSTM_NO_UNROLL
//                                mark functions, kernels (with bounds), their parameter, loops
//   kHasClusters                 whether the architecture has clusters: a kernel of several has no body
//                                without
//   thread_index block_index block_threads grid_blocks cluster_rank    blocks, grids: one dimension
//   load<T>(p) store<T>(p, v)    one access of sizeof(T) bytes (1..16), aligned to its size
//   Shared::take<T>(n, align)    a piece of the block's dynamic shared memory
//   block_sync                   all threads of the block meet, and see what all wrote before
//   named_sync(id, threads)      the same for some whole warps; id 1..15
//   named_arrive(id, threads)    counts there without waiting
//   warp_sync(mask)              lanes meet, and see what all wrote before
//   cluster_arrive cluster_wait  the blocks of a cluster meet; cluster_sync: both
//   grid_sync                    all blocks of a cooperative launch meet
//   shuffle shuffle_xor ballot   among the lanes of a mask. No order of memory comes with them
//   ldmatrix_x4 ldmatrix_x4_trans ldmatrix_x2_trans    8x8 matrices of 16-bit elements; a lane
//                                names one 16-byte row
//   movmatrix                    transposes an 8x8 matrix of 16-bit elements across the warp
//   mma_bf16 mma_fp16 mma_tf32   d += a b; m16n8k16, for tf32 m16n8k8; sums in float32
//   cp_async16(dst, src, bytes)  16 bytes from global to shared memory, zeros past `bytes`
//   cp_async8(dst, src)          8 bytes
//   cp_async_commit              ends a group of them
//   cp_async_wait<n>             until all but the last n groups of the calling thread have landed
//   mbarrier_init(bar, n)        a barrier of n arrivals a phase, in shared memory, made once; its
//                                use comes after a block_sync (cluster_sync, if by other blocks)
//   mbarrier_arrive(bar, rank)   one arrival at block `rank`'s barrier
//   mbarrier_expect(bar, bytes)  one arrival at the own barrier, whose phase also takes `bytes`
//   mbarrier_wait(bar, parity)   until the phase of this parity (0 first) is complete. Only who
//                                holds back the next phase may wait: others could miss it and hang
//   bulk_copy(dst, src, bytes, bar)    global to shared memory, in units of 16; bar counts bytes
//   peer_shared(p, rank)         where block `rank` of the cluster has what this one has at p: for
//                                use between its first and its last cluster_sync
//   store_async(dst, v, bar, rank)     4, 8 or 16 bytes to block `rank`, where bar counts them; dst
//                                and bar are this block's own addresses
//   word_store(p, v)             a relaxed store of 1, 2 or 4 words that other blocks poll. They arrive
//                                one by one
//   word_poll4(v, p, stride, ready)    v[i] = 16 aligned bytes at p + i * stride words: all at once,
//                                then again and again those that are not ready(v[i])
//   flag_add_release flag_wait_acquire    a counter in global memory that orders other accesses
//   prefetch_l2(p)               a hint
//   dependency_wait              until the kernel launched before has ended: comes before use of
//                                what it wrote, and before overwriting what it may still read
//   dependency_release           lets the kernel launched next start; promises it nothing
//   exp2_approx reciprocal_approx tanh_approx    of the special function unit
//   round_tf32                   to ten bits of fraction, ties away from zero
//
// What makes both builds mean the same:
//  - shared memory comes from Shared::take alone, with the same calls in every thread, and no
//    pointer goes from one piece into another;
//  - no loop waits for memory by itself: the waits above are the only ones;
//  - blocks are whole warps, and their threads leave the kernel after the last barrier;
//  - kernel parameters are trivially copyable, locals trivially destructible (an emulated kernel
//    that fails is abandoned where it stands, not unwound).
//
// A wait that nothing will end traps after half a second, as an error of the launch: a mistake in a
// kernel must not hang a device. Orders of memory are as wide as their users can need (cluster for
// barriers in shared memory, gpu for flags).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

namespace lstm_cuda::ptx {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

}  // namespace lstm_cuda::ptx

#if defined(LSTM_EMULATE)
#include "ptx_host.hpp"
#else
#include "ptx_device.cuh"
#endif
