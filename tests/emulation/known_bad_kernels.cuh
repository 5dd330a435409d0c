// Kernels with one mistake each, that the emulation must find; test_emulation.py says as what.
// Without its mistake each would copy `in` to `out`.
#pragma once

#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace lstm_cuda::bad {

constexpr unsigned kWords = 130;  // not a multiple of what buffers are aligned to

struct Params {
  const std::uint32_t* in;  // [kWords]
  std::uint32_t* out;       // [kWords]
  std::uint32_t* scratch;   // [64], zeros
};

inline unsigned me() { return ptx::thread_index(); }

// ---- barriers of a block ----

LSTM_KERNEL(64) divergent_barrier(Params p) {
  if (me() < 32)
    ptx::block_sync();
  else
    ptx::block_sync();
  p.out[me()] = p.in[me()];
}
LSTM_KERNEL(64) exit_before_barrier(Params p) {
  p.out[me()] = p.in[me()];
  if (me() >= 32) return;
  ptx::block_sync();
}
LSTM_KERNEL(64) named_counts_differ(Params p) {
  ptx::named_sync(1, me() < 32 ? 64 : 32);
  p.out[me()] = p.in[me()];
}
LSTM_KERNEL(64) named_out_of_range(Params p) {
  ptx::named_sync(16, 64);
  p.out[me()] = p.in[me()];
}
LSTM_KERNEL(64) missing_block_sync(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(64);
  words[63 - me()] = p.in[me()];
  p.out[63 - me()] = words[me()];
}
// One buffer for two rounds, where the second needs another, or a barrier before it.
LSTM_KERNEL(64) single_buffer(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(64);
  std::uint32_t sum = 0;
  for (unsigned i = 0; i < 2; ++i) {
    words[63 - me()] = p.in[me()] * (2 * i + 1);
    ptx::block_sync();
    sum += words[me()];
  }
  p.out[63 - me()] = sum / 4;
}

// ---- warps ----

LSTM_KERNEL(32) missing_warp_sync(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(32);
  words[31 - me()] = p.in[me()];
  p.out[31 - me()] = words[me()];
}
LSTM_KERNEL(32) shuffle_for_a_barrier(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(32);
  words[31 - me()] = p.in[me()];
  ptx::shuffle(1u, 0);
  p.out[31 - me()] = words[me()];
}
LSTM_KERNEL(32) lane_exits(Params p) {
  p.out[me()] = p.in[me()];
  if (me() == 5) return;
  ptx::shuffle(1u, 0);
}
LSTM_KERNEL(32) caller_not_in_mask(Params p) {
  p.out[me()] = ptx::shuffle(p.in[me()], me(), 0xFFFFu);
}
LSTM_KERNEL(32) source_not_in_mask(Params p) {
  if (me() < 16) p.out[me()] = ptx::shuffle(p.in[me()], 20, 0xFFFFu);
}
LSTM_KERNEL(32) divergent_operation(Params p) {
  if (me() < 16)
    p.out[me()] = ptx::shuffle(p.in[me()], me());
  else
    p.out[me()] = ptx::ballot(true);
}
LSTM_KERNEL(32) masks_that_cross(Params p) {
  if (me() < 16)
    ptx::warp_sync(0x1FFFFu);
  else
    ptx::warp_sync(0xFFFF8000u);
  p.out[me()] = p.in[me()];
}
LSTM_KERNEL(32) ldmatrix_misaligned(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(160, 16);
  std::uint32_t r[4];
  ptx::ldmatrix_x4(r, words + 4 * me() + 2);
  p.out[me()] = r[0];
}

// ---- memory ----

LSTM_KERNEL(32) misaligned_load(Params p) {
  const auto* bytes = reinterpret_cast<const std::byte*>(p.in);
  p.out[me()] = ptx::load<std::uint32_t>(bytes + 4 * me() + 2);
}
LSTM_KERNEL(32) too_little_shared(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(32);
  words[me()] = p.in[me()];
  p.out[me()] = words[me()];
}
LSTM_KERNEL(64) different_pieces(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(me() < 32 ? 32 : 64);
  p.out[me()] = p.in[me()] + (words == nullptr);
}
LSTM_KERNEL(32) past_a_piece(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(32);
  shared.take<std::uint32_t>(32);
  words[me() + 1] = p.in[me()];
  p.out[me()] = p.in[me()];
}
LSTM_KERNEL(32) past_a_buffer(Params p) {
  p.out[me()] = p.in[me()];
  p.out[kWords] = 1;
}
LSTM_KERNEL(32) far_past_a_buffer(Params p) { p.out[me()] = p.in[me() + 1024]; }
LSTM_KERNEL(32) not_a_pointer(Params p) {
  p.out[me()] = ptx::load<std::uint32_t>(reinterpret_cast<const void*>(std::uintptr_t(p.in[7])));
}
LSTM_KERNEL(32) uninitialised_shared(Params p) {
  ptx::Shared shared;
  p.out[me()] = shared.take<std::uint32_t>(32)[me()];
}
LSTM_KERNEL(32) unwritten_output(Params p) {
  if (me() > 0) p.out[me()] = p.in[me()];
}
// Blocks of one launch are not ordered, whichever of them the emulation runs first.
LSTM_KERNEL(32) blocks_share_output(Params p) { p.out[me()] = p.in[me()]; }

