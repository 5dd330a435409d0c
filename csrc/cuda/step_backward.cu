// Instantiations of step_backward (rec_step.cuh).
#include "rec_step.cuh"

namespace lstm_cuda {

Status launch_step_backward(const StepBackward& p, const CudaPlan& plan, bool overlap,
                            Stream stream) {
  return choose_step<true>(plan, [&]<Arithmetic a, StepTile tile>() {
    return start_step<StepProduct<a, StepTileOf<tile>, 1>, step_backward<a, tile>>(
        "step_backward", p, overlap, stream);
  });
}

}  // namespace lstm_cuda
