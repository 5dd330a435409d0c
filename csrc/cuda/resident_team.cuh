// The team of families rec_cluster and rec_group: weights packed as mma fragments (resident.h), products
// on tensor cores, depth split among warps that add up through shared memory. The Exchange is how h
// travels.
//
// Partial sums: [2][warp][pair], and a named barrier of the row group; each turn takes the other half.
// All wait at the barrier, and that of the next turn ends the reads of this one's sums. In a cluster that
// has one turn a step, warps that own no pair only arrive: such a warp may be one step ahead of its row
// group, but not two, since it waits for the group's h, and so for those who read its sums. In a group
// that is not enough: h comes as words that order nothing.
// There is no product in the first step: h0 is in gates_x already (families.h).
#pragma once

#include "rec_forward.cuh"
#include "resident.cuh"

namespace lstm_cuda::resident {

// Sums over the depth, of which each warp of a row group has a part.
// arrive: warps that own no pair need not wait.
template <class F, bool arrive>
class Partials {
  static constexpr bool kKeepsOwn = F::kOwners <= 2;  // else choosing takes longer than storing

 public:
  static constexpr int kPieces =
      F::kSplit > 1 ? 2 * F::kGroups * F::kSplit * F::kPairs * 2 * 32 : 0;

  LSTM_DEVICE explicit Partials(ptx::Shared& shared) {
    if constexpr (F::kSplit > 1) pieces_ = shared.take<float4>(kPieces, 16) + lane();
  }

  // What this warp's pairs come to; only owners get it. Turns are counted through all steps.
  template <class AllSums>
  LSTM_DEVICE void add_up(int turn, int group, int split, const AllSums& sums,
                          float (&own)[F::kOwned][2][4]) const {
    if constexpr (F::kSplit == 1) {
      LSTM_UNROLL
      for (int i = 0; i < F::kPairs * 8; ++i)
        own[i / 8][i / 4 % 2][i % 4] = total(sums, i / 8, i / 4 % 2, i % 4);
    } else {
      LSTM_UNROLL
      for (int j = 0; j < F::kPairs; ++j) {
        const bool mine = j % F::kOwners == split;
        LSTM_UNROLL
        for (int atom = 0; atom < 2; ++atom) {
          const float4 v{total(sums, j, atom, 0), total(sums, j, atom, 1), total(sums, j, atom, 2),
                         total(sums, j, atom, 3)};
          if (!kKeepsOwn || !mine) *at(turn, group, split, j, atom) = v;
          if (kKeepsOwn && mine) set(own[j / F::kOwners][atom], v);
        }
      }
      const unsigned barrier = 1 + unsigned(turn % 2 * F::kGroups + group);
      if (arrive && split >= F::kOwners) {
        ptx::named_arrive(barrier, 32 * F::kSplit);  // this warp's sums are there
        return;
      }
      ptx::named_sync(barrier, 32 * F::kSplit);  // all warps' sums are there
      if (split >= F::kOwners) return;
      LSTM_UNROLL
      for (int i = 0; i < F::kOwned * 2; ++i) {
        const int j = i / 2 * F::kOwners + split;
        LSTM_UNROLL
        for (int n = 0; n < F::kSplit - kKeepsOwn; ++n) {
          const int other = kKeepsOwn && n >= split ? n + 1 : n;
          const float4 v = *at(turn, group, other, j, i % 2);
          float (&to)[4] = own[i / 2][i % 2];
          if (!kKeepsOwn && n == 0) {
            set(to, v);
          } else {
            to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
          }
        }
      }
    }
  }

 private:
  template <class AllSums>
  static LSTM_DEVICE float total(const AllSums& sums, int pair, int atom, int i) {
    const int row = pair / F::kTiles * 2 + atom, tile = pair % F::kTiles;
    float v = sums[0][row][tile].total(i);
    if constexpr (F::kChains == 2) v += sums[1][row][tile].total(i);
    return v;
  }
  static LSTM_DEVICE void set(float (&to)[4], const float4& v) {
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
  LSTM_DEVICE float4* at(int turn, int group, int split, int pair, int atom) const {
    const int row = ((turn % 2 * F::kGroups + group) * F::kSplit + split) * F::kPairs + pair;
    return pieces_ + (row * 2 + atom) * 32;
  }

  float4* pieces_;
};

template <class F, template <class> class ExchangeOf>
class Team {
  using Exchange = ExchangeOf<F>;
  using Partials = resident::Partials<F, Exchange::kOrders && F::kTurns == 1>;
  static constexpr int kRows = F::fragments.row_tiles();
  using Held = Weights<F::kParts, kRows, F::kSteps, 0, F::shape.shared_forward>;
  static_assert(2 * F::kGroups < 16, "barriers of a block");
  static constexpr bool kScaled = sizeof(typename F::Element) == 4;  // rows of weights are

 public:
  static constexpr Family kFamily = Exchange::kFamily;
  static constexpr bool kTakesState = false;

  static constexpr std::size_t kSharedBytes = Exchange::kSharedBytes +
                                              Partials::kPieces * sizeof(float4) +
                                              F::shape.warps * Held::kPieces * 16;
  struct Source {
    PackedWeights weights;
    uint32_t* words;  // of the exchange, if that is through global memory
  };

  LSTM_DEVICE Team(ptx::Shared& shared, const Source& source, const WarpRole<F>& role, int d, int)
      : role_(role), exchange_(shared, source.words, role), partials_(shared) {
    const ForwardFragments fragments{F::shape};
    weights_.load(source.weights.fragments,
                  first_piece(fragments, d, role.block, warp(), F::kParts), shared);
    LSTM_UNROLL
    for (int i = 0; i < F::kOwned * 4 && kScaled; ++i) {
      const int row = (d * 4 + i % 4) * F::shape.hidden + role.unit(i / 4) + lane() / 4;
      unscale_[i / 4][i % 4] = source.weights.unscale[row];
    }
    exchange_.begin();
  }

  LSTM_DEVICE void sums(int step, int turn, float (&own)[F::kOwned][2][4]) {
    Sums<F::arithmetic> all[F::kChains][kRows][F::kTiles];
    using Operand = uint32_t[F::kParts][2];
    const auto use = [&](int tile, int k, const Operand& b) {
      LSTM_UNROLL
      for (int row = 0; row < kRows; ++row) {
        uint32_t a[F::kParts][4];
        weights_.get(row, k, a);
        all[k % F::kChains][row][tile].add(a, b);
      }
    };
    const auto spoil = [&](int tile, const Operand& b) {
      const uint32_t zeros[F::kParts][4] = {};
      LSTM_UNROLL
      for (int row = 0; row < kRows; ++row) all[0][row][tile].add(zeros, b);
    };
    exchange_.receive(step, turn, use, spoil);
    partials_.add_up(step * F::kTurns + turn, role_.group, role_.split, all, own);
    LSTM_UNROLL
    for (int i = 0; i < F::kOwned * 8 && kScaled; ++i)
      own[i / 8][i / 4 % 2][i % 4] *= unscale_[i / 8][i / 4 % 2 * 2 + i / 2 % 2];
  }

  LSTM_DEVICE void send(int step, int octet, int tile, float h0, float h1) {
    exchange_.send(step, octet, tile, h0, h1);
  }

 private:
  WarpRole<F> role_;
  Exchange exchange_;
  Partials partials_;
  Held weights_;
  float unscale_[F::kOwned][4];
};

}  // namespace lstm_cuda::resident