// ---- cp.async ----

LSTM_KERNEL(32) read_before_landing(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(128, 16);
  ptx::cp_async16(words + 4 * me(), p.in + 4 * me());
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  p.out[me()] = words[4 * me()] - 3 * me();
  ptx::cp_async_wait<0>();
}
LSTM_KERNEL(32) landed_for_one_thread(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(128, 16);
  ptx::cp_async16(words + 4 * (31 - me()), p.in + 4 * (31 - me()));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  p.out[me()] = words[4 * me()] - 3 * me();
}
LSTM_KERNEL(32) exit_with_copies(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(128, 16);
  ptx::cp_async16(words + 4 * me(), p.in + 4 * me());
  ptx::cp_async_commit();
  p.out[me()] = p.in[me()];
}
LSTM_KERNEL(32) copy_misaligned(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(128, 16);
  ptx::cp_async16(words + 4 * me(), p.in + 1);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  p.out[me()] = p.in[me()];
}
LSTM_KERNEL(32) copy8_misaligned(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(128, 16);
  ptx::cp_async8(words + 4 * me() + 1, p.in + 4 * me());
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  p.out[me()] = p.in[me()];
}
// The last copy goes four bytes past the piece.
LSTM_KERNEL(32) copy8_for_4(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(63, 8);
  shared.take<std::uint32_t>(1);
  ptx::cp_async8(words + 2 * me(), p.in + 2 * me());
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  p.out[me()] = words[2 * me()] - me();
}

// ---- mbarriers ----

LSTM_KERNEL(32) over_arrival(Params p) {
  ptx::Shared shared;
  auto* bar = shared.take<std::uint64_t>(1);
  if (me() == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::mbarrier_expect(bar, 16);
    ptx::mbarrier_arrive(bar, 0);
  }
  p.out[me()] = p.in[me()];
}
LSTM_KERNEL(32) wrong_parity(Params p) {
  ptx::Shared shared;
  auto* bar = shared.take<std::uint64_t>(1);
  if (me() == 0) ptx::mbarrier_init(bar, 32);
  ptx::warp_sync();
  ptx::mbarrier_arrive(bar, 0);
  ptx::mbarrier_wait(bar, 1);
  p.out[me()] = p.in[me()];
}
LSTM_KERNEL(32) too_few_arrivals(Params p) {
  ptx::Shared shared;
  auto* bar = shared.take<std::uint64_t>(1);
  if (me() == 0) ptx::mbarrier_init(bar, 33);
  ptx::warp_sync();
  ptx::mbarrier_arrive(bar, 0);
  ptx::mbarrier_wait(bar, 0);
  p.out[me()] = p.in[me()];
}
template <bool waits, unsigned expected>
LSTM_KERNEL(32)
bulk(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(32, 16);
  auto* bar = shared.take<std::uint64_t>(1);
  if (me() == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::mbarrier_expect(bar, expected);
    ptx::bulk_copy(words, p.in, 128, bar);
  }
  ptx::warp_sync();
  if (waits) ptx::mbarrier_wait(bar, 0);
  p.out[me()] = words[me()];
  ptx::warp_sync();
  if (!waits) ptx::mbarrier_wait(bar, 0);
}
LSTM_KERNEL(32) no_mbarrier_init(Params p) {
  ptx::Shared shared;
  auto* bar = shared.take<std::uint64_t>(1);
  ptx::mbarrier_arrive(bar, 0);
  p.out[me()] = p.in[me()];
}
LSTM_KERNEL(32) two_mbarrier_inits(Params p) {
  ptx::Shared shared;
  ptx::mbarrier_init(shared.take<std::uint64_t>(1), 1);
  p.out[me()] = p.in[me()];
}
LSTM_KERNEL(64) init_not_published(Params p) {
  ptx::Shared shared;
  auto* bar = shared.take<std::uint64_t>(1);
  if (me() == 0) ptx::mbarrier_init(bar, 64);
  if (me() < 32) ptx::warp_sync();
  ptx::mbarrier_arrive(bar, 0);
  ptx::mbarrier_wait(bar, 0);
  p.out[me()] = p.in[me()];
}
// Lane 0 arrives for its warp, which has not met.
LSTM_KERNEL(64) arrival_for_others(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(32);
  auto* bar = shared.take<std::uint64_t>(1);
  if (me() == 0) ptx::mbarrier_init(bar, 1);
  ptx::block_sync();
  if (me() < 32) {
    words[me()] = p.in[me()];
    if (me() == 0) ptx::mbarrier_arrive(bar, 0);
  } else {
    ptx::mbarrier_wait(bar, 0);
    p.out[me() - 32] = words[me() - 32];
  }
}

