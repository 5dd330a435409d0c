// ptx.cuh on a GPU: one function, one instruction wherever possible.
//
// Clusters, mbarriers that count bytes, st.async and bulk copies need sm_90. A function that no kernel
// calls is not assembled; kernels that call these ask kHasClusters.
#pragma once

#include <cooperative_groups.h>

#define LSTM_DEVICE __device__ __forceinline__
#define LSTM_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define LSTM_UNROLL _Pragma("unroll")
#define LSTM_NO_UNROLL _Pragma("unroll 1")
// A kernel that takes the address of its parameters would else copy them to local memory.
#define LSTM_PARAMETER const __grid_constant__

namespace lstm_cuda::ptx {

#if defined(__CUDA_ARCH__)
inline constexpr bool kHasClusters = __CUDA_ARCH__ >= 900;
#else
inline constexpr bool kHasClusters = true;  // what the host is told makes no difference
#endif

LSTM_DEVICE unsigned thread_index() { return threadIdx.x; }
LSTM_DEVICE unsigned block_index() { return blockIdx.x; }
LSTM_DEVICE unsigned block_threads() { return blockDim.x; }
LSTM_DEVICE unsigned grid_blocks() { return gridDim.x; }
LSTM_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

template <class T>
LSTM_DEVICE T load(const void* p) {
  static_assert(sizeof(T) <= 16);
  return *static_cast<const T*>(p);
}
template <class T>
LSTM_DEVICE void store(void* p, T v) {
  static_assert(sizeof(T) <= 16);
  *static_cast<T*>(p) = v;
}

LSTM_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

class Shared {
 public:
  template <class T>
  LSTM_DEVICE T* take(std::size_t count, std::size_t align = alignof(T)) {
    extern __shared__ __align__(1024) std::byte dynamic_shared[];
    used_ = (used_ + align - 1) / align * align;
    T* p = reinterpret_cast<T*>(dynamic_shared + used_);
    used_ += count * sizeof(T);
    return p;
  }

 private:
  std::size_t used_ = 0;
};

// ---- barriers ----

LSTM_DEVICE void block_sync() { __syncthreads(); }
LSTM_DEVICE void named_sync(unsigned id, unsigned threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
LSTM_DEVICE void named_arrive(unsigned id, unsigned threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
LSTM_DEVICE void warp_sync(unsigned mask = kAllLanes) { __syncwarp(mask); }
LSTM_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
LSTM_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
LSTM_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
LSTM_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

// ---- lanes of a warp ----

template <class T>
LSTM_DEVICE T shuffle(T v, unsigned lane, unsigned mask = kAllLanes) {
  return __shfl_sync(mask, v, lane);
}
template <class T>
LSTM_DEVICE T shuffle_xor(T v, unsigned lanes, unsigned mask = kAllLanes) {
  return __shfl_xor_sync(mask, v, lanes);
}
LSTM_DEVICE unsigned ballot(bool p, unsigned mask = kAllLanes) { return __ballot_sync(mask, p); }

LSTM_DEVICE void ldmatrix_x4(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
LSTM_DEVICE void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
LSTM_DEVICE void ldmatrix_x2_trans(std::uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
LSTM_DEVICE std::uint32_t movmatrix(std::uint32_t v) {
  std::uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

LSTM_DEVICE void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LSTM_DEVICE void mma_fp16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LSTM_DEVICE void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- asynchronous copies ----

LSTM_DEVICE void cp_async16(void* dst, const void* src, unsigned source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
               "r"(source_bytes)
               : "memory");
}
LSTM_DEVICE void cp_async8(void* dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(dst)), "l"(src)
               : "memory");
}
LSTM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <unsigned groups_left>
LSTM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

LSTM_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- waits ----

// No wait of a correct kernel comes near half a second, not even between time slices of a shared
// device; one that has waited so long would wait for ever.
LSTM_DEVICE void trap_if_hopeless(long long since) {
  if (clock64() - since > (1ll << 30)) __trap();
}

LSTM_DEVICE void mbarrier_init(std::uint64_t* bar, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // asynchronous copies see it, too
}
LSTM_DEVICE void mbarrier_arrive(std::uint64_t* bar, unsigned rank) {
  asm volatile(
      "{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a]; }" ::"r"(shared_address(bar)),
      "r"(rank)
      : "memory");
}
LSTM_DEVICE void mbarrier_expect(std::uint64_t* bar, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(bar)),
               "r"(bytes)
               : "memory");
}
LSTM_DEVICE bool mbarrier_complete(std::uint64_t* bar, unsigned parity) {
  unsigned complete;
  asm volatile(
      "{ .reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p; }"
      : "=r"(complete)
      : "r"(shared_address(bar)), "r"(parity)
      : "memory");
  return complete != 0;
}
LSTM_DEVICE void mbarrier_wait(std::uint64_t* bar, unsigned parity) {
  if (mbarrier_complete(bar, parity)) return;
  const long long start = clock64();
  while (!mbarrier_complete(bar, parity)) trap_if_hopeless(start);
}

LSTM_DEVICE void bulk_copy(void* dst, const void* src, unsigned bytes, std::uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(dst)),
      "l"(src), "r"(bytes), "r"(shared_address(bar))
      : "memory");
}

