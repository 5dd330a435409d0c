// Instantiations of step_forward (rec_step.cuh).
#include "rec_step.cuh"

namespace lstm_cuda {

Status launch_step_forward(const StepForward& p, const CudaPlan& plan, bool overlap,
                           Stream stream) {
  return choose_step<true>(plan, [&]<Arithmetic a, StepTile tile>() {
    return start_step<StepProduct<a, StepTileOf<tile>, 4>, step_forward<a, tile>>("step_forward", p,
                                                                                  overlap, stream);
  });
}

}  // namespace lstm_cuda
