// Which kernel family a recurrence gets on a CUDA device, and with which parameters: a pure
// function of sizes, options and the device, compiled in every build.
#pragma once

#include "../recurrence.h"
#include "resident.h"

namespace lstm_cuda {

// What products are made of. float32 has two: exact products, or tensor cores that round operands
// to ten bits (TF32), where torch allows that for RNNs.
enum class Arithmetic { float64, float32, tf32, float16, bfloat16 };

// Of an operand, where weights are resident: see resident.h.
LSTM_HOST_DEVICE constexpr int parts_of(Arithmetic a) { return a == Arithmetic::float32 ? 2 : 1; }

struct CudaDevice {
  int architecture;  // 80, 86, 89, 90, 100, 120: ten times the compute capability
  int multiprocessors;
  int64_t shared_bytes;  // that one block may ask for
};

enum class Family {
  rec_cta,      // all steps inside one block for each tile of the batch and direction
  rec_cluster,  // in a cluster of blocks, which exchange h through their shared memory
  rec_group,    // in a group of blocks that run together and exchange h through L2
  rec_step,     // one launch a step; any size
};

constexpr Family kFamilies[] = {Family::rec_cta, Family::rec_cluster, Family::rec_group,
                                Family::rec_step};

// Tiles of rec_step's product: weight rows times batch rows.
enum class StepTile { small, medium, large };  // 32x16, 64x32, 128x64

struct CudaPlan {
  Family family;
  bool possible;  // false: nothing that may be chosen runs this; the reason says why
  Arithmetic arithmetic;
  const char* reason;      // why this family
  StepTile tile;           // rec_step
  bool overlap;            // rec_step: launches may overlap (programmatic dependent launch)
  int padded_hidden;       // rec_cta: 32, 64 or 128, the instantiation that holds H
  ResidentShape resident;  // rec_cluster, rec_group
  int column_tiles;        // the same: 1, 2 or 4 tiles of 8 batch rows in a cluster or group
  int turns;               // the same: in which a step takes its tiles; 1: all together
  int groups;              // rec_group: groups that one launch runs together
  bool pack_beside;        // forward: weights are packed beside the product of inputs
  bool folds_projection;   // not rec_step: the recurrence is over m, with weights w_hh w_hr
  double estimated_us;     // of the recurrence, by plan_model.h
};

// Options that narrow the choice.
struct CudaRequest {
  bool allow_tf32;
  bool backward;
  int forced;   // a Family, or -1
  int refused;  // bit k: Family k could not be launched on this device before
  // Of a forced rec_cluster or rec_group: batch rows, and turns; 0: free.
  int columns = 0, turns = 0;
  CellKind cell = CellKind::plain;
  bool large_h = false;  // as has_large_h says of the cell
};

// Shared memory of a block of rec_step.
constexpr int64_t step_shared_bytes(StepTile tile) {
  return tile == StepTile::small ? 27648 : tile == StepTile::medium ? 55296 : 82944;
}

// The widest H of rec_cta, so that its weights stay in the registers of one block. Forward, cells with norm
// take too many of them beside the largest.
constexpr int widest_cta(Arithmetic arithmetic, CellKind cell, bool backward) {
  switch (arithmetic) {
    case Arithmetic::float64:
      return 32;
    case Arithmetic::float32:
    case Arithmetic::tf32:
      return 64;
    default:
      return cell == CellKind::norm && !backward ? 64 : 128;
  }
}

// Shared memory that any block of rec_cta gets by with: what each device of compute capability 8.0 and
// above has.
constexpr int64_t kCtaSharedBytes = 99 * 1024;

// Shared memory that a block of rec_cluster or rec_group gets by with, forward and backward: what a
// block may have on compute capability 9.0, 8.0 or 8.6. The kernels hold this against what they take.
constexpr int64_t resident_shared_bytes(Family family, Arithmetic arithmetic,
                                        const ResidentShape& shape, int column_tiles) {
  constexpr int64_t kOf90 = kResidentSharedBytes, kOf80 = 163 * 1024, kOf86 = 99 * 1024;
  const bool partly_shared = shape.shared_forward > 0 || shape.shared_backward > 0;
  if (family == Family::rec_cluster || partly_shared) return kOf90;
  if (column_tiles <= 2) return kOf86;
  return arithmetic == Arithmetic::float16 || arithmetic == Arithmetic::bfloat16 ? kOf80 : kOf90;
}

// Column tiles of 8 batch rows of a cluster or group: 1, and 2 and 4 where registers and shared memory
// allow.
constexpr int most_tiles(Arithmetic arithmetic, const ResidentShape& shape) {
  const ForwardFragments warp{shape};
  const bool full = arithmetic == Arithmetic::tf32 && warp.octets() > 1 && warp.steps() >= 8;
  return (shape.shared_forward > 0 ? 2 : 4) / (full ? 2 : parts_of(arithmetic));
}

// A cluster may step half of its tiles while h (backward: sums) of the others travels. It has to where
// registers are too few for 32 batch rows at once. Other cells than torch.nn.LSTM's leave fewer: they have
// one turn, of at most two tiles, or of one where whole rows are normalised.
constexpr bool has_turns(Family family, CellKind cell, const ResidentShape& shape, int column_tiles,
                         int turns) {
  if (cell != CellKind::plain)
    return turns == 1 && column_tiles <= (cell == CellKind::norm ? 1 : 2);
  const bool may = family == Family::rec_cluster && column_tiles > 1;
  const bool must = may && shape.hidden >= 512 && column_tiles == 4;
  return turns == 1 ? !must : turns == 2 && may;
}

// 32-bit words that the blocks of a group of rec_group exchange through: two slots, forward of h as
// operands, backward of sums from every block to every block.
constexpr int64_t group_words(Arithmetic arithmetic, const ResidentShape& shape, int column_tiles,
                              bool backward) {
  const int64_t values = int64_t(shape.hidden) * 8 * column_tiles;
  const bool short_sums = arithmetic == Arithmetic::float16 || arithmetic == Arithmetic::bfloat16;
  return backward ? 2 * shape.blocks * values / (short_sums ? 2 : 1)
                  : 2 * parts_of(arithmetic) * values / 2;
}

// Blocks, and steps, of one launch of rec_cta, rec_cluster or rec_group, which count both in 32 bits.
constexpr int64_t kMostOfCta = 0x7FFFFFF0;

CudaPlan plan_cuda(const LayerShape& shape, const CudaRequest& request, const CudaDevice& device);

// A number for how forward packs weights, the same for all plans that pack them alike; 0 where none are.
int64_t packed_layout(const CudaPlan& plan);

// A plan with that layout, for packing alone. False if there is none.
bool plan_of_layout(int64_t layout, CudaPlan& plan);

// For messages and for lstm_cuda.explain.
const char* name_of(Family family);
const char* name_of(Arithmetic arithmetic);
const char* name_of(StepTile tile);

}  // namespace lstm_cuda
