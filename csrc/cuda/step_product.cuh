// The matrix product of one time step, without what is done with its sums.
//
//   out[row, b] = sum over k of weights[row, k] state[b, k]         for each recurrence
//
// Grid: one block for each tile of rows, tile of batch rows ("columns" here) and recurrence; tiles
// of one weight row range are neighbours, so that they share its weights in the L2 cache.
//
// A block walks along k in chunks of 128 bytes through a ring of stages in shared memory:
//   stage: [rows of weights, then columns of state][128 bytes + 16], so that the 8 rows of 16 bytes
//   that ldmatrix reads at once lie in different banks
// filled by cp.async several chunks ahead. A chunk is four k-steps of 32 bytes. Warps share rows and
// columns, and in small tiles also the k-steps; the latter's partial sums meet in shared memory at
// the end and are added in the order of the warps.
//
// Sums lie in registers as mma.m16n8 leaves them, in atoms of 16 rows and 8 columns: lane 4g + q has
// rows g and g + 8 of columns 2q and 2q + 1. With four gates the rows of two atoms are units 8n..8n+7
// of gates i and f, and of g and o: a lane holds all gates of its cells. Arithmetic without tensor
// cores uses the same layout, so all share what follows.
#pragma once

#include "element.cuh"

namespace lstm_cuda {

// Addresses and distances in bytes; all are multiples of 16.
struct StepOperands {
  const void* weights;  // [D][gates * rows][depth]
  int64_t weight_pitch, weight_stride_d;
  const void* state;  // [D][B rounded up to a tile][depth]
  int64_t state_pitch, state_stride_d;
  int64_t depth;  // of a row; 0: there is nothing to multiply, and sums are 0
  int64_t rows;   // of one gate
  int64_t B;
};

template <int row_atoms, int column_atoms, int row_warps, int column_warps, int depth_warps,
          int stages, int blocks>
struct StepTileShape {
  static constexpr int kRowAtoms = row_atoms, kColumnAtoms = column_atoms;  // of one warp
  static constexpr int kRowWarps = row_warps, kColumnWarps = column_warps,
                       kDepthWarps = depth_warps;
  static constexpr int kStages = stages;
  static constexpr int kBlocks = blocks;  // that registers must leave room for on a multiprocessor
  static constexpr int kRows = 16 * kRowAtoms * kRowWarps;
  static constexpr int kColumns = 8 * kColumnAtoms * kColumnWarps;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps * kDepthWarps;
  static constexpr int kChunk = 128, kStep = 32, kPitch = kChunk + 16;  // bytes
  static constexpr int kStageBytes = (kRows + kColumns) * kPitch;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kColumnAtoms % 2 == 0, "ldmatrix.x4 brings two atoms of columns");
  static_assert(kRowAtoms % 2 == 0, "four gates take two atoms of rows");
  static_assert(kChunk / kStep % kDepthWarps == 0 && 2 * kColumnAtoms % kDepthWarps == 0);
  static_assert(kThreads % 8 == 0 && (kRows + kColumns) * 8 % kThreads == 0);
  static_assert(kSharedBytes <= 99 * 1024, "sm_86, sm_89 and sm_120 have no more");
};
template <StepTile>
struct StepTileOf;
template <>
struct StepTileOf<StepTile::small> : StepTileShape<2, 2, 1, 1, 4, 4, 4> {};
template <>
struct StepTileOf<StepTile::medium> : StepTileShape<2, 4, 2, 1, 2, 4, 3> {};
template <>
struct StepTileOf<StepTile::large> : StepTileShape<4, 4, 2, 2, 1, 3, 2> {};
static_assert(StepTileOf<StepTile::small>::kSharedBytes == step_shared_bytes(StepTile::small) &&
              StepTileOf<StepTile::medium>::kSharedBytes == step_shared_bytes(StepTile::medium) &&
              StepTileOf<StepTile::large>::kSharedBytes == step_shared_bytes(StepTile::large));

