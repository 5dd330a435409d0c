// What kernels with resident weights share: operands of products, weights, sums, and launches.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "element.cuh"
#include "launcher.cuh"
#include "pack.h"

namespace lstm_cuda::resident {

// Packed in as many parts as operands have.
template <Arithmetic arithmetic>
LSTM_DEVICE void to_parts(float first, float second, uint32_t (&parts)[parts_of(arithmetic)]) {
  parts[0] = packed<arithmetic>(first, second);
  if constexpr (parts_of(arithmetic) == 2) {
    const auto rest = [](float v) { return (v - __half2float(__float2half_rn(v))) * kLowPart; };
    parts[1] = packed<arithmetic>(rest(first), rest(second));
  }
}

// Sums of one 16 x 8 tile: lane (g, q) has rows g, g, g + 8, g + 8 of columns 2q, 2q + 1, 2q, 2q + 1.
// Products with a low part are summed by themselves, and that of two low parts is left out.
template <Arithmetic arithmetic>
struct Sums {
  static constexpr int kParts = parts_of(arithmetic);
  float sets[kParts][4] = {};

  LSTM_DEVICE void add(const uint32_t (&a)[kParts][4], const uint32_t (&b)[kParts][2]) {
    mma(sets[0], a[0], b[0]);
    if constexpr (kParts == 2) {
      mma(sets[1], a[0], b[1]);
      mma(sets[1], a[1], b[0]);
    }
  }
  LSTM_DEVICE float total(int i) const {
    if constexpr (kParts == 2)
      return sets[0][i] + sets[1][i] * (1 / kLowPart);
    else
      return sets[0][i];
  }

 private:
  static LSTM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (arithmetic == Arithmetic::bfloat16)
      ptx::mma_bf16(d, a, b);
    else
      ptx::mma_fp16(d, a, b);
  }
};

// A warp's weights, which stay: the last kSharedTiles row tiles and the last kSharedSteps steps in
// shared memory, the others in registers. Each thread reads only what it wrote itself.
template <int kParts, int kTiles, int kSteps, int kSharedTiles, int kSharedSteps>
class Weights {
  static constexpr int kHeldTiles = kTiles - kSharedTiles, kHeldSteps = kSteps - kSharedSteps;
  static constexpr int kShared = kParts * (kTiles * kSteps - kHeldTiles * kHeldSteps);

 public:
  static constexpr int kPieces = 32 * kShared;  // 16 bytes of shared memory each, for a warp

  LSTM_DEVICE void load(const void* fragments, int64_t first_piece, ptx::Shared& shared) {
    if constexpr (kShared > 0)
      shared_ =
          shared.take<uint4>(kPieces * (ptx::block_threads() / 32), 16) + warp() * kPieces + lane();
    const uint4* const from = static_cast<const uint4*>(fragments) + first_piece + lane();
    const auto piece = [&](int part, int tile, int step) {
      return from[32 * ((part * kTiles + tile) * kSteps + step)];
    };
    if constexpr (kShared > 0) {
      // Row tile by row tile: all loads at once would take more registers than there are.
      LSTM_NO_UNROLL
      for (int i = 0; i < kParts * kTiles; ++i) {
        const int part = i / kTiles, tile = i % kTiles;
        LSTM_UNROLL
        for (int step = 0; step < kSteps; ++step)
          if (!held(tile, step)) shared_[32 * place(part, tile, step)] = piece(part, tile, step);
      }
    }
    LSTM_UNROLL
    for (int i = 0; i < kParts * kHeldTiles * kHeldSteps; ++i) {
      const int part = i / (kHeldTiles * kHeldSteps), tile = i / kHeldSteps % kHeldTiles;
      const uint4 v = piece(part, tile, i % kHeldSteps);
      const uint32_t registers[4] = {v.x, v.y, v.z, v.w};
      LSTM_UNROLL
      for (int r = 0; r < 4; ++r) held_[part][tile][i % kHeldSteps][r] = registers[r];
    }
  }

