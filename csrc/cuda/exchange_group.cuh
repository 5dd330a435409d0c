// How h travels in family rec_group: as 32-bit words through global memory (L2), each of which says by
// itself whether it is the one that is waited for.
//
// Words: h in 2 slots for each group, [part][column tile][32 units] x 32 lanes x 4 words, what a lane
// needs as B operand of two products (octets 0 to 3 of the 32 units). Zeroed before the launch.
// Protocol: |h| <= 1 leaves bit 14 of a float16 or bfloat16 free (both parts of a float32 are such). It
// tells uses of a slot apart: set in the first, clear in the second, and so on. h of step s goes to slot
// s % 2, first at step 1. Two slots are enough: a block sends h of step s when its warps together have
// read all of h of step s - 1, and each of these words was sent after its block had read all of h of
// step s - 2, the slot's former use.
// A NaN would have bit 14 set: it travels as the largest pattern without that bit, which no h has, and
// products that meet it add a NaN to the sums of its column.
#pragma once

#include "resident_team.cuh"

namespace lstm_cuda::resident {

template <class F>
class GroupExchange {
  static constexpr uint32_t kTag = 0x40004000u;
  static constexpr uint32_t kNaN = 0x3FFFu;
  static constexpr uint32_t kOne = F::arithmetic == Arithmetic::bfloat16 ? 0x3F80u : 0x3C00u;
  static_assert(F::kTurns == 1);
  static constexpr int kOctets = F::shape.hidden / 8;
  static constexpr int kPieces = F::kSteps / 2;  // of 16 bytes, of a column tile and a part
  static constexpr int kSlotWords = F::kParts * F::kTiles * kOctets / 4 * 128;

 public:
  static constexpr Family kFamily = Family::rec_group;
  static constexpr bool kOrders = false;  // memory, when h is received
  static constexpr std::size_t kSharedBytes = 0;
  static constexpr int64_t kWords = 2 * kSlotWords;  // of a group
  static_assert(kWords == group_words(F::arithmetic, F::shape, F::kTiles, false));

  LSTM_DEVICE GroupExchange(ptx::Shared&, uint32_t* words, const WarpRole<F>& role)
      : words_(words + role.team * kWords), split_(role.split) {}

  LSTM_DEVICE void begin() {}

  template <class Use, class Spoil>
  LSTM_DEVICE void receive(int step, int, Use use, Spoil spoil) {
    const uint32_t tag = tag_of(step);
    const auto ready = [tag](const uint4& v) {
      return (((v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag)) & kTag) == 0;
    };
    LSTM_UNROLL
    for (int tile = 0; tile < F::kTiles; ++tile) {
      uint4 found[F::kParts][kPieces];
      LSTM_UNROLL
      for (int part = 0; part < F::kParts; ++part)
        ptx::word_poll4(found[part], at(step, part, tile, split_ * kPieces, lane() * 4), 128,
                        ready);
      ptx::warp_sync();  // lanes come from their waits together
      uint32_t larger = 0;
      LSTM_UNROLL
      for (int k = 0; k < F::kSteps; ++k) {
        uint32_t b[F::kParts][2];
        LSTM_UNROLL
        for (int part = 0; part < F::kParts; ++part) {
          const uint4& v = found[part][k / 2];
          b[part][0] = (k % 2 ? v.z : v.x) ^ tag;
          b[part][1] = (k % 2 ? v.w : v.y) ^ tag;
          // Bit 14 of a half of these sums is set where its size is above 1.
          larger |=
              (b[part][0] + (kNaN - kOne) * 0x10001u) | (b[part][1] + (kNaN - kOne) * 0x10001u);
        }
        use(tile, k, b);
      }
      if (ptx::ballot(larger & kTag)) {
        uint32_t b[F::kParts][2] = {};
        if (larger & kTag) b[0][0] = 0x7FFF7FFFu;
        spoil(tile, b);
      }
    }
  }

  LSTM_DEVICE void send(int step, int octet, int tile, float h0, float h1) {
    uint32_t parts[F::kParts];
    to_parts<F::arithmetic>(h0, h1, parts);
    LSTM_UNROLL
    for (int part = 0; part < F::kParts; ++part) {
      uint32_t w = parts[part];
      if (h0 != h0) w = (w & 0xFFFF0000u) | (part == 0 ? kNaN : 0u);
      if (h1 != h1) w = (w & 0x0000FFFFu) | (part == 0 ? kNaN << 16 : 0u);
      // Turned: lane (g, q) has units 2q, 2q + 1 of column g.
      ptx::word_store(at(step, part, tile, octet / 4, lane() * 4 + octet % 4),
                      ptx::movmatrix(w) | tag_of(step));
    }
  }

 private:
  static LSTM_DEVICE uint32_t tag_of(int step) { return (step - 1) / 2 % 2 ? 0u : kTag; }
  LSTM_DEVICE uint32_t* at(int step, int part, int tile, int piece, int word) const {
    return words_ + step % 2 * kSlotWords +
           ((part * F::kTiles + tile) * (kOctets / 4) + piece) * 128 + word;
  }

  uint32_t* words_;
  int split_;
};

}  // namespace lstm_cuda::resident