// One k-step of a warp: sums += weights * state, both given as the warp's first row in a stage.
template <Arithmetic arithmetic, class Tile>
struct StepMultiply {
  using Compute = typename Types<arithmetic>::Compute;
  using Sums = Compute[Tile::kRowAtoms][Tile::kColumnAtoms][4];

  static LSTM_DEVICE void run(Sums& sums, const std::byte* weights, const std::byte* state,
                              unsigned lane) {
    if constexpr (arithmetic == Arithmetic::float32 || arithmetic == Arithmetic::float64)
      exact(sums, weights, state, lane);
    else
      tensor(sums, weights, state, lane);
  }

 private:
  static LSTM_DEVICE void tensor(Sums& sums, const std::byte* weights, const std::byte* state,
                                 unsigned lane) {
    constexpr int kPitch = Tile::kPitch;
    std::uint32_t a[Tile::kRowAtoms][4], b[Tile::kColumnAtoms][2];
    LSTM_UNROLL
    for (int m = 0; m < Tile::kRowAtoms; ++m)
      ptx::ldmatrix_x4(a[m], weights + (16 * m + lane % 16) * kPitch + lane / 16 * 16);
    LSTM_UNROLL
    for (int n = 0; n < Tile::kColumnAtoms; n += 2) {
      std::uint32_t both[4];
      ptx::ldmatrix_x4(both,
                       state + (8 * n + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16);
      b[n][0] = both[0], b[n][1] = both[1];
      b[n + 1][0] = both[2], b[n + 1][1] = both[3];
    }
    LSTM_UNROLL
    for (int m = 0; m < Tile::kRowAtoms; ++m) {
      LSTM_UNROLL
      for (int n = 0; n < Tile::kColumnAtoms; ++n) {
        if constexpr (arithmetic == Arithmetic::bfloat16) ptx::mma_bf16(sums[m][n], a[m], b[n]);
        if constexpr (arithmetic == Arithmetic::float16) ptx::mma_fp16(sums[m][n], a[m], b[n]);
        if constexpr (arithmetic == Arithmetic::tf32) ptx::mma_tf32(sums[m][n], a[m], b[n]);
      }
    }
  }

  struct alignas(16) Vector {
    Compute v[16 / sizeof(Compute)];
  };

  static LSTM_DEVICE void exact(Sums& sums, const std::byte* weights, const std::byte* state,
                                unsigned lane) {
    const unsigned g = lane / 4, q = lane % 4;
    LSTM_UNROLL
    for (int half = 0; half < 2; ++half) {
      Vector a[Tile::kRowAtoms][2], b[Tile::kColumnAtoms][2];
      LSTM_UNROLL
      for (int m = 0; m < Tile::kRowAtoms; ++m) {
        LSTM_UNROLL
        for (int r = 0; r < 2; ++r)
          a[m][r] = ptx::load<Vector>(weights + (16 * m + 8 * r + g) * Tile::kPitch + 16 * half);
      }
      LSTM_UNROLL
      for (int n = 0; n < Tile::kColumnAtoms; ++n) {
        LSTM_UNROLL
        for (int j = 0; j < 2; ++j)
          b[n][j] = ptx::load<Vector>(state + (8 * n + 2 * q + j) * Tile::kPitch + 16 * half);
      }
      LSTM_UNROLL
      for (int k = 0; k < int(16 / sizeof(Compute)); ++k) {
        LSTM_UNROLL
        for (int m = 0; m < Tile::kRowAtoms; ++m) {
          LSTM_UNROLL
          for (int n = 0; n < Tile::kColumnAtoms; ++n) {
            LSTM_UNROLL
            for (int r = 0; r < 4; ++r) sums[m][n][r] += a[m][r / 2].v[k] * b[n][r % 2].v[k];
          }
        }
      }
    }
  }
};

template <Arithmetic arithmetic, class Tile_, int kGates>
class StepProduct {
 public:
  using Tile = Tile_;
  using Multiply = StepMultiply<arithmetic, Tile>;
  using Compute = typename Types<arithmetic>::Compute;
  static_assert(kGates == 1 || kGates == 4);
  static constexpr int kTileUnits = Tile::kRows / kGates;

