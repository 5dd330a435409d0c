// Instantiations of variant_forward and variant_forward_row (step_variant.cuh). No large tile: the cell
// takes more than its share of the time, and a kernel for each tile would be compiled for few.
#include "step_variant.cuh"

namespace lstm_cuda {

Status launch_variant_forward(const StepForward& p, const CudaPlan& plan, bool overlap,
                              Stream stream) {
  const Status status = choose_step<false>(plan, [&]<Arithmetic a, StepTile tile>() {
    return start_step<StepProduct<a, StepTileOf<tile>, 4>, variant_forward<a, tile>>(
        "variant_forward", p, overlap, stream);
  });
  if (!p.row || !status.ok()) return status;
  return by_arithmetic(plan.arithmetic, [&]<Arithmetic a>() {
    return start_rows<a, variant_forward_row<a>>("variant_forward_row", p, plan.overlap, stream);
  });
}

}  // namespace lstm_cuda
