// How the weights of one recurrence are spread over the blocks that keep them for a whole sequence:
// families rec_cluster and rec_group. Plan, packing and kernels share this.
//
// Products run as mma m16n8k16 with weights as the A operand. A 16 x 16 tile of weights is one
// fragment: lane (g = lane / 4, q = lane % 4) has in half e of register r
//   row g + 8 * (r % 2), column 2q + e + 8 * (r / 2)
// of it. Packed weights are these fragments as kernels load them:
//   [D][block][warp][part][row tile][step of 16 in depth][lane] x 16 bytes
// Parts: one for products with rounded operands (float16, bfloat16; TF32 as float16); two, high and
// low, for float32. Values are then scaled by a power of two for each row (see pack.h).
#pragma once

#include "../host_device.h"
#include "../recurrence.h"

namespace lstm_cuda {

struct ResidentShape {
  int hidden;  // H, padded with zeros
  int blocks;  // that share a recurrence; block r has hidden units [r * units(), (r + 1) * units())
  int warps;   // of a block
  int split;   // forward: warps that share the depth of a product
  int shared_forward;   // of each warp's depth steps, those whose weights are in shared memory
  int shared_backward;  // of each warp's row tiles, the same

  LSTM_HOST_DEVICE constexpr int units() const { return hidden / blocks; }
  LSTM_HOST_DEVICE constexpr int threads() const { return 32 * warps; }
};

// Where a packed weight comes from: w_hh[gate * H + unit][k]; zero where unit or k is past H.
struct WeightSource {
  int gate, unit, k;
};

// Forward: rows are gates of the block's units, depth is h. Row tiles come in pairs for 8 units, an
// octet: gates i (rows 0-7) and f (rows 8-15), then g and o. So lane (g, q) gets all four gates of
// unit g for columns 2q and 2q + 1. Warp `split_index * row_groups + row_group` has a part of the
// octets and a part of the depth.
struct ForwardFragments {
  ResidentShape shape;

  LSTM_HOST_DEVICE constexpr int row_groups() const { return shape.warps / shape.split; }
  LSTM_HOST_DEVICE constexpr int octets() const {
    return shape.units() / 8 / row_groups();
  }  // of a warp
  LSTM_HOST_DEVICE constexpr int row_tiles() const { return 2 * octets(); }
  LSTM_HOST_DEVICE constexpr int steps() const { return shape.hidden / 16 / shape.split; }

  LSTM_HOST_DEVICE constexpr WeightSource source(int block, int warp, int tile, int step, int row,
                                                 int column) const {
    const int octet = warp % row_groups() * octets() + tile / 2;
    return {tile % 2 * 2 + row / 8, block * shape.units() + octet * 8 + row % 8,
            (warp / row_groups() * steps() + step) * 16 + column};
  }
};

// Backward: rows are all hidden units, depth is the gates of the block's own units. Step s has units
// 4s .. 4s + 3, and the columns of lane q are gates i, f, g, o of unit 4s + q: what one thread writes
// of a cell is what one lane reads. Rows are in an order that gives 32 consecutive sums (see
// rec_backward.cuh) to 4 consecutive units.
struct BackwardFragments {
  ResidentShape shape;

  LSTM_HOST_DEVICE constexpr int row_tiles() const {
    return shape.hidden / 16 / shape.warps;
  }  // of a warp
  LSTM_HOST_DEVICE constexpr int steps() const { return 4 * shape.units() / 16; }

  LSTM_HOST_DEVICE static constexpr int unit_of_row(int row) {
    const int g = row % 8, half = row / 8;
    return g / 2 * 4 + g % 2 * 2 + half;
  }
  LSTM_HOST_DEVICE constexpr WeightSource source(int block, int warp, int tile, int step, int row,
                                                 int column) const {
    return {column / 8 * 2 + column % 2, block * shape.units() + step * 4 + column % 8 / 2,
            (warp * row_tiles() + tile) * 16 + unit_of_row(row)};
  }
};

// 16-byte pieces of packed weights of D recurrences.
template <class Fragments>
LSTM_HOST_DEVICE constexpr int64_t packed_pieces(Fragments f, int64_t D, int parts) {
  return D * f.shape.blocks * f.shape.warps * parts * f.row_tiles() * f.steps() * 32;
}

// Those that a warp's lane 0 begins with.
template <class Fragments>
LSTM_HOST_DEVICE constexpr int64_t first_piece(Fragments f, int64_t d, int block, int warp,
                                               int parts) {
  return ((d * f.shape.blocks + block) * f.shape.warps + warp) * parts * f.row_tiles() * f.steps() *
         32;
}

// What is compiled. In the order of H; the first that holds H is taken.
//                                               hidden blocks warps split shared_fwd shared_bwd
inline constexpr ResidentShape kClusterShapes[] = {
    {128, 4, 8, 2, 0, 0}, {256, 8, 8, 2, 0, 0}, {384, 8, 12, 2, 4, 0}, {512, 16, 8, 2, 0, 0}};
inline constexpr ResidentShape kClusterShapesExact[] = {{128, 8, 8, 4, 0, 0}, {256, 8, 8, 2, 0, 0}};
// Of other cells: those whose registers have room for more.
inline constexpr ResidentShape kClusterShapesVariant[] = {kClusterShapes[0], kClusterShapes[1],
                                                          kClusterShapes[3]};
inline constexpr ResidentShape kGroupShapes[] = {
    {512, 32, 8, 8, 0, 0}, {768, 48, 8, 8, 0, 0}, {1024, 64, 8, 8, 0, 0}, {2048, 128, 8, 8, 8, 8}};
inline constexpr ResidentShape kGroupShapesExact[] = {{512, 32, 8, 8, 0, 0},
                                                      {1024, 64, 8, 8, 5, 4}};

// Shared memory that any of their blocks gets by with: what a block may have on compute capability
// 9.0 and 10.0.
constexpr int64_t kResidentSharedBytes = 227 * 1024;

}  // namespace lstm_cuda
