// One small kernel for each promise of ptx.cuh. The same kernels run under emulation and on a GPU:
// they are what ties the emulation to the hardware.
#pragma once

#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace lstm_cuda::micro {

// ---- who a thread is, and accesses of each width ----

struct Identity {
  std::uint32_t* out;   // [blocks][threads][4]
  std::byte* copies;    // [blocks * threads][32], by accesses of 1, 2, 4, 8 and 16 bytes
  const std::byte* in;  // the same
};

LSTM_KERNEL(96) identity(Identity p) {
  const unsigned thread = ptx::thread_index(), block = ptx::block_index();
  const unsigned i = block * ptx::block_threads() + thread;
  const uint4 v{thread, block, ptx::block_threads(), ptx::grid_blocks()};
  ptx::store(p.out + 4 * i, v);
  std::byte* to = p.copies + 32 * i;
  const std::byte* from = p.in + 32 * i;
  ptx::store(to, ptx::load<std::uint8_t>(from));
  ptx::store(to + 1, ptx::load<std::uint8_t>(from + 1));
  ptx::store(to + 2, ptx::load<std::uint16_t>(from + 2));
  ptx::store(to + 4, ptx::load<std::uint32_t>(from + 4));
  ptx::store(to + 8, ptx::load<std::uint64_t>(from + 8));
  ptx::store(to + 16, ptx::load<uint4>(from + 16));
}

// ---- shared memory and barriers of a block ----

struct Words {
  const std::uint32_t* in;
  std::uint32_t* out;
};

// Each thread's word goes to the thread opposite, twice, through pieces of different alignment.
LSTM_KERNEL(128) exchange_in_block(Words p) {
  const unsigned thread = ptx::thread_index(), opposite = ptx::block_threads() - 1 - thread;
  ptx::Shared shared;
  auto* odd = shared.take<std::uint8_t>(3);
  auto* words = shared.take<std::uint32_t>(ptx::block_threads());
  auto* aligned = shared.take<std::uint32_t>(ptx::block_threads(), 128);
  if (thread < 3) odd[thread] = std::uint8_t(thread + 1);
  words[thread] = p.in[thread];
  ptx::block_sync();  // before others read words
  aligned[thread] = words[opposite] + odd[thread % 3];
  ptx::block_sync();  // before others read aligned
  p.out[thread] = aligned[opposite];
}

// Warp 1 transposes an 8x8 matrix of 16-bit elements and hands it to warp 0, without waiting for
// it.
LSTM_KERNEL(64) hand_over(Words p) {
  ptx::Shared shared;
  auto* middle = shared.take<std::uint32_t>(32);
  const unsigned lane = ptx::thread_index() % 32;
  if (ptx::thread_index() >= 32) {
    middle[lane] = ptx::movmatrix(p.in[lane]);
    ptx::named_arrive(2, 64);  // middle is written
  } else {
    ptx::named_sync(2, 64);  // before middle is read
    p.out[lane] = middle[lane];
  }
}

// Two halves of a warp each meet for themselves, and pass words round.
LSTM_KERNEL(32) exchange_in_warp(Words p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(32);
  const unsigned lane = ptx::thread_index(), half = lane / 16 * 16;
  const unsigned mask = 0xFFFFu << half;
  std::uint32_t v = p.in[lane];
  for (unsigned i = 0; i < 3; ++i) {
    words[lane] = v;
    ptx::warp_sync(mask);  // before the neighbour reads words
    v = words[half + (lane + 1) % 16] * 3 + i;
    ptx::warp_sync(mask);  // before words are written again
  }
  p.out[lane] = v;
}

// ---- operations of a warp ----

LSTM_KERNEL(32) votes(Words p) {  // out: [32]
  const unsigned lane = ptx::thread_index();
  std::uint32_t v = ptx::ballot(lane % 3 == 0) + ptx::shuffle(p.in[lane], (lane + 1) % 32);
  // Halves of a warp, each by itself and one before the other.
  if (lane < 16)
    v += ptx::shuffle_xor(p.in[lane], 1, 0xFFFFu);
  else
    v += ptx::ballot(lane % 2 == 0, 0xFFFF0000u) + ptx::shuffle_xor(v, 2, 0xFFFF0000u);
  const double wide = ptx::shuffle(double(v) + 0.5, 31 - lane);
  p.out[lane] = v + std::uint32_t(wide * 2);
}

