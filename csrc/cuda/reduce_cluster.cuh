// How sums travel in family rec_cluster: each block sends every owner its piece by st.async, which
// brings its own completion.
//
// Shared memory: sums in 2 buffers for each turn, [source][unit tile][column tile][128 sums]; for each
// buffer an mbarrier for each chunk of sources, so that adding begins before all are there.
// Protocol, of each turn by itself: sums of step s go to buffer s % 2. Its mbarriers expect the bytes of their sources; one
// thread arms each again right after its own wait, for step s + 2.
// No "buffer is empty" signal is needed: a block sends sums of step s after a block_sync that its
// threads reach when each has read what it wants of step s - 1, for which sums of step s - 1 had
// come from all blocks; and each of those sent them after the same block_sync of its own, with all
// of step s - 2, the same buffer, read. For the same reason nobody who waits for a phase can miss
// it: the next one of that barrier needs sums that this block sends after the block_sync which the
// waiting thread has yet to reach.
// dgates are in two buffers, turn by turn: sums may have come while a slow warp of this block still
// multiplies dgates of the turn before. (It cannot be two turns behind: that is the other side of a
// block_sync.)
#pragma once

#include "rec_backward.cuh"

namespace lstm_cuda::resident {

template <class F>
class ClusterReduce {
  using Sum = typename F::Sum;
  using Packet = typename F::Packet;
  static constexpr int kBlocks = F::shape.blocks, kUnitTiles = F::kUnits / 16;
  static constexpr int kChunks = kBlocks >= 8 ? 2 : 1, kSourcesOfChunk = kBlocks / kChunks;
  static constexpr int kBuffers = 2 * F::kTurns, kBuffer = kBlocks * F::kSums;
  static constexpr unsigned kBytes = kSourcesOfChunk * F::kSums * sizeof(Sum);
  static_assert(kBlocks % kChunks == 0);

 public:
  static constexpr Family kFamily = Family::rec_cluster;
  static constexpr int kOperands = 2;
  static constexpr std::size_t kSharedBytes = kBuffers * (kBuffer * sizeof(Sum) + kChunks * 8);

  LSTM_DEVICE ClusterReduce(ptx::Shared& shared, uint32_t*, unsigned, unsigned block)
      : sums_(shared.take<Sum>(kBuffers * kBuffer, 16)),
        bars_(shared.take<uint64_t>(kBuffers * kChunks)),
        block_(int(block)) {}

  LSTM_DEVICE void begin() const {
    if (ptx::thread_index() == 0)
      for (int i = 0; i < kBuffers * kChunks; ++i) ptx::mbarrier_init(bars_ + i, 1);
    ptx::cluster_sync();  // all blocks have begun and made their barriers before anything is sent
    if (ptx::thread_index() == 0)
      for (int i = 0; i < kBuffers * kChunks; ++i) ptx::mbarrier_expect(bars_ + i, kBytes);
  }

  // What has come for this thread's cells, if it has any.
  LSTM_DEVICE void receive(int step, int turn, bool has_cells, int tile, int quad,
                           float (&sums)[F::kCells]) const {
    if (!has_cells) return;
    const int buffer = step % 2 * F::kTurns + turn;
    const Sum* const from = sums_ + buffer * kBuffer + first_sum<F>(tile, quad);
    float odd[F::kCells] = {};
    LSTM_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint64_t* const bar = bars_ + buffer * kChunks + chunk;
      ptx::mbarrier_wait(bar, unsigned(step) / 2 % 2);
      if (ptx::thread_index() == 0) ptx::mbarrier_expect(bar, kBytes);
      LSTM_UNROLL
      for (int i = 0; i < kSourcesOfChunk; ++i) {
        LSTM_UNROLL
        for (int j = 0; j < F::kCells; ++j)
          (i % 2 ? odd : sums)[j] +=
              to_compute(from[(chunk * kSourcesOfChunk + i) * F::kSums + 32 * j]);
      }
    }
    LSTM_UNROLL
    for (int j = 0; j < F::kCells; ++j) sums[j] += odd[j];
  }

  // This lane's four sums of one of the warp's row tiles and a column tile.
  LSTM_DEVICE void send(int step, int turn, int row_tile, int tile, const float (&sums)[4]) const {
    const int unit_tiles = warp() * F::kRowTiles + row_tile;
    const int owner = unit_tiles / kUnitTiles, unit_tile = unit_tiles % kUnitTiles;
    const int buffer = step % 2 * F::kTurns + turn;
    Sum* const to = sums_ + buffer * kBuffer + block_ * F::kSums +
                    ((unit_tile * F::kTiles + tile) * 32 + lane()) * 4;
    uint64_t* const bar = bars_ + buffer * kChunks + block_ / kSourcesOfChunk;
    ptx::store_async(reinterpret_cast<Packet*>(to), packet<F>(sums), bar, unsigned(owner));
  }

 private:
  Sum* sums_;
  uint64_t* bars_;
  int block_;
};

}  // namespace lstm_cuda::resident
