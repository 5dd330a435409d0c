// What the forward and the backward kernel of family rec_cta share: which part of the problem a
// block has, the product with weights that stay in registers, and the ring of input rows.
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
#include <type_traits>

#include "../schedule.h"
#include "element.cuh"
#include "families.h"

namespace lstm_cuda::rec_cta {

inline constexpr int kColumns = 8;           // of a tile: the N of every mma
inline constexpr int kSlots = 4;             // of the ring: inputs are fetched kSlots - 1 steps ahead
inline constexpr int64_t kDirections = 64;  // LayerShape has that many bits for directions
inline constexpr int64_t kMost = 0x7FFFFFF0;  // blocks, and steps, which are counted in 32 bits

// A block's recurrence and batch rows. Its schedule ends with the longest of these rows.
struct Part {
  int d, rows;    // rows: of the tile's columns, those that are in the batch
  unsigned tile;
  Schedule schedule;

  LSTM_DEVICE int64_t b(int column) const { return int64_t(tile) * kColumns + column; }

  LSTM_DEVICE int length(int column) const {
    return column < rows ? int(schedule.length(b(column))) : 0;
  }
  // Of row (t, b, d) in [T, B, D, ...].
  LSTM_DEVICE int64_t row(const LayerShape& shape, int64_t t, int64_t b) const {
    return (t * shape.B + b) * shape.D + d;
  }
};

LSTM_DEVICE Part part_of_block(const LayerShape& shape, const int64_t* lengths,
                               const uint8_t* reset) {
  const unsigned tiles = unsigned((shape.B + kColumns - 1) / kColumns);
  Part part{int(ptx::block_index() / tiles), kColumns, ptx::block_index() % tiles, {}};
  if (part.b(kColumns) > shape.B) part.rows = int(shape.B - part.b(0));
  part.schedule = schedule_of(shape, part.d, lengths, reset);
  if (lengths) {
    int64_t longest = 0;
    for (int column = 0; column < part.rows; ++column) {
      const int64_t length = part.schedule.length(part.b(column));
      longest = length > longest ? length : longest;
    }
    part.schedule.T = longest;
  }
  return part;
}

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

// How a value enters a product.
template <Arithmetic arithmetic, class Element>
LSTM_DEVICE Element operand(Element v) {
  if constexpr (arithmetic == Arithmetic::tf32) return ptx::round_tf32(v);
  else return v;
}

LSTM_DEVICE int lane() { return int(ptx::thread_index() % 32); }

// Weights on their way to registers: some gates of w_hh, or of its transpose, padded with zeros in
// shared memory. (Read straight from global memory with a check of bounds each, they cost ptxas more
// registers than there are.)
template <class Element, int kPadded>
struct WeightPanel {
  static constexpr int kGates = 128 / kPadded;  // as many as fit where later the ring of gates is
  static constexpr int kPitch = kPadded + 4 / sizeof(Element);
  static constexpr int kValues = kGates * kPadded * kPitch;
  static constexpr int kAtOnce = 4;  // loads of a thread in flight

  Element* values;

  template <bool kTransposed>
  LSTM_DEVICE void fill(const Element* w_hh, int first_gate, int H) const {
    const int threads = int(ptx::block_threads());
    for (int start = int(ptx::thread_index()); start < kGates * kPadded * kPadded;
         start += kAtOnce * threads) {
      Element loaded[kAtOnce];
      LSTM_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = start + n * threads, row = i / kPadded % kPadded, column = i % kPadded;
        const bool inside = i < kGates * kPadded * kPadded && row < H && column < H;
        const int gate = first_gate + i / (kPadded * kPadded);
        loaded[n] = inside ? w_hh[(gate * H + row) * H + column]
                           : to_element<Element>(typename std::conditional_t<sizeof(Element) == 8, double, float>(0));
      }
      LSTM_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = start + n * threads, row = i / kPadded, column = i % kPadded;
        const int across = row % kPadded, gate = row / kPadded * kPadded;
        if (i < kGates * kPadded * kPadded)
          *at(kTransposed ? gate + column : row, kTransposed ? across : column) = loaded[n];
      }
    }
  }

  LSTM_DEVICE Element* at(int row, int k) const { return values + row * kPitch + k; }
};

