// Instantiations of step_project (rec_step.cuh). Few rows: no large tile.
#include "rec_step.cuh"

namespace lstm_cuda {

Status launch_step_project(const StepProject& p, const CudaPlan& plan, bool overlap,
                           Stream stream) {
  return choose_step<false>(plan, [&]<Arithmetic a, StepTile tile>() {
    return start_step<StepProduct<a, StepTileOf<tile>, 1>, step_project<a, tile>>("step_project", p,
                                                                                  overlap, stream);
  });
}

}  // namespace lstm_cuda
