// ptx.cuh on the CPU: hands each operation, with the line that calls it, to the emulation's
// runtime.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "runtime/runtime.hpp"

#define LSTM_DEVICE inline
#define LSTM_KERNEL(...) void
#define LSTM_UNROLL
#define LSTM_NO_UNROLL
#define LSTM_PARAMETER const

namespace lstm_cuda::ptx {

inline constexpr bool kHasClusters = true;

// The caller's line, as the last argument of every operation that can be used wrongly.
#define LSTM_SITE emulation::Site at = emulation::Site::current()

inline unsigned thread_index() { return emulation::current->thread; }
inline unsigned block_index() { return emulation::current->block; }
inline unsigned block_threads() { return emulation::current->threads; }
inline unsigned grid_blocks() { return emulation::current->blocks; }
inline unsigned cluster_rank() { return emulation::current->rank; }

template <class T>
T load(const void* p, LSTM_SITE) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T)) emulation::misaligned(p, sizeof(T), at);
  T v;
  std::memcpy(static_cast<void*>(&v), p, sizeof v);
  return v;
}
template <class T>
void store(void* p, T v, LSTM_SITE) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T)) emulation::misaligned(p, sizeof(T), at);
  std::memcpy(p, &v, sizeof v);
}

class Shared {
 public:
  template <class T>
  T* take(std::size_t count, std::size_t align = alignof(T), LSTM_SITE) {
    return static_cast<T*>(emulation::shared_take(cursor_, count * sizeof(T), align, at));
  }

 private:
  emulation::SharedCursor cursor_;
};

// ---- barriers ----

inline void block_sync(LSTM_SITE) { emulation::block_sync(at); }
inline void named_sync(unsigned id, unsigned threads, LSTM_SITE) {
  emulation::named_sync(id, threads, at);
}
inline void named_arrive(unsigned id, unsigned threads, LSTM_SITE) {
  emulation::named_arrive(id, threads, at);
}
inline void warp_sync(unsigned mask = kAllLanes, LSTM_SITE) { emulation::warp_sync(mask, at); }
inline void cluster_arrive(LSTM_SITE) { emulation::cluster_arrive(at); }
inline void cluster_wait(LSTM_SITE) { emulation::cluster_wait(at); }
inline void cluster_sync(LSTM_SITE) {
  emulation::cluster_arrive(at);
  emulation::cluster_wait(at);
}
inline void grid_sync(LSTM_SITE) { emulation::grid_sync(at); }

// ---- lanes of a warp ----

template <class T>
T shuffle(T v, unsigned lane, unsigned mask = kAllLanes, LSTM_SITE) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = emulation::shuffle(bits, lane, mask, at);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
template <class T>
T shuffle_xor(T v, unsigned lanes, unsigned mask = kAllLanes, LSTM_SITE) {
  return shuffle(v, thread_index() % 32 ^ lanes, mask, at);
}
inline unsigned ballot(bool p, unsigned mask = kAllLanes, LSTM_SITE) {
  return emulation::ballot(p, mask, at);
}

using Fragment2 = const std::uint32_t (&)[2];
using Fragment4 = const std::uint32_t (&)[4];

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* row, LSTM_SITE) {
  emulation::ldmatrix(r, 4, row, false, at);
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* row, LSTM_SITE) {
  emulation::ldmatrix(r, 4, row, true, at);
}
inline void ldmatrix_x2_trans(std::uint32_t (&r)[2], const void* row, LSTM_SITE) {
  emulation::ldmatrix(r, 2, row, true, at);
}
inline std::uint32_t movmatrix(std::uint32_t v, LSTM_SITE) { return emulation::movmatrix(v, at); }
inline void mma_bf16(float (&d)[4], Fragment4 a, Fragment2 b, LSTM_SITE) {
  emulation::mma_bf16(d, a, b, at);
}
inline void mma_fp16(float (&d)[4], Fragment4 a, Fragment2 b, LSTM_SITE) {
  emulation::mma_fp16(d, a, b, at);
}
inline void mma_tf32(float (&d)[4], Fragment4 a, Fragment2 b, LSTM_SITE) {
  emulation::mma_tf32(d, a, b, at);
}

// ---- asynchronous copies ----