  LSTM_DEVICE void get(int tile, int step, uint32_t (&a)[kParts][4]) const {
    LSTM_UNROLL
    for (int part = 0; part < kParts; ++part) {
      if (held(tile, step)) {
        LSTM_UNROLL
        for (int r = 0; r < 4; ++r) a[part][r] = held_[part][tile][step][r];
      } else {
        get_shared(part, tile, step, a[part]);
      }
    }
  }
  // The same of a tile or step in shared memory, which need not be a constant.
  LSTM_DEVICE void get_shared(int part, int tile, int step, uint32_t (&a)[4]) const {
    const uint4 piece = ptx::load<uint4>(shared_ + 32 * place(part, tile, step));
    a[0] = piece.x, a[1] = piece.y, a[2] = piece.z, a[3] = piece.w;
  }

 private:
  static constexpr LSTM_HOST_DEVICE bool held(int tile, int step) {
    return tile < kHeldTiles && step < kHeldSteps;
  }
  // Among the pieces in shared memory, tile by tile.
  static constexpr LSTM_HOST_DEVICE int place(int part, int tile, int step) {
    const int whole = tile < kHeldTiles
                          ? tile * kSharedSteps + step - kHeldSteps
                          : kHeldTiles * kSharedSteps + (tile - kHeldTiles) * kSteps + step;
    return part * (kShared / kParts) + whole;
  }

  uint32_t held_[kParts][kHeldTiles][kHeldSteps][4];
  uint4* shared_ = nullptr;
};

// What start<arithmetic, shape, tiles of a turn, turns>(parts) gives for the compiled kernel that the plan
// asks for, or nothing.
template <Family family, CellKind cell, Arithmetic arithmetic, const auto& shapes, class Start>
std::optional<Status> start_by_shape(const CudaPlan& plan, unsigned parts, Start start) {
  std::optional<Status> started;
  const auto with_turns = [&]<ResidentShape shape, int tiles>() {
    if constexpr (tiles <= most_tiles(arithmetic, shape)) {
      if (plan.column_tiles != tiles) return;
      if constexpr (has_turns(family, cell, shape, tiles, 1))
        if (plan.turns == 1)
          started = start.template operator()<arithmetic, shape, tiles, 1>(parts);
      if constexpr (has_turns(family, cell, shape, tiles, 2))
        if (plan.turns == 2)
          started = start.template operator()<arithmetic, shape, tiles / 2, 2>(parts);
    }
  };
  const auto with_tiles = [&]<ResidentShape shape>() {
    with_turns.template operator()<shape, 1>();
    with_turns.template operator()<shape, 2>();
    with_turns.template operator()<shape, 4>();
  };
  [&]<std::size_t... i>(std::index_sequence<i...>) {
    ((plan.resident.hidden == shapes[i].hidden ? with_tiles.template operator()<shapes[i]>()
                                               : void()),
     ...);
  }(std::make_index_sequence<std::size(shapes)>{});
  return started;
}

template <Family family, const auto& shapes, const auto& exact_shapes,
          CellKind cell = CellKind::plain, class Start>
Status launch_planned(const char* kernel, const LayerShape& shape, const CudaPlan& plan,
                      Start start) {
  const auto by_arithmetic = [&](unsigned parts) -> std::optional<Status> {
    switch (plan.arithmetic) {
      case Arithmetic::float64:
        return {};
      case Arithmetic::float32:
        return start_by_shape<family, cell, Arithmetic::float32, exact_shapes>(plan, parts, start);
      case Arithmetic::tf32:
        return start_by_shape<family, cell, Arithmetic::tf32, shapes>(plan, parts, start);
      case Arithmetic::float16:
        return start_by_shape<family, cell, Arithmetic::float16, shapes>(plan, parts, start);
      default:
        return start_by_shape<family, cell, Arithmetic::bfloat16, shapes>(plan, parts, start);
    }
  };
  return lstm_cuda::launch_planned(kernel, shape, plan.arithmetic, plan.resident.hidden,
                                   8 * plan.column_tiles, plan.resident.blocks, by_arithmetic);
}

// Launches parts by start(first, count), so many at once as run together.
template <class Start>
Status in_rounds(unsigned parts, int at_once, Start start) {
  Status status;
  for (unsigned first = 0; first < parts && status.ok(); first += unsigned(at_once))
    status = start(first, std::min(unsigned(at_once), parts - first));
  return status;
}

}  // namespace lstm_cuda::resident
