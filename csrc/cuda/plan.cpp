#include "plan.h"

#include <algorithm>

namespace lstm_cuda {
namespace {

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

Arithmetic arithmetic_of(Dtype dtype, bool allow_tf32) {
  switch (dtype) {
    case Dtype::float64:
      return Arithmetic::float64;
    case Dtype::float32:
      return allow_tf32 ? Arithmetic::tf32 : Arithmetic::float32;
    case Dtype::float16:
      return Arithmetic::float16;
    default:
      return Arithmetic::bfloat16;
  }
}

// The widest H of rec_cta, so that its weights stay in the registers of one block.
int64_t widest_cta(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::float64:
      return 32;
    case Arithmetic::float32:
    case Arithmetic::tf32:
      return 64;
    default:
      return 128;
  }
}

int padded_hidden(int64_t H) { return H <= 32 ? 32 : H <= 64 ? 64 : 128; }

// The largest tile that still gives most multiprocessors a block; padding of a small batch costs
// more than it saves.
StepTile step_tile(const LayerShape& s, const CudaDevice& device, Arithmetic arithmetic,
                   bool backward) {
  const int64_t rows = backward ? s.H : 4 * s.H;
  const auto blocks = [&](int64_t tile_rows, int64_t columns) {
    return ceil_div(rows, tile_rows) * ceil_div(s.B, columns) * s.D;
  };
  const auto fits = [&](StepTile tile) { return device.shared_bytes >= step_shared_bytes(tile); };
  if (fits(StepTile::large) && arithmetic != Arithmetic::float64 && s.B > 32 &&
      blocks(128, 64) * 4 >= 3 * int64_t(device.multiprocessors))
    return StepTile::large;
  if (fits(StepTile::medium) && s.B > 16 && 2 * blocks(64, 32) >= device.multiprocessors)
    return StepTile::medium;
  return StepTile::small;
}

}  // namespace

const char* name_of(Family family) { return family == Family::rec_cta ? "rec_cta" : "rec_step"; }

const char* name_of(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::float64:
      return "float64";
    case Arithmetic::float32:
      return "float32";
    case Arithmetic::tf32:
      return "tf32";
    case Arithmetic::float16:
      return "float16";
    default:
      return "bfloat16";
  }
}

const char* name_of(StepTile tile) {
  return tile == StepTile::small ? "small" : tile == StepTile::medium ? "medium" : "large";
}

bool can_run(Family family, const LayerShape& shape, Arithmetic arithmetic,
             const CudaDevice& device) {
  if (device.architecture < 80) return false;
  if (family == Family::rec_step) return device.shared_bytes >= step_shared_bytes(StepTile::small);
  return !shape.projected && shape.H <= widest_cta(arithmetic) &&
         device.shared_bytes >= kCtaSharedBytes;
}

CudaPlan plan_cuda(const LayerShape& shape, const CudaRequest& request, const CudaDevice& device) {
  CudaPlan plan{};
  plan.arithmetic = arithmetic_of(shape.dtype, request.allow_tf32);
  const auto possible = [&](Family family) {
    return !(request.refused >> int(family) & 1) && can_run(family, shape, plan.arithmetic, device);
  };
  const auto choose = [&](Family family, const char* reason) {
    plan.family = family;
    plan.reason = reason;
    plan.possible = possible(family);
  };
  if (request.forced >= 0) {
    choose(Family(request.forced), "forced");
    if (!plan.possible) plan.reason = "forced, but it cannot run this";
  } else if (!possible(Family::rec_cta)) {
    choose(Family::rec_step, shape.projected ? "projected: the only family that has it"
                             : shape.H > widest_cta(plan.arithmetic)
                                 ? "the weights do not fit the registers of one block"
                             : device.shared_bytes < kCtaSharedBytes
                                 ? "rec_cta needs more shared memory than the device has"
                                 : "rec_cta could not be launched on this device");
    if (!plan.possible)
      plan.reason = device.architecture < 80 ? "the device is older than compute capability 8.0"
                                             : "no kernel family can be launched on this device";
  } else {
    choose(Family::rec_cta, "the weights fit the registers of one block");
  }
  plan.tile = step_tile(shape, device, plan.arithmetic, request.backward);
  plan.overlap = device.architecture >= 90;
  plan.padded_hidden = padded_hidden(shape.H);
  return plan;
}

}  // namespace lstm_cuda
