// Products of the backward recurrence with resident weights (rec_backward.cuh): dgates as operand,
// and what a warp does with its weights.
#pragma once

#include <algorithm>
#include <type_traits>

#include "resident.cuh"
#include "scale.cuh"

namespace lstm_cuda::resident {

template <Arithmetic arithmetic_, ResidentShape shape_, int tiles_, int turns_,
          CellKind cell = CellKind::plain>
struct BackwardConfig {
  static constexpr Arithmetic arithmetic = arithmetic_;
  static constexpr ResidentShape shape = shape_;
  static constexpr CellKind kCell = cell;
  static constexpr BackwardFragments fragments{shape};
  using Element = typename Types<arithmetic>::Element;
  static constexpr int kParts = parts_of(arithmetic);
  static constexpr bool kScaled = sizeof(Element) == 4;  // operands are, weights and dgates
  // Column tiles of one turn, and turns of one step: a part has kTiles * kTurns.
  static constexpr int kTiles = tiles_, kTurns = turns_, kColumns = 8 * kTiles * kTurns;
  static constexpr int kUnits = shape.units(), kThreads = shape.threads();
  static constexpr int kRowTiles = fragments.row_tiles(), kSteps = fragments.steps();
  // Quads of a column tile are shared out among kWarpsOfTile warps, kCells for each.
  static constexpr int kQuads = kUnits / 4;
  static constexpr int kWarpsOfTile = std::min(shape.warps / kTiles, kQuads);
  static constexpr int kCells = kQuads / kWarpsOfTile;
  static constexpr int kCellWarps = kWarpsOfTile * kTiles;
  // What travels: for each unit tile of 16 and column tile of the owner 128 sums.
  using Sum = std::conditional_t<kScaled, float, Element>;
  using Packet = std::conditional_t<kScaled, uint4, uint2>;  // four of them
  static constexpr int kSums = kUnits * 8 * kTiles;          // of a turn, from source to owner
  static_assert(kUnits % 16 == 0 && shape.warps % kTiles == 0 && kSteps % 2 == 0);
  static_assert(kQuads % kWarpsOfTile == 0 && 4 % kCells == 0,
                "quads of a warp are in one unit tile");
  using Weights = resident::Weights<kParts, kRowTiles, kSteps, shape.shared_backward, 0>;
};

// The cell of this lane in a quad of 4 units and 8 columns: sum 32 n + lane of a 16 x 8 tile.
LSTM_DEVICE int unit_of_quad() { return lane() / 16 * 2 + lane() / 2 % 2; }
LSTM_DEVICE int column_of_quad() { return lane() / 4 % 4 * 2 + lane() % 2; }

// Where the sums of a warp's first cells are among an owner's; those of its next quad are 32
// further.
template <class F>
LSTM_DEVICE int first_sum(int tile, int quad) {
  return ((quad / 4 * F::kTiles + tile) * 4 + quad % 4) * 32 + lane();
}

LSTM_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

LSTM_DEVICE uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
LSTM_DEVICE float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

template <class F>
LSTM_DEVICE typename F::Packet packet(const float (&sums)[4]) {
  if constexpr (F::kScaled)
    return {bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[2]), bits_of(sums[3])};
  else
    return {packed<F::arithmetic>(sums[0], sums[1]), packed<F::arithmetic>(sums[2], sums[3])};
}

// dgates of a turn as B operand: for each column tile and step in depth what lane (g, q) needs, gates i, f,
// g, o of unit q of that step and of column g. 16-bit values of two steps share 16 bytes, so that
// each load is of 16. For scaled operands also the sizes from which scales are found. Turns, counted
// through all steps, take the buffers one after the other.
template <class F, int kBuffers>
class Operand {
  using Element = typename F::Element;
  static constexpr int kPerPiece = F::kScaled ? 1 : 2;  // steps
  static constexpr int kPieces = F::kTiles * F::kSteps / kPerPiece * 32;
  static constexpr int kSizes = F::kScaled ? F::kCellWarps * 8 : 0;

 public:
  static constexpr std::size_t kSharedBytes = kBuffers * (kPieces * 16 + kSizes * 4);

  LSTM_DEVICE explicit Operand(ptx::Shared& shared)
      : pieces_(shared.take<uint4>(kBuffers * kPieces, 16)),
        sizes_(shared.take<uint32_t>(kBuffers * kSizes)) {}