// The same place in block `rank`'s shared memory.
LSTM_DEVICE std::uint32_t cluster_address(const void* p, unsigned rank) {
  std::uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared_address(p)), "r"(rank));
  return mapped;
}
LSTM_DEVICE void store_async(std::uint32_t* dst, std::uint32_t v, std::uint64_t* bar,
                             unsigned rank) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   cluster_address(dst, rank)),
               "r"(v), "r"(cluster_address(bar, rank))
               : "memory");
}
LSTM_DEVICE void store_async(uint2* dst, uint2 v, std::uint64_t* bar, unsigned rank) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1,%2}, [%3];" ::"r"(
          cluster_address(dst, rank)),
      "r"(v.x), "r"(v.y), "r"(cluster_address(bar, rank))
      : "memory");
}
LSTM_DEVICE void store_async(uint4* dst, uint4 v, std::uint64_t* bar, unsigned rank) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1,%2,%3,%4}, [%5];" ::
          "r"(cluster_address(dst, rank)),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(cluster_address(bar, rank))
      : "memory");
}
template <class T>
LSTM_DEVICE T* peer_shared(T* p, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(p, rank));
}

LSTM_DEVICE void word_store(std::uint32_t* p, std::uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
LSTM_DEVICE void word_store(std::uint32_t* p, uint2 v) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v.x), "r"(v.y)
               : "memory");
}
LSTM_DEVICE void word_store(std::uint32_t* p, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
LSTM_DEVICE uint4 word_load4(const std::uint32_t* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
// One round trip loads all that is there: no load waits for another's answer.
template <unsigned n, class Ready>
LSTM_DEVICE void word_poll4(uint4 (&v)[n], const std::uint32_t* p, unsigned stride, Ready ready) {
  LSTM_UNROLL
  for (unsigned i = 0; i < n; ++i) v[i] = word_load4(p + std::size_t{i} * stride);
  const auto load_again = [&] {
    bool any = false;
    LSTM_UNROLL
    for (unsigned i = 0; i < n; ++i)
      if (!ready(v[i])) {
        v[i] = word_load4(p + std::size_t{i} * stride);
        any = true;
      }
    return any;
  };
  if (!load_again()) return;
  const long long start = clock64();
  while (load_again()) trap_if_hopeless(start);
}

LSTM_DEVICE std::uint32_t flag_add_release(std::uint32_t* flag, std::uint32_t value) {
  std::uint32_t old;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(flag), "r"(value)
               : "memory");
  return old;
}
LSTM_DEVICE std::uint32_t flag_load_acquire(const std::uint32_t* flag) {
  std::uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
  return v;
}
// Counters may wrap around: "at least" is the sign of the difference.
LSTM_DEVICE void flag_wait_acquire(const std::uint32_t* flag, std::uint32_t at_least) {
  const auto reached = [&] { return std::int32_t(flag_load_acquire(flag) - at_least) >= 0; };
  if (reached()) return;
  const long long start = clock64();
  while (!reached()) trap_if_hopeless(start);
}

// Kernels may be launched to overlap from sm_90 on; before that they never do.
LSTM_DEVICE void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
LSTM_DEVICE void dependency_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- arithmetic ----

LSTM_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LSTM_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LSTM_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LSTM_DEVICE float round_tf32(float x) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

}  // namespace lstm_cuda::ptx