  // One block each; D recurrences.
  static unsigned blocks(const StepOperands& o, int64_t D) {
    const int64_t columns = (o.B + Tile::kColumns - 1) / Tile::kColumns;
    return unsigned(columns * ((o.rows + kTileUnits - 1) / kTileUnits) * D);
  }

  LSTM_DEVICE explicit StepProduct(const StepOperands& operands) : o_(operands) {
    const unsigned columns = unsigned((o_.B + Tile::kColumns - 1) / Tile::kColumns);
    const unsigned rows = unsigned((o_.rows + kTileUnits - 1) / kTileUnits);
    const unsigned block = ptx::block_index();
    column_ = int64_t(block % columns) * Tile::kColumns;
    unit_ = int64_t(block / columns % rows) * kTileUnits;
    d_ = block / columns / rows;
    const unsigned thread = ptx::thread_index(), warp = thread / 32;
    lane_ = thread % 32;
    depth_warp_ = warp % Tile::kDepthWarps;
    column_warp_ = warp / Tile::kDepthWarps % Tile::kColumnWarps;
    row_warp_ = warp / Tile::kDepthWarps / Tile::kColumnWarps;
    ptx::Shared shared;
    stages_ = shared.take<std::byte>(Tile::kSharedBytes, 128);
  }

  LSTM_DEVICE int64_t direction() const { return d_; }

  // Calls for each (batch row, gate) of the tile, spread over the threads.
  template <class Visit>
  LSTM_DEVICE void each_segment(Visit visit) const {
    for (unsigned k = ptx::thread_index(); k < unsigned(Tile::kColumns * 4); k += Tile::kThreads) {
      if (column_ + k / 4 < o_.B) visit(unit_, column_ + k / 4, int(k % 4));
    }
  }

