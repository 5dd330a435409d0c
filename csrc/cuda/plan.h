// Which kernel family a recurrence gets on a CUDA device, and with which parameters: a pure
// function of sizes, options and the device, compiled in every build.
#pragma once

#include "../recurrence.h"

namespace lstm_cuda {

// What products are made of. float32 has two: exact products, or tensor cores that round operands
// to ten bits (TF32), where torch allows that for RNNs.
enum class Arithmetic { float64, float32, tf32, float16, bfloat16 };

struct CudaDevice {
  int architecture;  // 80, 86, 89, 90, 100, 120: ten times the compute capability
  int multiprocessors;
  int64_t shared_bytes;  // that one block may ask for
};

enum class Family {
  rec_cta,   // all steps inside one block for each tile of the batch and direction
  rec_step,  // one launch a step; any size
};

constexpr Family kFamilies[] = {Family::rec_cta, Family::rec_step};

// Tiles of rec_step's product: weight rows times batch rows.
enum class StepTile { small, medium, large };  // 32x16, 64x32, 128x64

struct CudaPlan {
  Family family;
  bool possible;  // false: nothing that may be chosen runs this; the reason says why
  Arithmetic arithmetic;
  const char* reason;  // why this family
  StepTile tile;       // rec_step
  bool overlap;        // rec_step: launches may overlap (programmatic dependent launch)
  int padded_hidden;   // rec_cta: 32, 64 or 128, the instantiation that holds H
};

// Options that narrow the choice.
struct CudaRequest {
  bool allow_tf32;
  bool backward;
  int forced;   // a Family, or -1
  int refused;  // bit k: Family k could not be launched on this device before
};

// Shared memory of a block of rec_step.
constexpr int64_t step_shared_bytes(StepTile tile) {
  return tile == StepTile::small ? 27648 : tile == StepTile::medium ? 55296 : 82944;
}

// Shared memory that any block of rec_cta gets by with: what each device of compute capability 8.0 and
// above has.
constexpr int64_t kCtaSharedBytes = 99 * 1024;

// Blocks, and steps, of one launch of rec_cta, which counts both in 32 bits.
constexpr int64_t kMostOfCta = 0x7FFFFFF0;

CudaPlan plan_cuda(const LayerShape& shape, const CudaRequest& request, const CudaDevice& device);

// For messages and for lstm_cuda.explain.
const char* name_of(Family family);
const char* name_of(Arithmetic arithmetic);
const char* name_of(StepTile tile);

}  // namespace lstm_cuda
