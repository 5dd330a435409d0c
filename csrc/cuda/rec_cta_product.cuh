// The product of family rec_cta, with weights that stay in registers.
//
// A block has one tile of 8 batch rows, the columns of all its matrices, of one recurrence, for all
// steps. Its product is
//   result [rows, 8] = weights [rows, depth] * operand [depth, 8]
// Weights live in registers, the operand in shared memory. Rows come in atoms of 16: lane
// (g = lane / 4, q = lane % 4) gets of each atom rows g and g + 8 of columns 2q and 2q + 1, in the
// order (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1). That is how mma leaves its results; the
// exact products do the same.
#pragma once

#include <cstdint>
#include <cstring>

#include "element.cuh"

namespace lstm_cuda::rec_cta {

inline constexpr int kColumns = 8;  // of a tile: the N of every mma

// The operand in shared memory: chunks of 16 bytes, each part of one column, the 8 columns of a
// chunk row side by side. The 8 rows of 16 bytes that ldmatrix wants for one 8 x 16-byte matrix are
// then 128 contiguous bytes; 16 bytes between chunk rows keep the stores of results apart too.
template <class Value, int kDepth>
struct OperandTile {
  static constexpr int kPerChunk = 16 / sizeof(Value);
  static constexpr int kPitch = (kColumns + 1) * kPerChunk;
  static constexpr int kValues = kDepth / kPerChunk * kPitch;
  static_assert(kDepth % (4 * kPerChunk) == 0);

  Value* values;

  LSTM_DEVICE Value* chunk(int index, int column) const {
    return values + index * kPitch + column * kPerChunk;
  }
  LSTM_DEVICE Value& at(int k, int column) const {
    return chunk(k / kPerChunk, column)[k % kPerChunk];
  }
};

// Weights on their way to registers: some gates of w_hh, or of its transpose, padded with zeros in
// shared memory. (Read straight from global memory, each with a check of bounds, they took more
// registers than there are: ptxas has all these loads in flight at once.) kPitch makes neighbouring
// rows differ by one bank, and is what just fits.
template <class Element, int kPadded>
struct WeightPanel {
  static constexpr int kGates = 128 / kPadded;  // as many as fit where later the ring of gates is
  static constexpr int kPitch = kPadded + 4 / sizeof(Element);
  static constexpr int kValues = kGates * kPadded * kPitch;
  static constexpr int kAtOnce = 4;  // loads of a thread in flight

  Element* values;

  // For kThreads threads: a multiple of kPadded, each has one column of w_hh.
  template <bool kTransposed, int kThreads>
  LSTM_DEVICE void fill(const Element* w_hh, int first_gate, int H) const {
    static_assert(kThreads % kPadded == 0 && 128 % (kThreads / kPadded * kAtOnce) == 0);
    constexpr int kStride = kThreads / kPadded;
    const int column = int(ptx::thread_index()) % kPadded;
    for (int row = int(ptx::thread_index()) / kPadded; row < 128; row += kStride * kAtOnce) {
      Element loaded[kAtOnce];
      LSTM_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        const int gate = (row + n * kStride) / kPadded, of_gate = (row + n * kStride) % kPadded;
        loaded[n] = to_element<Element>(0.f);
        if (of_gate < H && column < H)
          loaded[n] = w_hh[((first_gate + gate) * H + of_gate) * H + column];
      }
      LSTM_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        const int gate = (row + n * kStride) / kPadded, of_gate = (row + n * kStride) % kPadded;
        *at(gate * kPadded + (kTransposed ? column : of_gate), kTransposed ? of_gate : column) =
            loaded[n];
      }
    }
  }

  LSTM_DEVICE Element* at(int row, int k) const { return values + row * kPitch + k; }
};