// Products on tensor cores. Register r of lane (g, q) holds of a step's 16 rows and two chunks the
// part of row g + 8 * (r % 2) in chunk r / 2 that begins q / 4 into the chunk.
template <Arithmetic arithmetic, int kAtoms, int kDepth>
class Product {
  using Element = typename Types<arithmetic>::Element;
  using Tile = OperandTile<Element, kDepth>;
  static constexpr int kPerChunk = Tile::kPerChunk;
  static constexpr int kPerRegister = 4 / sizeof(Element);
  static constexpr int kSteps = kDepth / (2 * kPerChunk);
  static constexpr int kChains = 4 / kAtoms;  // independent sums, because mma answers late
  static_assert(kSteps % kChains == 0);

 public:
  // Takes what is in the panel. Rows says which row of which gate is where in the product.
  template <class Rows, class Panel>
  LSTM_DEVICE void load(const Panel& panel, int first_gate) {
    const int row = Rows::first_unit() + lane() / 4;
    LSTM_UNROLL
    for (int atom = 0; atom < kAtoms; ++atom)
      LSTM_UNROLL
      for (int step = 0; step < kSteps; ++step)
        LSTM_UNROLL
        for (int r = 0; r < 4; ++r) {
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
    for (int atom = 0; atom < kAtoms; ++atom)
      LSTM_UNROLL
      for (int i = 0; i < 4; ++i) {
        result[atom][i] = sums[0][atom][i] + sums[1][atom][i];
        if constexpr (kChains == 4) result[atom][i] += sums[2][atom][i] + sums[3][atom][i];
      }
  }

 private:
  static LSTM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (arithmetic == Arithmetic::tf32) ptx::mma_tf32(d, a, b);
    else if constexpr (arithmetic == Arithmetic::float16) ptx::mma_fp16(d, a, b);
    else ptx::mma_bf16(d, a, b);
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
  struct alignas(16) Chunk {
    Value values[kPerChunk];
  };

 public:
  template <class Rows, class Panel>
  LSTM_DEVICE void load(const Panel& panel, int first_gate) {
    const int row = Rows::first_unit() + lane() / 4;
    LSTM_UNROLL
    for (int atom = 0; atom < kAtoms; ++atom)
      LSTM_UNROLL
      for (int half = 0; half < 2; ++half)
        LSTM_UNROLL
        for (int i = 0; i < kChunks; ++i) {
          const int chunks = 4 * i * kPerChunk, gate = Rows::gate(atom, half, chunks) - first_gate;
          if (gate < 0 || gate >= Panel::kGates) continue;
          const Value* const from =
              panel.at(gate * Rows::kPadded + row + Rows::unit(half), chunks % Rows::kPadded) +
              lane() % 4 * kPerChunk;
          LSTM_UNROLL
          for (int e = 0; e < kPerChunk; ++e) weights_[atom][half][i][e] = from[e];
        }
  }

  LSTM_DEVICE void multiply(const Tile& tile, Value (&result)[kAtoms][4]) const {
    Value four[kAtoms][2][2][2];  // columns 0..3 or 4..7, which the lane keeps after the first sharing
    LSTM_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      Value sums[kAtoms][2][4] = {};  // columns 2 pair, 2 pair + 1 and the same plus 4
      LSTM_UNROLL
      for (int i = 0; i < kChunks; ++i)
        LSTM_UNROLL
        for (int n = 0; n < 4; ++n) {
          const int column = 2 * pair + n % 2 + n / 2 * 4;
          const Chunk chunk = ptx::load<Chunk>(tile.chunk(4 * i + lane() % 4, column));
          LSTM_UNROLL
          for (int e = 0; e < kPerChunk; ++e)
            LSTM_UNROLL
            for (int atom = 0; atom < kAtoms; ++atom)
              LSTM_UNROLL
              for (int half = 0; half < 2; ++half)
                sums[atom][half][n] += weights_[atom][half][i][e] * chunk.values[e];
        }
      LSTM_UNROLL
      for (int atom = 0; atom < kAtoms; ++atom)
        LSTM_UNROLL
        for (int half = 0; half < 2; ++half)
          share(sums[atom][half][0], sums[atom][half][1], sums[atom][half][2], sums[atom][half][3],
                2, four[atom][half][pair]);
    }
    LSTM_UNROLL
    for (int atom = 0; atom < kAtoms; ++atom)
      LSTM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const auto& columns = four[atom][half];
        Value two[2];
        share(columns[0][0], columns[0][1], columns[1][0], columns[1][1], 1, two);
        result[atom][2 * half] = two[0];
        result[atom][2 * half + 1] = two[1];
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

  Value weights_[kAtoms][2][kChunks][kPerChunk];
};
template <int kAtoms, int kDepth>
class Product<Arithmetic::float32, kAtoms, kDepth> : public ExactProduct<float, kAtoms, kDepth> {};
template <int kAtoms, int kDepth>
class Product<Arithmetic::float64, kAtoms, kDepth> : public ExactProduct<double, kAtoms, kDepth> {};

// All of w_hh [4H, H] to registers, through `room` in shared memory, which is free again afterwards.
template <class Rows, class Product, class Element>
LSTM_DEVICE void load_weights(Product& product, Element* room, const void* w_hh, int H) {
  using Panel = WeightPanel<Element, Rows::kPadded>;
  LSTM_UNROLL
  for (int gate = 0; gate < 4; gate += Panel::kGates) {
    const Panel panel{room};
    panel.template fill<Rows::kTransposed>(static_cast<const Element*>(w_hh), gate, H);
    ptx::block_sync();  // the panel is complete before it is read
    product.template load<Rows>(panel, gate);
    ptx::block_sync();  // it is read before it, or whatever comes after it, is overwritten
  }
}

// A ring of input rows: for each of kSlots steps one row of up to kWidth values for each column.
// Threads share out the columns; the 16 bytes between rows keep the columns' banks apart.
template <class Value, int kWidth, int kThreads>
struct RowRing {
  static constexpr int kPerChunk = 16 / sizeof(Value);
  static constexpr int kPitch = kWidth + kPerChunk;
  static constexpr int kSlotValues = kColumns * kPitch;
  static constexpr int kValues = kSlots * kSlotValues;
  static constexpr int kThreadsOfColumn = kThreads / kColumns;