inline void cp_async16(void* dst, const void* src, unsigned source_bytes = 16, LSTM_SITE) {
  emulation::cp_async("cp_async16", dst, 16, src, source_bytes, at);
}
inline void cp_async8(void* dst, const void* src, LSTM_SITE) {
  emulation::cp_async("cp_async8", dst, 8, src, 8, at);
}
inline void cp_async_commit(LSTM_SITE) { emulation::cp_async_commit(at); }
template <unsigned groups_left>
void cp_async_wait(LSTM_SITE) {
  emulation::cp_async_wait(groups_left, at);
}
inline void prefetch_l2(const void* p, LSTM_SITE) { emulation::readable(p, at); }

// ---- waits ----

inline void mbarrier_init(std::uint64_t* bar, unsigned arrivals, LSTM_SITE) {
  emulation::mbarrier_init(bar, arrivals, at);
}
inline void mbarrier_arrive(std::uint64_t* bar, unsigned rank, LSTM_SITE) {
  emulation::mbarrier_arrive(bar, rank, at);
}
inline void mbarrier_expect(std::uint64_t* bar, unsigned bytes, LSTM_SITE) {
  emulation::mbarrier_expect(bar, bytes, at);
}
inline void mbarrier_wait(std::uint64_t* bar, unsigned parity, LSTM_SITE) {
  emulation::mbarrier_wait(bar, parity, at);
}
inline void bulk_copy(void* dst, const void* src, unsigned bytes, std::uint64_t* bar, LSTM_SITE) {
  emulation::bulk_copy(dst, src, bytes, bar, at);
}
template <class T>
T* peer_shared(T* p, unsigned rank, LSTM_SITE) {
  return static_cast<T*>(emulation::peer_shared(p, rank, at));
}
template <class T>
void store_async(T* dst, std::type_identity_t<T> v, std::uint64_t* bar, unsigned rank, LSTM_SITE) {
  static_assert(std::is_same_v<T, std::uint32_t> || std::is_same_v<T, uint2> ||
                std::is_same_v<T, uint4>);
  emulation::store_async(dst, &v, sizeof v, bar, rank, at);
}
inline void word_store(std::uint32_t* p, std::uint32_t v, LSTM_SITE) {
  emulation::word_store(p, v, at);
}
inline void word_store(std::uint32_t* p, uint2 v, LSTM_SITE) {
  if (reinterpret_cast<std::uintptr_t>(p) % 8) emulation::misaligned(p, 8, at);
  emulation::word_store(p, v.x, at);
  emulation::word_store(p + 1, v.y, at);
}
inline void word_store(std::uint32_t* p, uint4 v, LSTM_SITE) {
  if (reinterpret_cast<std::uintptr_t>(p) % 16) emulation::misaligned(p, 16, at);
  word_store(p, uint2{v.x, v.y}, at);
  word_store(p + 2, uint2{v.z, v.w}, at);
}
template <unsigned n, class Ready>
void word_poll4(uint4 (&v)[n], const std::uint32_t* p, unsigned stride, Ready ready, LSTM_SITE) {
  for (unsigned i = 0; i < n; ++i) emulation::word_load4(&v[i].x, p + std::size_t{i} * stride, at);
  for (unsigned i = 0; i < n; ++i) {
    const std::uint32_t* from = p + std::size_t{i} * stride;
    while (!ready(v[i])) {
      emulation::word_load4(&v[i].x, from, at);  // it may have come while another was waited for
      if (!ready(v[i])) emulation::word_wait(from, at);
    }
  }
}
inline std::uint32_t flag_add_release(std::uint32_t* flag, std::uint32_t value, LSTM_SITE) {
  return emulation::flag_add_release(flag, value, at);
}
inline void flag_wait_acquire(const std::uint32_t* flag, std::uint32_t at_least, LSTM_SITE) {
  emulation::flag_wait_acquire(flag, at_least, at);
}
inline void dependency_wait() { emulation::dependency_wait(); }
inline void dependency_release() {}

// ---- arithmetic ----

// Approximations are off by what the PTX manual allows, up or down as the bits of x would have it.
inline float off_by(double error, double exact, float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool up = bits * 2654435761u >> 31;
  return float(exact * (up ? 1 + error : 1 - error));
}
inline float exp2_approx(float x) { return off_by(0x1p-22, std::exp2(double(x)), x); }
inline float reciprocal_approx(float x) { return off_by(0x1p-23, 1.0 / double(x), x); }
inline float tanh_approx(float x) { return off_by(0x1p-11, std::tanh(double(x)), x); }
// A NaN stays one: adding half a unit to its bits could carry it into the sign.
inline float round_tf32(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isfinite(x)) bits = (bits + 0x1000u) & ~0x1FFFu;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

#undef LSTM_SITE

}  // namespace lstm_cuda::ptx