// Products on tensor cores. Register r of lane (g, q) holds of a step's 16 rows and two chunks the
// part of row g + 8 * (r % 2) in chunk r / 2 that begins q / 4 into the chunk.
//
// kChains: so many sums of each atom go on side by side, because an mma answers late.
template <Arithmetic arithmetic, int kAtoms, int kDepth, int kChains>
class Product {
  using Element = typename Types<arithmetic>::Element;
  using Tile = OperandTile<Element, kDepth>;
  static constexpr int kPerChunk = Tile::kPerChunk;
  static constexpr int kPerRegister = 4 / sizeof(Element);
  static constexpr int kSteps = kDepth / (2 * kPerChunk);
  static_assert(kSteps % kChains == 0);

 public:
  // Takes what is in the panel. Rows says which row of which gate is where in the product.
  template <class Rows, class Panel>
  LSTM_DEVICE void load(const Panel& panel, int first_gate) {
    const int row = Rows::first_unit() + lane() / 4;
    LSTM_UNROLL
    for (int i = 0; i < kAtoms * kSteps * 4; ++i) {
      const int atom = i / (4 * kSteps), step = i / 4 % kSteps, r = i % 4;
      const int half = r % 2, chunk = (2 * step + r / 2) * kPerChunk;
      const int gate = Rows::gate(atom, half, chunk) - first_gate;
      if (gate < 0 || gate >= Panel::kGates) continue;
      const Element* const from =
          panel.at(gate * Rows::kPadded + row + Rows::unit(half), chunk % Rows::kPadded) +
          lane() % 4 * kPerRegister;
      if constexpr (arithmetic == Arithmetic::tf32) {
        const float rounded = ptx::round_tf32(*from);
        std::memcpy(&weights_[atom][step][r], &rounded, 4);
      } else {
        weights_[atom][step][r] = ptx::load<uint32_t>(from);
      }
    }
  }

  LSTM_DEVICE void multiply(const Tile& tile, float (&result)[kAtoms][4]) const {
    float sums[kChains][kAtoms][4] = {};
    LSTM_UNROLL
    for (int pair = 0; pair < kSteps / 2; ++pair) {
      uint32_t b[4];  // four chunks of eight columns: two steps
      ptx::ldmatrix_x4(b, tile.chunk(4 * pair + lane() / 8, lane() % 8));
      LSTM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int step = 2 * pair + half;
        const uint32_t columns[2] = {b[2 * half], b[2 * half + 1]};
        LSTM_UNROLL
        for (int atom = 0; atom < kAtoms; ++atom)
          mma(sums[step % kChains][atom], weights_[atom][step], columns);
      }
    }
    LSTM_UNROLL
    for (int atom = 0; atom < kAtoms; ++atom) {
      LSTM_UNROLL
      for (int i = 0; i < 4; ++i) {
        result[atom][i] = sums[0][atom][i];
        LSTM_UNROLL
        for (int chain = 1; chain < kChains; ++chain) result[atom][i] += sums[chain][atom][i];
      }
    }
  }

 private:
  static LSTM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (arithmetic == Arithmetic::tf32)
      ptx::mma_tf32(d, a, b);
    else if constexpr (arithmetic == Arithmetic::float16)
      ptx::mma_fp16(d, a, b);
    else
      ptx::mma_bf16(d, a, b);
  }

  uint32_t weights_[kAtoms][kSteps][4];
};

// Products without tensor cores. Lane (g, q) has of its rows every fourth chunk, multiplies all
// columns by these, and the four lanes of a row then share out the columns.
template <class Value, int kAtoms, int kDepth>
class ExactProduct {
  using Tile = OperandTile<Value, kDepth>;
  static constexpr int kPerChunk = Tile::kPerChunk;
  static constexpr int kChunks = kDepth / kPerChunk / 4;
  static constexpr int kRows = 2 * kAtoms;  // of a lane: g and g + 8 of each atom
  struct alignas(16) Chunk {
    Value values[kPerChunk];
  };