  // This lane's cell of a quad.
  LSTM_DEVICE void store(int turn, int tile, int quad, const Element (&gates)[4]) const {
    uint4* const to = pieces_ + turn % kBuffers * kPieces +
                      (tile * F::kSteps + quad) / kPerPiece * 32 +
                      place(4 * column_of_quad() + unit_of_quad());
    uint32_t words[sizeof gates / 4];
    std::memcpy(words, gates, sizeof gates);
    if constexpr (F::kScaled)
      ptx::store(to, uint4{words[0], words[1], words[2], words[3]});
    else
      ptx::store(reinterpret_cast<uint2*>(to) + quad % 2, uint2{words[0], words[1]});
  }

  // The size of this lane's largest value. Only if kScaled.
  LSTM_DEVICE void store_size(int turn, uint32_t size) const {
    // Lanes that differ in these bits have other units of the same column.
    size = larger(size, ptx::shuffle_xor(size, 16));
    size = larger(size, ptx::shuffle_xor(size, 2));
    if (unit_of_quad() == 0)
      sizes_[turn % kBuffers * kSizes + warp() * 8 + column_of_quad()] = size;
  }
  // As bits, which are ordered as sizes are. (A NaN or an infinity makes the scale small: it stays
  // what it is, and nothing else of its column matters.)
  static LSTM_DEVICE uint32_t size_of(float v) { return bits_of(v) & 0x7FFFFFFFu; }

  struct Fragments {
    uint32_t b[F::kSteps][F::kParts][2];
    float unscale[2];  // of columns 2q and 2q + 1; only if kScaled
  };

  LSTM_DEVICE void load(int turn, int tile, Fragments& all) const {
    const uint4* const from =
        pieces_ + turn % kBuffers * kPieces + tile * F::kSteps / kPerPiece * 32 + place(lane());
    float scale = 1;
    if constexpr (F::kScaled) {
      const int exponent = clamped_exponent(column_size(turn, tile));
      scale = power_of_two(exponent);
      const float unscale = power_of_two(-exponent);
      all.unscale[0] = ptx::shuffle(unscale, unsigned(lane() % 4 * 8));
      all.unscale[1] = ptx::shuffle(unscale, unsigned(lane() % 4 * 8 + 4));
    }
    LSTM_UNROLL
    for (int i = 0; i < F::kSteps / kPerPiece; ++i) {
      const uint4 v = ptx::load<uint4>(from + 32 * i);
      if constexpr (F::kScaled) {
        uint32_t low[F::kParts], high[F::kParts];
        to_parts<F::arithmetic>(float_of(v.x) * scale, float_of(v.y) * scale, low);
        to_parts<F::arithmetic>(float_of(v.z) * scale, float_of(v.w) * scale, high);
        LSTM_UNROLL
        for (int part = 0; part < F::kParts; ++part)
          all.b[i][part][0] = low[part], all.b[i][part][1] = high[part];
      } else {
        all.b[2 * i][0][0] = v.x, all.b[2 * i][0][1] = v.y;
        all.b[2 * i + 1][0][0] = v.z, all.b[2 * i + 1][0][1] = v.w;
      }
    }
  }

 private:
  // Of what lane l reads. Lanes that store at a time differ in other bits than lanes that load at a
  // time: this keeps the banks of both apart.
  static LSTM_DEVICE int place(int l) { return l ^ (l / 4 & 2); }

  LSTM_DEVICE uint32_t column_size(int turn, int tile) const {
    uint32_t size = 0;
    LSTM_UNROLL
    for (int i = 0; i < F::kWarpsOfTile; ++i)
      size =
          larger(size, sizes_[turn % kBuffers * kSizes + (i * F::kTiles + tile) * 8 + lane() / 4]);
    return size;
  }

  uint4* pieces_;
  uint32_t* sizes_;
};

// What sums have to be multiplied by, row by row. The first block_sync of the kernel makes them
// complete.
template <class F>
class RowScales {
 public:
  static constexpr int kValues = F::kScaled ? F::shape.hidden : 0;

