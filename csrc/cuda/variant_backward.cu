// Instantiations of variant_backward and variant_backward_row (step_variant.cuh).
#include "step_variant.cuh"

namespace lstm_cuda {

Status launch_variant_backward(const StepBackward& p, const CudaPlan& plan, bool overlap,
                               Stream stream) {
  const Status status = choose_step<false>(plan, [&]<Arithmetic a, StepTile tile>() {
    return start_step<StepProduct<a, StepTileOf<tile>, 1>, variant_backward<a, tile>>(
        "variant_backward", p, overlap, stream);
  });
  if (!p.row || !status.ok()) return status;
  return by_arithmetic(plan.arithmetic, [&]<Arithmetic a>() {
    return start_rows<a, variant_backward_row<a>>("variant_backward_row", p, plan.overlap, stream);
  });
}

}  // namespace lstm_cuda
