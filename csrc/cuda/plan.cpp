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

// Why the family cannot run it; null if it can.
const char* why_not(Family family, const LayerShape& s, Arithmetic arithmetic,
                    const CudaDevice& device) {
  if (device.architecture < 80) return "the device is older than compute capability 8.0";
  if (family == Family::rec_step) {
    if (device.shared_bytes < step_shared_bytes(StepTile::small))
      return "the device has too little shared memory";
    return nullptr;
  }
  if (s.projected) return "rec_cta has no projection";
  if (s.H > widest_cta(arithmetic)) return "the weights do not fit the registers of one block";
  if (device.shared_bytes < kCtaSharedBytes)
    return "rec_cta needs more shared memory than the device has";
  if (s.T > kMostOfCta || ceil_div(s.B, 8) * s.D > kMostOfCta)
    return "more steps or rows than rec_cta counts";
  return nullptr;
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

CudaPlan plan_cuda(const LayerShape& shape, const CudaRequest& request, const CudaDevice& device) {
  CudaPlan plan{};
  plan.arithmetic = arithmetic_of(shape.dtype, request.allow_tf32);
  const auto obstacle = [&](Family family) {
    if (request.refused >> int(family) & 1) return "rec_cta could not be launched on this device";
    return why_not(family, shape, plan.arithmetic, device);
  };
  const char* const not_cta = obstacle(Family::rec_cta);
  plan.family = request.forced >= 0 ? Family(request.forced)
                : not_cta           ? Family::rec_step
                                    : Family::rec_cta;
  plan.reason = obstacle(plan.family);
  plan.possible = !plan.reason;
  if (plan.possible)
    plan.reason = request.forced >= 0 ? "forced"
                  : not_cta           ? not_cta
                                      : "the weights fit the registers of one block";
  plan.tile = step_tile(shape, device, plan.arithmetic, request.backward);
  plan.overlap = device.architecture >= 90;
  plan.padded_hidden = padded_hidden(shape.H);
  return plan;
}

}  // namespace lstm_cuda