  LSTM_DEVICE RowScales(ptx::Shared& shared, const float* unscale)
      : values_(shared.take<float>(kValues, 16)) {
    for (int i = int(ptx::thread_index()); i < kValues; i += F::kThreads) values_[i] = unscale[i];
  }

  // Of rows g and g + 8 of one of the warp's row tiles: neighbours among the units.
  LSTM_DEVICE float2 of(int row_tile) const {
    return ptx::load<float2>(values_ + (warp() * F::kRowTiles + row_tile) * 16 +
                             BackwardFragments::unit_of_row(lane() / 4));
  }

 private:
  float* values_;
};

// This warp's part of dh, of a turn's column tiles, to its owners.
template <class F, class Operand, class Reduce>
class Multiplier {
  static constexpr int kShared = F::shape.shared_backward, kHeld = F::kRowTiles - kShared;
  // Weights in shared memory are read once for all column tiles; then operands take more registers.
  static constexpr int kTogether = kShared > 0 ? F::kTiles : 1;
  // An mma answers late: each quarter of a multiprocessor should have four sums that go on side by
  // side, of several row tiles, column tiles, parts or, where that is not enough, halves of the
  // depth.
  static constexpr int kAtOnce = kHeld % 2 || kShared % 2 || kTogether * F::kParts > 1 ? 1 : 2;
  static constexpr int kSideBySide = kAtOnce * kTogether * F::kParts * F::shape.warps / 4;
  static constexpr int kChains = kSideBySide < 4 && F::kParts == 1 ? 2 : 1;
  using Fragments = typename Operand::Fragments[kTogether];

 public:
  const typename F::Weights& weights;
  const Operand& operand;
  const RowScales<F>& scales;
  const Reduce& reduce;
  int step, turn;

  LSTM_DEVICE void run() const {
    // Many tiles keep a warp busy; more side by side would take more registers than there are.
    if constexpr (F::kRowTiles * F::kTiles < 16) {
      LSTM_UNROLL
      for (int tile = 0; tile < F::kTiles; tile += kTogether) multiply(tile);
    } else {
      LSTM_NO_UNROLL
      for (int tile = 0; tile < F::kTiles; tile += kTogether) multiply(tile);
    }
  }

 private:
  LSTM_DEVICE void multiply(int tile) const {
    Fragments all;
    LSTM_UNROLL
    for (int m = 0; m < kTogether; ++m) operand.load(step * F::kTurns + turn, tile + m, all[m]);
    LSTM_UNROLL
    for (int i = 0; i < kHeld; i += kAtOnce) multiply<false>(i, tile, all);
    LSTM_NO_UNROLL
    for (int i = kHeld; i < F::kRowTiles; i += kAtOnce) multiply<true>(i, tile, all);
  }

  // kAtOnce row tiles from the warp's i-th on.
  template <bool shared>
  LSTM_DEVICE void multiply(int i, int tile, const Fragments& all) const {
    Sums<F::arithmetic> sums[kAtOnce][kTogether][kChains];
    LSTM_UNROLL
    for (int k = 0; k < F::kSteps; ++k) {
      LSTM_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        uint32_t a[F::kParts][4];
        if constexpr (shared) {
          LSTM_UNROLL
          for (int part = 0; part < F::kParts; ++part) weights.get_shared(part, i + n, k, a[part]);
        } else {
          weights.get(i + n, k, a);
        }
        LSTM_UNROLL
        for (int m = 0; m < kTogether; ++m) sums[n][m][k % kChains].add(a, all[m].b[k]);
      }
    }
    LSTM_UNROLL
    for (int n = 0; n < kAtOnce; ++n) {
      float2 unscale{1, 1};
      if constexpr (F::kScaled) unscale = scales.of(i + n);
      LSTM_UNROLL
      for (int m = 0; m < kTogether; ++m) {
        float totals[4];
        LSTM_UNROLL
        for (int r = 0; r < 4; ++r) {
          totals[r] = sums[n][m][0].total(r);
          if constexpr (kChains == 2) totals[r] += sums[n][m][1].total(r);
          if constexpr (F::kScaled)
            totals[r] = totals[r] * (r / 2 ? unscale.y : unscale.x) * all[m].unscale[r % 2];
        }
        reduce.send(step, turn, i + n, tile + m, totals);
      }
    }
  }
};

}  // namespace lstm_cuda::resident