// ---- clusters of two ----

template <bool start_sync, bool end_sync>
LSTM_KERNEL(32)
remote_stores(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(32);
  if (start_sync) ptx::cluster_sync();
  if (ptx::cluster_rank() == 0) {
    ptx::block_sync();  // gives the other block time to leave
    ptx::store(ptx::peer_shared(words + me(), 1), p.in[me()]);
  }
  if (end_sync) ptx::cluster_sync();
  if (ptx::cluster_rank() == 1) p.out[me()] = end_sync ? words[me()] : p.in[me()];
}
LSTM_KERNEL(32) leaves_before_stores(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(32);
  auto* bar = shared.take<std::uint64_t>(1);
  if (me() == 0) ptx::mbarrier_init(bar, 1);
  ptx::cluster_sync();
  if (ptx::cluster_rank() == 0) ptx::store_async(words + me(), p.in[me()], bar, 1);
  if (ptx::cluster_rank() == 1) p.out[me()] = p.in[me()];
}
// Warp 0 writes over what warp 1 reads. Transfers of both are under way at the time, but that orders
// nobody.
LSTM_KERNEL(64) transfers_for_a_barrier(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(32);
  auto* slots = shared.take<std::uint32_t>(64);
  auto* bars = shared.take<std::uint64_t>(2);
  const unsigned warp = me() / 32, lane = me() % 32;
  if (lane == 0) ptx::mbarrier_init(bars + warp, 1);
  if (warp == 0) words[lane] = p.in[lane];
  ptx::cluster_sync();
  if (lane == 0) ptx::mbarrier_expect(bars + warp, 128);
  ptx::store_async(slots + me(), warp == 0 ? 0 : words[lane], bars + warp, ptx::cluster_rank());
  ptx::mbarrier_wait(bars + warp, 0);
  if (warp == 0)
    words[lane] = 0;
  else if (ptx::cluster_rank() == 0)
    p.out[lane] = slots[me()];
}
LSTM_KERNEL(32) no_such_block(Params p) {
  ptx::Shared shared;
  auto* words = shared.take<std::uint32_t>(32);
  ptx::store(ptx::peer_shared(words + me(), 2), p.in[me()]);
}
LSTM_KERNEL(32) wait_without_arrive(Params p) {
  ptx::cluster_wait();
  p.out[me()] = p.in[me()];
}

// ---- grids ----

LSTM_KERNEL(32) grid_barrier(Params p) {
  ptx::grid_sync();
  if (ptx::block_index() == 0) p.out[me()] = p.in[me()];
}
// Block 0 waits for block 1, which is there only if the launch is cooperative.
LSTM_KERNEL(32) waits_for_a_later_block(Params p) {
  if (ptx::block_index() == 0) {
    ptx::flag_wait_acquire(p.scratch, 32);
    p.out[me()] = p.scratch[32 + me()];
  } else {
    p.scratch[32 + me()] = p.in[me()];
    ptx::flag_add_release(p.scratch, 1);
  }
}
LSTM_KERNEL(32) flag_before_data(Params p) {
  if (ptx::block_index() == 0) {
    ptx::flag_wait_acquire(p.scratch, 32);
    p.out[me()] = p.scratch[32 + me()];
  } else {
    ptx::flag_add_release(p.scratch, 1);
    p.scratch[32 + me()] = p.in[me()];
  }
}
// Words arrive one by one: each of the four must say that it is new.
LSTM_KERNEL(32) torn_words(Params p) {
  if (ptx::block_index() == 1) {
    ptx::word_store(p.scratch + me(), p.in[me()] << 1 | 1);
  } else {
    uint4 v[1];
    ptx::word_poll4(v, p.scratch + me() / 4 * 4, 0, [](uint4 w) { return w.x & 1; });
    const std::uint32_t words[4] = {v[0].x, v[0].y, v[0].z, v[0].w};
    p.out[me()] = words[me() % 4] >> 1;
  }
}

// ---- launches that overlap ----

LSTM_KERNEL(32) no_dependency_wait(Params p) { p.out[me()] = p.in[me()]; }
LSTM_KERNEL(32) write_scratch(Params p) { p.scratch[me()] = p.in[me()]; }
LSTM_KERNEL(32) late_dependency_wait(Params p) {
  const std::uint32_t v = p.scratch[me()];
  ptx::dependency_wait();
  p.out[me()] = v;
}

}  // namespace lstm_cuda::bad
