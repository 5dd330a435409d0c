// How h travels in family rec_cluster: each block sends its units' h to every block of its cluster
// by st.async, which brings its own completion.
//
// Shared memory: h in 2 buffers for each turn, [part][column tile][octet of units] x 8 columns x 16 bytes,
// what ldmatrix reads without bank conflicts; for each buffer an mbarrier for each part of the depth that
// a warp waits for by itself (split) and each chunk of that (so that products begin before all is there).
// Protocol, of each turn by itself: h of step s goes to buffer s % 2. Its mbarriers expect the bytes of their octets from all
// blocks; one thread that has waited arms the barrier again, for step s + 2.
// No "buffer is empty" signal is needed: a block sends h of step s only when all its warps have
// finished step s - 1's product, for which h of step s - 1 had come from all blocks, each of which had
// by then finished reading h of step s - 2, the same buffer. For the same reason nobody who waits for a
// phase can miss it: the next one of that barrier needs what the waiting warp has yet to send or to add.
#pragma once

#include "resident_team.cuh"

namespace lstm_cuda::resident {

template <class F>
class ClusterExchange {
  static constexpr int kBlocks = F::shape.blocks, kOctets = F::shape.hidden / 8;
  static constexpr int kChunks = F::kSteps >= 8 ? 2 : 1;
  static constexpr int kOctetsOfChunk = kOctets / (F::kSplit * kChunks);
  static constexpr int kStepsOfChunk = F::kSteps / kChunks;
  static constexpr int kBuffer = F::kParts * F::kTiles * kOctets * 8;  // pieces of 16 bytes
  static constexpr int kBars = F::kSplit * kChunks;                    // of a buffer
  static constexpr int kBuffers = 2 * F::kTurns;
  static constexpr unsigned kBytes = F::kParts * F::kTiles * kOctetsOfChunk * 128;
  static_assert(kStepsOfChunk % 2 == 0 && kOctets % (F::kSplit * kChunks) == 0);

 public:
  static constexpr Family kFamily = Family::rec_cluster;
  static constexpr bool kOrders = true;  // memory, when h is received
  static constexpr std::size_t kSharedBytes = kBuffers * (kBuffer * 16 + kBars * 8);

  LSTM_DEVICE ClusterExchange(ptx::Shared& shared, uint32_t*, const WarpRole<F>& role)
      : h_(shared.take<uint4>(kBuffers * kBuffer, 128)),
        bars_(shared.take<uint64_t>(kBuffers * kBars)),
        split_(role.split) {}

  LSTM_DEVICE void begin() {
    if (ptx::thread_index() == 0)
      for (int i = 0; i < kBuffers * kBars; ++i) ptx::mbarrier_init(bars_ + i, 1);
    ptx::cluster_sync();  // all blocks have begun and made their barriers before anything is sent
    if (ptx::thread_index() == 0)
      for (int i = 0; i < kBuffers * kBars; ++i) ptx::mbarrier_expect(bars_ + i, kBytes);
  }

  // Calls use(column tile of the turn, depth step of this warp, operand) for all of them.
  template <class Use, class Spoil>
  LSTM_DEVICE void receive(int step, int turn, Use use, Spoil) {
    const int buffer = step % 2 * F::kTurns + turn;
    const uint4* const from = h_ + buffer * kBuffer + split_ * (kOctets / F::kSplit) * 8 + lane();
    LSTM_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint64_t* const bar = bars_ + buffer * kBars + split_ * kChunks + chunk;
      ptx::mbarrier_wait(bar, unsigned(step - 1) / 2 % 2);
      if (warp() % F::kGroups == 0 && lane() == 0) ptx::mbarrier_expect(bar, kBytes);
      LSTM_UNROLL
      for (int i = 0; i < kStepsOfChunk / 2; ++i) {
        const int k = chunk * kStepsOfChunk + 2 * i;
        LSTM_UNROLL
        for (int tile = 0; tile < F::kTiles; ++tile) {
          uint32_t b[2][F::kParts][2];
          LSTM_UNROLL
          for (int part = 0; part < F::kParts; ++part) {
            uint32_t r[4];  // two steps of 16: four octets
            ptx::ldmatrix_x4(r, from + ((part * F::kTiles + tile) * kOctets + 2 * k) * 8);
            LSTM_UNROLL
            for (int n = 0; n < 4; ++n) b[n / 2][part][n % 2] = r[n];
          }
          use(tile, k, b[0]);
          use(tile, k + 1, b[1]);
        }
      }
    }
  }

  // h of unit g of the octet and columns 2q and 2q + 1 of the tile, for that step.
  LSTM_DEVICE void send(int step, int octet, int tile, float h0, float h1) {
    const int g = lane() / 4, q = lane() % 4;
    uint32_t parts[F::kParts];
    to_parts<F::arithmetic>(h0, h1, parts);
    const int buffer = step % 2 * F::kTurns + tile / F::kTiles;
    uint64_t* const bar = bars_ + buffer * kBars + octet / kOctetsOfChunk;
    LSTM_UNROLL
    for (int part = 0; part < F::kParts; ++part) {
      // Turned: lane (g, q) has units 2q, 2q + 1 of column g. Then all four lanes get all 8 units.
      const uint32_t w = ptx::movmatrix(parts[part]);
      const uint32_t v = ptx::shuffle_xor(w, 1);
      const uint32_t low = q & 1 ? v : w, high = q & 1 ? w : v;
      const uint32_t low2 = ptx::shuffle_xor(low, 2), high2 = ptx::shuffle_xor(high, 2);
      const uint4 column = q & 2 ? uint4{low2, high2, low, high} : uint4{low, high, low2, high2};
      uint4* const to =
          h_ + buffer * kBuffer + ((part * F::kTiles + tile % F::kTiles) * kOctets + octet) * 8 + g;
      LSTM_UNROLL
      for (int i = 0; i < kBlocks / 4; ++i)
        ptx::store_async(to, column, bar, unsigned(q * (kBlocks / 4) + i));
    }
  }

 private:
  uint4* h_;
  uint64_t* bars_;
  int split_;
};

}  // namespace lstm_cuda::resident