struct Product {
  const std::uint32_t *a,
      *b;      // 16-bit: a[16][16], b[16][8]; tf32: a[16][8], b[8][8]; all row-major
  float* out;  // [16][8]
};

LSTM_DEVICE void write_product(float* out, const float (&d)[4]) {
  const unsigned lane = ptx::thread_index() % 32;
  LSTM_UNROLL
  for (unsigned i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// `transposed`: a is stored as a[k][m], in the same rows of 32 bytes.
template <bool is_bf16, bool transposed = false>
LSTM_KERNEL(32)
multiply16(Product p) {
  ptx::Shared shared;
  auto* a = shared.take<std::uint32_t>(16 * 12, 16);  // rows of 32 bytes, 48 apart
  auto* b = shared.take<std::uint32_t>(16 * 4, 16);
  const unsigned lane = ptx::thread_index();
  for (unsigned i = lane; i < 128; i += 32) a[i / 8 * 12 + i % 8] = p.a[i];
  for (unsigned i = lane; i < 64; i += 32) b[i] = p.b[i];
  ptx::warp_sync();  // before other lanes' rows are read
  std::uint32_t ra[4], rb[2];
  if constexpr (transposed)
    ptx::ldmatrix_x4_trans(ra, a + (lane / 16 * 8 + lane % 8) * 12 + lane % 16 / 8 * 4);
  else
    ptx::ldmatrix_x4(ra, a + lane % 16 * 12 + lane / 16 * 4);
  ptx::ldmatrix_x2_trans(rb, b + lane % 16 * 4);
  float d[4] = {};
  LSTM_UNROLL
  for (int twice = 0; twice < 2; ++twice) {  // sums are added to
    if constexpr (is_bf16)
      ptx::mma_bf16(d, ra, rb);
    else
      ptx::mma_fp16(d, ra, rb);
  }
  write_product(p.out, d);
}

LSTM_KERNEL(32) multiply_tf32(Product p) {
  const unsigned lane = ptx::thread_index(), g = lane / 4, q = lane % 4;
  const auto element = [](const std::uint32_t* m) {
    return __builtin_bit_cast(std::uint32_t, ptx::round_tf32(ptx::load<float>(m)));
  };
  const std::uint32_t a[4] = {element(p.a + g * 8 + q), element(p.a + (g + 8) * 8 + q),
                              element(p.a + g * 8 + q + 4), element(p.a + (g + 8) * 8 + q + 4)};
  const std::uint32_t b[2] = {element(p.b + q * 8 + g), element(p.b + (q + 4) * 8 + g)};
  float d[4] = {};
  ptx::mma_tf32(d, a, b);
  write_product(p.out, d);
}

// ---- arithmetic ----

struct Functions {
  const float* in;
  float* out;  // [4][count]
  unsigned count;
};

LSTM_KERNEL(32) functions(Functions p) {
  for (unsigned i = ptx::thread_index(); i < p.count; i += ptx::block_threads()) {
    p.out[i] = ptx::exp2_approx(p.in[i]);
    p.out[p.count + i] = ptx::reciprocal_approx(p.in[i]);
    p.out[2 * p.count + i] = ptx::tanh_approx(p.in[i]);
    p.out[3 * p.count + i] = ptx::round_tf32(p.in[i]);
  }
}

// ---- copies to shared memory ----

struct Stream16 {
  const float* in;              // [pieces][256]
  float* out;                   // [64]
  unsigned pieces, last_bytes;  // of each 16 bytes of the last piece
};

// Pieces of 256 floats through three stages, two copies ahead, 16 or 8 bytes at a time; out: sums of
// each thread's four.
template <unsigned width>
LSTM_KERNEL(64)
copy_ahead(Stream16 p) {
  constexpr unsigned kStages = 3, kPiece = 256;
  ptx::Shared shared;
  auto* stages = shared.take<float>(kStages * kPiece, 16);
  const unsigned thread = ptx::thread_index();
  const auto fetch = [&](unsigned i) {
    const unsigned bytes = i + 1 < p.pieces ? 16 : p.last_bytes;
    float* to = stages + i % kStages * kPiece + 4 * thread;
    const float* from = p.in + i * kPiece + 4 * thread;
    if (i < p.pieces && width == 16) ptx::cp_async16(to, from, bytes);
    if (i < p.pieces && width == 8) {
      ptx::cp_async8(to, from);
      ptx::cp_async8(to + 2, from + 2);
    }
    ptx::cp_async_commit();  // an empty group too: groups are counted
  };
  ptx::prefetch_l2(p.in + 4 * thread);
  fetch(0);
  fetch(1);
  float sum = 0;
  for (unsigned i = 0; i < p.pieces; ++i) {
    ptx::cp_async_wait<1>();
    ptx::block_sync();  // piece i is there, and nobody reads the stage that is filled next
    fetch(i + 2);
    for (unsigned j = 0; j < 4; ++j) sum += stages[i % kStages * kPiece + 64 * j + 63 - thread];
  }
  p.out[thread] = sum;
}

#if !defined(LSTM_BELOW_SM90)  // what follows compiles for sm_90 and later only

// ---- barriers in shared memory ----

// A pipeline of bulk copies: warp 0 produces, the others consume; out: one sum.
LSTM_KERNEL(128) bulk_sum(Stream16 p) {
  constexpr unsigned kPiece = 256, kStages = 2, kBytes = kPiece * sizeof(float);
  ptx::Shared shared;
  auto* stage = shared.take<float>(kStages * kPiece, 128);
  auto* full = shared.take<std::uint64_t>(kStages);
  auto* empty = shared.take<std::uint64_t>(kStages);
  auto* partial = shared.take<float>(128);
  const unsigned thread = ptx::thread_index(), warp = thread / 32;
  if (thread < kStages) {
    ptx::mbarrier_init(full + thread, 1);
    ptx::mbarrier_init(empty + thread, 3);
  }
  ptx::block_sync();  // barriers exist
  float sum = 0;
  for (unsigned i = 0; i < p.pieces; ++i) {
    const unsigned s = i % kStages, use = i / kStages;
    if (warp == 0) {
      if (thread > 0) continue;  // one waits: a lane that gates no phase could miss one
      if (use > 0) ptx::mbarrier_wait(empty + s, (use - 1) % 2);
      ptx::mbarrier_expect(full + s, kBytes);
      ptx::bulk_copy(stage + s * kPiece, p.in + i * kPiece, kBytes, full + s);
    } else {
      ptx::mbarrier_wait(full + s, use % 2);
      for (unsigned j = thread - 32; j < kPiece; j += 96) sum += stage[s * kPiece + j];
      ptx::warp_sync();  // the whole warp has read
      if (thread % 32 == 0) ptx::mbarrier_arrive(empty + s, 0);
    }
  }
  partial[thread] = sum;
  if (warp > 0) ptx::named_sync(1, 96);  // the consumers' partial sums are written
  if (thread == 32) {
    float total = 0;
    for (unsigned i = 32; i < 128; ++i) total += partial[i];
    p.out[0] = total;
  }
}

// ---- clusters ----

struct Ring {
  std::uint32_t* out;  // [blocks][32]
  unsigned steps;
};

// Each step, each block adds its rank to what its neighbour holds: first by plain remote stores
// between barriers of the cluster, then by stores that the neighbour's mbarrier counts.
LSTM_KERNEL(32) ring_of_stores(Ring p) {
  ptx::Shared shared;
  auto* slot = shared.take<std::uint32_t>(2 * 32);
  const unsigned lane = ptx::thread_index(), rank = ptx::cluster_rank();
  constexpr unsigned kBlocks = 4;
  slot[lane] = 100 * ptx::block_index() + lane;
  ptx::cluster_sync();  // all blocks run: others may write here
  for (unsigned step = 0; step < p.steps; ++step) {
    const std::uint32_t v = slot[step % 2 * 32 + lane] + rank;
    std::uint32_t* next = slot + (step + 1) % 2 * 32 + lane;
    ptx::store(ptx::peer_shared(next, (rank + 1) % kBlocks), v);
    ptx::cluster_arrive();
    ptx::cluster_wait();  // what the neighbour stored is here
  }
  p.out[ptx::block_index() * 32 + lane] = slot[p.steps % 2 * 32 + lane];
}

template <class T>
LSTM_DEVICE T widen(std::uint32_t v) {
  if constexpr (sizeof(T) == 4)
    return v;
  else if constexpr (sizeof(T) == 8)
    return {v, v + 1};
  else
    return {v, v + 1, v + 2, v + 3};
}
template <class T>
LSTM_DEVICE std::uint32_t narrow(T v) {
  if constexpr (sizeof(T) == 4)
    return v;
  else if constexpr (sizeof(T) == 8)
    return v.x ^ v.y << 8;
  else
    return v.x ^ v.y << 8 ^ v.z << 16 ^ v.w << 24;
}

// All blocks of a cluster of four send to all, T at a time; the sum over blocks goes to the next
// step. A lane sends only after it received everybody's last step, and so after all have read the
// step before that: two slots are enough, and no lane can miss a phase.
template <class T>
LSTM_KERNEL(32)
all_to_all(Ring p) {
  constexpr unsigned kBlocks = 4, kBytes = kBlocks * 32 * sizeof(T);
  ptx::Shared shared;
  auto* slots = shared.take<T>(2 * kBlocks * 32, 16);
  auto* full = shared.take<std::uint64_t>(2);
  const unsigned lane = ptx::thread_index(), rank = ptx::cluster_rank();
  if (lane < 2) {
    ptx::mbarrier_init(full + lane, 1);
    ptx::mbarrier_expect(full + lane, kBytes);
  }
  ptx::cluster_sync();  // barriers of all blocks exist
  std::uint32_t v = 1000 * ptx::block_index() + lane;
  for (unsigned step = 0; step < p.steps; ++step) {
    T* slot = slots + step % 2 * kBlocks * 32;
    for (unsigned r = 0; r < kBlocks; ++r)
      ptx::store_async(slot + rank * 32 + lane, widen<T>(v), full + step % 2, r);
    ptx::mbarrier_wait(full + step % 2, step / 2 % 2);
    v = step;
    for (unsigned r = 0; r < kBlocks; ++r) v += narrow(slot[r * 32 + lane]);
    if (lane == 0 && step + 2 < p.steps) ptx::mbarrier_expect(full + step % 2, kBytes);
  }
  p.out[ptx::block_index() * 32 + lane] = v;  // all stores to this block have arrived: it may leave
}

// A token goes round by remote arrivals: block r waits for r - 1, adds, and wakes r + 1.
LSTM_KERNEL(32) relay(Ring p) {
  ptx::Shared shared;
  auto* value = shared.take<std::uint32_t>(1);
  auto* turn = shared.take<std::uint64_t>(1);
  const unsigned rank = ptx::cluster_rank();
  constexpr unsigned kBlocks = 4;
  if (ptx::thread_index() == 0) {
    ptx::mbarrier_init(turn, 1);
    *value = 0;
  }
  ptx::cluster_sync();  // barriers and values of all blocks exist
  if (ptx::thread_index() == 0) {
    for (unsigned step = 0; step < p.steps; ++step) {
      if (rank != 0 || step > 0) ptx::mbarrier_wait(turn, (rank == 0 ? step - 1 : step) % 2);
      const std::uint32_t v = *value + rank + 1;
      ptx::store(ptx::peer_shared(value, (rank + 1) % kBlocks), v);
      ptx::mbarrier_arrive(turn, (rank + 1) % kBlocks);  // v is written
    }
  }
  ptx::cluster_sync();  // the last token has arrived
  p.out[ptx::block_index() * 32 + ptx::thread_index()] = *value + ptx::thread_index();
}

#endif

// ---- blocks of a grid ----

struct Chain {
  std::uint32_t *flag, *value;
};

// Block b adds b + 1 to what block b - 1 left.
LSTM_KERNEL(32) chain(Chain p) {
  const unsigned block = ptx::block_index();
  if (ptx::thread_index() == 0) {
    ptx::flag_wait_acquire(p.flag, block);
    *p.value += block + 1;
    ptx::flag_add_release(p.flag, 1);
  }
}

// Sums over all blocks, twice: each thread's word, then what all made of it.
LSTM_KERNEL(32) sum_over_grid(Words p) {  // out: [3][blocks][32]
  const unsigned lane = ptx::thread_index(), blocks = ptx::grid_blocks();
  std::uint32_t v = p.in[ptx::block_index() * 32 + lane];
  for (unsigned round = 0; round < 3; ++round) {
    std::uint32_t* row = p.out + round * blocks * 32;
    row[ptx::block_index() * 32 + lane] = v;
    ptx::grid_sync();  // the row is written
    v = round;
    for (unsigned b = 0; b < blocks; ++b) v += row[b * 32 + lane];
  }
  p.out[ptx::block_index() * 32 + lane] = v;  // row 0 was last read before the second grid_sync
}

struct PingPong {
  std::uint32_t* slots;  // [2][blocks][32], zeros
  std::uint32_t* out;    // [blocks][32]
  unsigned steps;
};

// Words that say themselves whether they are new: the lowest bit is the parity of the slot's use,
// from 1 on. They are stored T at a time: by every, every second or every fourth lane. Two slots are
// enough: four lanes of each block send each other four words a step, and none sends for the step
// after the next before all of them have sent for the next, that is, have read.
template <class T>
LSTM_KERNEL(32)
words_around(PingPong p) {
  constexpr unsigned blocks = 3;
  const unsigned lane = ptx::thread_index();
  std::uint32_t v = 64 * ptx::block_index() + lane;
  for (unsigned step = 0; step < p.steps; ++step) {
    std::uint32_t* slot = p.slots + step % 2 * blocks * 32;
    const std::uint32_t tag = 1 - step / 2 % 2;
    const std::uint32_t own = v << 1 | tag;
    std::uint32_t* to = slot + ptx::block_index() * 32 + lane;
    if constexpr (sizeof(T) == 4) {
      ptx::word_store(to, own);
    } else {
      const std::uint32_t second = ptx::shuffle(own, lane | 1);
      if constexpr (sizeof(T) == 8) {
        if (lane % 2 == 0) ptx::word_store(to, uint2{own, second});
      } else {
        const std::uint32_t third = ptx::shuffle(own, lane | 2);
        const std::uint32_t fourth = ptx::shuffle(own, lane | 3);
        if (lane % 4 == 0) ptx::word_store(to, uint4{own, second, third, fourth});
      }
    }
    v = step;
    uint4 words[blocks];
    ptx::word_poll4(words, slot + lane / 4 * 4, 32, [tag](uint4 x) {
      return (x.x & 1) == tag && (x.y & 1) == tag && (x.z & 1) == tag && (x.w & 1) == tag;
    });
    for (const uint4& w : words)
      v += (w.x >> 1) + (w.y >> 1) * 3 + (w.z >> 1) * 5 + (w.w >> 1) * 7 + lane;
    v &= 0xFFFFFFu;
  }
  p.out[ptx::block_index() * 32 + lane] = v;
}

// ---- launches that overlap ----

struct Overlap {
  const std::uint32_t* constant;  // nobody writes it: read before the wait
  std::uint32_t* state;           // what the launch before wrote
  std::uint32_t factor;
};

LSTM_KERNEL(64) overlapping(Overlap p) {
  const unsigned i = ptx::block_index() * ptx::block_threads() + ptx::thread_index();
  const std::uint32_t c = p.constant[i];
  ptx::dependency_wait();
  p.state[i] = p.state[i] * p.factor + c;
  ptx::dependency_release();
}

}  // namespace lstm_cuda::micro