 public:
  template <class Rows, class Panel>
  LSTM_DEVICE void load(const Panel& panel, int first_gate) {
    const int row = Rows::first_unit() + lane() / 4;
    LSTM_UNROLL
    for (int n = 0; n < kRows * kChunks; ++n) {
      const int half = n / kChunks % 2, i = n % kChunks, first = 4 * i * kPerChunk;
      const int gate = Rows::gate(n / kChunks / 2, half, first) - first_gate;
      if (gate < 0 || gate >= Panel::kGates) continue;
      const Value* const from =
          panel.at(gate * Rows::kPadded + row + Rows::unit(half), first % Rows::kPadded) +
          lane() % 4 * kPerChunk;
      LSTM_UNROLL
      for (int e = 0; e < kPerChunk; ++e) weights_[n / kChunks][i][e] = from[e];
    }
  }

  LSTM_DEVICE void multiply(const Tile& tile, Value (&result)[kAtoms][4]) const {
    Value four[kRows][2][2];  // what a lane keeps after the first sharing: columns 0..3 or 4..7
    LSTM_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      Value sums[kRows][4] = {};  // columns 2 pair and 2 pair + 1, and the same plus 4
      LSTM_UNROLL
      for (int i = 0; i < kChunks; ++i) {
        LSTM_UNROLL
        for (int n = 0; n < 4; ++n) {
          const int column = 2 * pair + n % 2 + n / 2 * 4;
          const Chunk chunk = ptx::load<Chunk>(tile.chunk(4 * i + lane() % 4, column));
          LSTM_UNROLL
          for (int e = 0; e < kPerChunk; ++e) {
            LSTM_UNROLL
            for (int row = 0; row < kRows; ++row)
              sums[row][n] += weights_[row][i][e] * chunk.values[e];
          }
        }
      }
      LSTM_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const auto& s = sums[row];
        share(s[0], s[1], s[2], s[3], 2, four[row][pair]);
      }
    }
    LSTM_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const auto& f = four[row];
      Value two[2];
      share(f[0][0], f[0][1], f[1][0], f[1][1], 1, two);
      result[row / 2][row % 2 * 2] = two[0];
      result[row / 2][row % 2 * 2 + 1] = two[1];
    }
  }

 private:
  // Lanes with bit `partner` keep c and d, the others a and b, each summed over both partners.
  static LSTM_DEVICE void share(Value a, Value b, Value c, Value d, unsigned partner,
                                Value (&kept)[2]) {
    const bool upper = unsigned(lane()) & partner;
    kept[0] = (upper ? c : a) + ptx::shuffle_xor(upper ? a : c, partner, ptx::kAllLanes);
    kept[1] = (upper ? d : b) + ptx::shuffle_xor(upper ? b : d, partner, ptx::kAllLanes);
  }

  Value weights_[kRows][kChunks][kPerChunk];
};
template <int kAtoms, int kDepth, int kChains>
class Product<Arithmetic::float32, kAtoms, kDepth, kChains>
    : public ExactProduct<float, kAtoms, kDepth> {};
template <int kAtoms, int kDepth, int kChains>
class Product<Arithmetic::float64, kAtoms, kDepth, kChains>
    : public ExactProduct<double, kAtoms, kDepth> {};

// All of w_hh [4H, H] to registers, through `room` in shared memory, which is free again
// afterwards.
template <class Rows, class Product, class Element>
LSTM_DEVICE void load_weights(Product& product, Element* room, const void* w_hh, int H) {
  using Panel = WeightPanel<Element, Rows::kPadded>;
  LSTM_UNROLL
  for (int gate = 0; gate < 4; gate += Panel::kGates) {
    const Panel panel{room};
    panel.template fill<Rows::kTransposed, Rows::kThreads>(static_cast<const Element*>(w_hh), gate,
                                                           H);
    ptx::block_sync();  // the panel is complete before it is read
    product.template load<Rows>(panel, gate);
    ptx::block_sync();  // it is read before it, or whatever comes after it, is overwritten
  }
}

}  // namespace lstm_cuda::rec_cta
