// How sums travel in family rec_group: as 32-bit words through global memory (L2), each of which
// says by itself whether it is the one that is waited for.
//
// Words: sums in 2 slots for each group, [owner][source][column tile][128 sums], floats or
// pairs of 16-bit values. Zeroed before the launch.
// Protocol: the lowest bit of a word tells uses of a slot apart: set in the first, clear in the
// second, and so on. A value loses up to a unit of its last place by that (of 16-bit sums every
// other one), but no NaN and no infinity is lost. Sums of step s go to slot s % 2. The block's
// threads share out the sources, ask for all they want at once, and add it in the order of the
// sources; then they add up through shared memory, in a fixed order.
// Two slots are enough. Block A overwrites in step s what it sent to block O in step s - 2. It does
// so after a block_sync that its threads reach with all sums of step s - 1 read, those of O among
// them; O sent these after a block_sync that its threads reached with all sums of step s - 2 read,
// those of A among them. (Words arrive one by one, and none of this needs more than that: a load
// that has found its word is over, and all of a block's loads of a step come before its block_sync
// and its next stores.)
// Barriers: a block_sync in each receive. Partial sums are complete before they are added up; and
// dgates of the step before are multiplied by all warps before any cell of this step overwrites
// them, so that one buffer of dgates is enough. The kernel's own block_sync, which follows, ends
// the reads of partial sums before the next step writes them.
#pragma once

#include "rec_backward.cuh"

namespace lstm_cuda::resident {

template <class F>
class GroupReduce {
  using Sum = typename F::Sum;
  static_assert(F::kTurns == 1);
  static constexpr int kBlocks = F::shape.blocks;
  static constexpr int kSourceWords = F::kSums * sizeof(Sum) / 4;
  static constexpr int kOwnerWords = kBlocks * kSourceWords, kSlotWords = kBlocks * kOwnerWords;
  // A thread reads one piece of 16 bytes of each of its sources.
  static constexpr int kPieces = kSourceWords / 4, kOfPiece = F::kSums / kPieces;
  static constexpr int kSharers = F::kThreads / kPieces, kSources = kBlocks / kSharers;
  static_assert(F::kThreads % kPieces == 0 && kBlocks % kSharers == 0);
  // Pieces that a thread asks for at once.
  static constexpr int at_once() {
    int n = 8;
    while (kSources % n) --n;
    return n;
  }
  static constexpr int kAtOnce = at_once();

 public:
  static constexpr Family kFamily = Family::rec_group;
  static constexpr int kOperands = 1;
  static constexpr std::size_t kSharedBytes = kSharers * F::kSums * sizeof(float);
  static constexpr int64_t kWords = 2 * kSlotWords;  // of a group
  static_assert(kWords == group_words(F::arithmetic, F::shape, F::kTiles, true));

  LSTM_DEVICE GroupReduce(ptx::Shared& shared, uint32_t* words, unsigned group, unsigned block)
      : partial_(shared.take<float>(kSharers * F::kSums, 16)),
        from_(words + group * kWords + int(block) * kOwnerWords +
              int(ptx::thread_index()) / kPieces * kSources * kSourceWords +
              int(ptx::thread_index()) % kPieces * 4),
        to_(words + group * kWords + warp() * F::kRowTiles * kOwnerWords +
            int(block) * kSourceWords + lane() * int(sizeof(typename F::Packet) / 4)) {}

  LSTM_DEVICE void begin() const {}

  // What has come for this thread's cells, if it has any. All threads of the block call this, once
  // for each step that is sent.
  LSTM_DEVICE void receive(int step, int, bool has_cells, int tile, int quad,
                           float (&sums)[F::kCells]) {
    const uint32_t tag = tag_of(step);
    const auto ready = [tag](const uint4& v) {
      return (((v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag)) & 1) == 0;
    };
    float added[kOfPiece] = {};
    LSTM_NO_UNROLL
    for (int first = 0; first < kSources; first += kAtOnce) {
      uint4 found[kAtOnce];
      ptx::word_poll4(found, from_ + first * kSourceWords, kSourceWords, ready);
      LSTM_UNROLL
      for (int i = 0; i < kAtOnce; ++i) add(found[i], added);
    }
    LSTM_UNROLL
    for (int i = 0; i < kOfPiece; i += 4)
      ptx::store(partial_ + int(ptx::thread_index()) * kOfPiece + i,
                 float4{added[i], added[i + 1], added[i + 2], added[i + 3]});
    ptx::block_sync();  // partial sums are complete; dgates of the step before are multiplied
    const int other_slot = step % 2 ? -kSlotWords : kSlotWords;
    from_ += other_slot, to_ += other_slot;
    if (!has_cells) return;
    LSTM_UNROLL
    for (int i = 0; i < kSharers; ++i) {
      LSTM_UNROLL
      for (int j = 0; j < F::kCells; ++j)
        sums[j] += partial_[i * F::kSums + first_sum<F>(tile, quad) + 32 * j];
    }
  }

  // This lane's four sums of one of the warp's row tiles and a column tile.
  LSTM_DEVICE void send(int step, int, int row_tile, int tile, const float (&sums)[4]) const {
    static_assert(F::kUnits == 16, "a row tile is what one owner has");
    const uint32_t tag = tag_of(step);
    auto v = packet<F>(sums);
    v.x = tagged(v.x, tag), v.y = tagged(v.y, tag);
    if constexpr (sizeof v == 16) v.z = tagged(v.z, tag), v.w = tagged(v.w, tag);
    constexpr int kTileWords = 32 * sizeof v / 4;
    ptx::word_store(to_ + row_tile * kOwnerWords + tile * kTileWords, v);
  }

 private:
  static LSTM_DEVICE uint32_t tag_of(int step) { return step / 2 % 2 ? 0 : 1; }

  // The last bit goes, to the side where the one before it is set: as often up as down, without a
  // carry. So infinity stays what it is, and a NaN a NaN.
  static LSTM_DEVICE uint32_t tagged(uint32_t w, uint32_t tag) {
    return (w & ~1u) | (w & 1) << 1 | tag;
  }

  static LSTM_DEVICE void add(const uint4& v, float (&sums)[kOfPiece]) {
    const uint32_t words[4] = {v.x & ~1u, v.y & ~1u, v.z & ~1u, v.w & ~1u};
    Sum values[kOfPiece];
    std::memcpy(values, words, sizeof words);
    LSTM_UNROLL
    for (int i = 0; i < kOfPiece; ++i) sums[i] += to_compute(values[i]);
  }

  float* partial_;
  // In the slot that is received from, or sent to, next.
  uint32_t* from_;  // this thread's piece of its first source
  uint32_t* to_;    // this lane's sums for the owner of the warp's first row tile
};

}  // namespace lstm_cuda::resident