  // Fills the sums. The weights do not depend on the launch before this one, the state does.
  LSTM_DEVICE void run() {
    const int64_t chunks = (o_.depth + Tile::kChunk - 1) / Tile::kChunk;
    LSTM_UNROLL
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) fetch_weights(stage, stage);
    ptx::dependency_wait();
    // Not earlier: the launch after this one may then rely on all before this one having ended.
    ptx::dependency_release();
    LSTM_UNROLL
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
      fetch_state(stage, stage);
      ptx::cp_async_commit();
    }
    int stage = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      ptx::cp_async_wait<Tile::kStages - 2>();
      // The chunk has landed for all threads, and none reads the stage that is filled next.
      ptx::block_sync();
      const int next = stage == 0 ? Tile::kStages - 1 : stage - 1;
      fetch_weights(chunk + Tile::kStages - 1, next);
      fetch_state(chunk + Tile::kStages - 1, next);
      ptx::cp_async_commit();
      const std::byte* weights =
          stages_ + stage * Tile::kStageBytes + row_warp_ * (16 * Tile::kRowAtoms) * Tile::kPitch;
      const std::byte* state =
          stages_ + stage * Tile::kStageBytes +
          (Tile::kRows + column_warp_ * (8 * Tile::kColumnAtoms)) * Tile::kPitch;
      LSTM_UNROLL
      for (int step = 0; step < Tile::kChunk / Tile::kStep; step += Tile::kDepthWarps) {
        const unsigned offset = (step + depth_warp_) * Tile::kStep;
        Multiply::run(sums_, weights + offset, state + offset, lane_);
      }
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
    ptx::cp_async_wait<0>();
    if constexpr (Tile::kDepthWarps > 1) {
      ptx::block_sync();  // the stages are read no more; partial sums take their place
      LSTM_UNROLL
      for (int m = 0; m < Tile::kRowAtoms; ++m) {
        LSTM_UNROLL
        for (int n = 0; n < Tile::kColumnAtoms; ++n) {
          LSTM_UNROLL
          for (int r = 0; r < 4; ++r) ptx::store(partial(depth_warp_, m, n, r), sums_[m][n][r]);
        }
      }
      ptx::block_sync();  // all partial sums are there
    }
  }

  // Calls visit(unit, b, sums) for each unit and batch row that this thread owns; sums is
  // Compute[kGates].
  template <class Visit>
  LSTM_DEVICE void each(Visit visit) const {
    LSTM_UNROLL
    for (int k = 0; k < 2 * Tile::kColumnAtoms / Tile::kDepthWarps; ++k) {
      // One column of each pair of an atom; the warps that share the depth share these out.
      const unsigned which = k * Tile::kDepthWarps + depth_warp_;
      const unsigned n = Tile::kDepthWarps == 1 ? k / 2 : which / 2;
      const unsigned j = Tile::kDepthWarps == 1 ? k % 2 : which % 2;
      const int64_t b =
          column_ + column_warp_ * (8 * Tile::kColumnAtoms) + 8 * n + 2 * (lane_ % 4) + j;
      if (b >= o_.B) continue;
      const int64_t first = unit_ + row_warp_ * (16 * Tile::kRowAtoms / kGates) + lane_ / 4;
      if constexpr (kGates == 4) {
        LSTM_UNROLL
        for (int octet = 0; octet < Tile::kRowAtoms / 2; ++octet) {
          const Compute sums[4] = {sum(2 * octet, n, j), sum(2 * octet, n, 2 + j),
                                   sum(2 * octet + 1, n, j), sum(2 * octet + 1, n, 2 + j)};
          if (first + 8 * octet < o_.rows) visit(first + 8 * octet, b, sums);
        }
      } else {
        LSTM_UNROLL
        for (int m = 0; m < Tile::kRowAtoms; ++m) {
          LSTM_UNROLL
          for (int r = 0; r < 2; ++r) {
            const Compute sums[1] = {sum(m, n, 2 * r + j)};
            const int64_t unit = first + 16 * m + 8 * r;
            if (unit < o_.rows) visit(unit, b, sums);
          }
        }
      }
    }
  }

  // The same by way of shared memory, in a loop that is not unrolled: for visits so long that a copy
  // for each cell of a thread would take longer to compile than all else. Neighbours have neighbouring
  // units.
  template <class Visit>
  LSTM_DEVICE void each_in_turn(Visit visit) const {
    std::byte* const sums_at = stages_ + kPartialBytes;
    const auto at = [&](int64_t unit, int64_t b, int gate) {
      return sums_at + ((b - column_) * kSumPitch + gate * kTileUnits + unit - unit_) *
                           int64_t(sizeof(Compute));
    };
    if constexpr (Tile::kDepthWarps == 1) ptx::block_sync();  // the stages are read no more
    each([&](int64_t unit, int64_t b, const Compute(&sums)[kGates]) {
      LSTM_UNROLL
      for (int gate = 0; gate < kGates; ++gate) ptx::store(at(unit, b, gate), sums[gate]);
    });
    ptx::block_sync();  // all sums are there
    LSTM_NO_UNROLL
    for (unsigned k = ptx::thread_index(); k < unsigned(Tile::kColumns * kTileUnits);
         k += Tile::kThreads) {
      const int64_t unit = unit_ + k % kTileUnits, b = column_ + k / kTileUnits;
      if (unit >= o_.rows || b >= o_.B) continue;
      Compute sums[kGates];
      LSTM_UNROLL
      for (int gate = 0; gate < kGates; ++gate) sums[gate] = ptx::load<Compute>(at(unit, b, gate));
      visit(unit, b, sums);
    }
  }

 private:
  // Of shared memory: partial sums, and the sums that each_in_turn hands on.
  static constexpr int64_t kPartialBytes =
      Tile::kDepthWarps == 1
          ? 0
          : Tile::kThreads * Tile::kRowAtoms * Tile::kColumnAtoms * 4 * sizeof(Compute);
  static constexpr int64_t kSumPitch = Tile::kRows + 1;
  static_assert(kPartialBytes + Tile::kColumns * kSumPitch * int64_t(sizeof(Compute)) <=
                    Tile::kSharedBytes,
                "sums take the place of the stages");

  static constexpr int kPieces = Tile::kChunk / 16;             // of a row in a chunk
  static constexpr int kRowsAtOnce = Tile::kThreads / kPieces;  // that the block fetches

  // A piece of 16 bytes goes to this thread's place in the stage; past the end of the depth, and for
  // rows that do not exist, zeros.
  LSTM_DEVICE void fetch(const void* from, bool exists, int64_t offset, std::byte* to) const {
    const bool inside = exists && offset < o_.depth;
    ptx::cp_async16(to, static_cast<const std::byte*>(from) + (inside ? offset : 0),
                    inside ? 16 : 0);
  }

  LSTM_DEVICE void fetch_weights(int64_t chunk, int stage) const {
    if (chunk * Tile::kChunk >= o_.depth) return;
    const unsigned thread = ptx::thread_index(), row0 = thread / kPieces;
    const int64_t offset = chunk * Tile::kChunk + thread % kPieces * 16;
    const std::byte* base = static_cast<const std::byte*>(o_.weights) + d_ * o_.weight_stride_d;
    std::byte* to = stages_ + stage * Tile::kStageBytes + thread % kPieces * 16;
    LSTM_UNROLL
    for (int k = 0; k < Tile::kRows / kRowsAtOnce; ++k) {
      const unsigned row = row0 + k * kRowsAtOnce;  // of the tile
      const unsigned gate = kGates == 4 ? row % 32 / 8 : 0;
      const int64_t unit = unit_ + (kGates == 4 ? row / 32 * 8 + row % 8 : row);
      const bool exists = unit < o_.rows;
      const std::byte* from = exists ? base + (gate * o_.rows + unit) * o_.weight_pitch : base;
      fetch(from, exists, offset, to + row * Tile::kPitch);
    }
  }

  LSTM_DEVICE void fetch_state(int64_t chunk, int stage) const {
    if (chunk * Tile::kChunk >= o_.depth) return;
    const unsigned thread = ptx::thread_index(), row0 = thread / kPieces;
    const int64_t offset = chunk * Tile::kChunk + thread % kPieces * 16;
    const std::byte* base = static_cast<const std::byte*>(o_.state) + d_ * o_.state_stride_d;
    std::byte* to = stages_ + stage * Tile::kStageBytes + thread % kPieces * 16;
    LSTM_UNROLL
    for (int k = 0; k < Tile::kColumns / kRowsAtOnce; ++k) {
      const unsigned row = row0 + k * kRowsAtOnce;
      fetch(base + (column_ + row) * o_.state_pitch, true, offset,
            to + (Tile::kRows + row) * Tile::kPitch);
    }
  }

  LSTM_DEVICE std::byte* partial(unsigned depth_warp, unsigned m, unsigned n, unsigned r) const {
    const unsigned warp = row_warp_ * Tile::kColumnWarps + column_warp_;
    const unsigned atom =
        ((depth_warp * (Tile::kRowWarps * Tile::kColumnWarps) + warp) * Tile::kRowAtoms + m) *
            Tile::kColumnAtoms +
        n;
    return stages_ + ((atom * 4 + r) * 32 + lane_) * sizeof(Compute);
  }

  LSTM_DEVICE Compute sum(unsigned m, unsigned n, unsigned r) const {
    if constexpr (Tile::kDepthWarps == 1) return sums_[m][n][r];
    Compute total = ptx::load<Compute>(partial(0, m, n, r));
    LSTM_UNROLL
    for (int k = 1; k < Tile::kDepthWarps; ++k) total += ptx::load<Compute>(partial(k, m, n, r));
    return total;
  }

  const StepOperands& o_;
  int64_t column_, unit_, d_;
  unsigned lane_, depth_warp_, column_warp_, row_warp_;
  std::byte* stages_;
  typename Multiply::Sums sums_ = {};
};

}  // namespace lstm_cuda