  Value* values;
  int width;     // of the rows in global memory
  bool aligned;  // these begin at multiples of 16 bytes, and so end

  LSTM_DEVICE RowRing(ptx::Shared& shared, const void* rows, int row_width)
      : values(shared.take<Value>(kValues, 16)),
        width(row_width),
        aligned((reinterpret_cast<uintptr_t>(rows) | unsigned(row_width) * sizeof(Value)) % 16 == 0) {}

  static LSTM_DEVICE int column_to_fetch() { return int(ptx::thread_index()) / kThreadsOfColumn; }

  // Begins to copy this thread's share of its column's row; to be waited for like cp.async. Rows
  // that are not aligned are copied at once.
  LSTM_DEVICE void fetch(unsigned step, const Value* row) const {
    Value* to = values + step % kSlots * kSlotValues + column_to_fetch() * kPitch;
    LSTM_UNROLL
    for (int i = 0; i < kWidth; i += kThreadsOfColumn * kPerChunk) {
      const int k = i + int(ptx::thread_index()) % kThreadsOfColumn * kPerChunk;
      if (k >= width) continue;
      if (aligned) ptx::cp_async16(to + k, row + k);
      else
        LSTM_UNROLL
        for (int e = 0; e < kPerChunk; ++e)
          if (k + e < width) to[k + e] = row[k + e];
    }
  }

  LSTM_DEVICE Value at(unsigned step, int column, int k) const {
    return values[step % kSlots * kSlotValues + column * kPitch + k];
  }
};

inline Status unsupported(const char* kernel, const CudaPlan& plan) {
  static constexpr const char* kNames[] = {"float64", "float32", "tf32", "float16", "bfloat16"};
  Status status;
  std::snprintf(status.message, sizeof status.message,
                "%s has no kernel for %s with a padded hidden size of %d", kernel,
                kNames[int(plan.arithmetic)], plan.padded_hidden);
  return status;
}

// What one launch cannot hold, or empty.
inline Status check(const char* kernel, const LayerShape& shape, const CudaPlan& plan) {
  Status status;
  const int64_t blocks = (shape.B + kColumns - 1) / kColumns * shape.D;
  if (shape.projected)
    std::snprintf(status.message, sizeof status.message, "%s has no projection", kernel);
  else if (shape.H > plan.padded_hidden)
    std::snprintf(status.message, sizeof status.message,
                  "%s: a hidden size of %lld does not fit the planned %d", kernel,
                  (long long)shape.H, plan.padded_hidden);
  else if (shape.D > kDirections || blocks > kMost || shape.T > kMost)
    std::snprintf(status.message, sizeof status.message,
                  "%s: %lld recurrences of %lld batch rows and %lld steps are more than one launch "
                  "takes",
                  kernel, (long long)shape.D, (long long)shape.B, (long long)shape.T);
  return status;
}

inline unsigned blocks_of(const LayerShape& shape) {
  return unsigned((shape.B + kColumns - 1) / kColumns * shape.D);
}

}  // namespace lstm_cuda::rec_cta
