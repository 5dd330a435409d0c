// Instantiations of step_project (rec_step.cuh). Few rows: no large tile.
#include "rec_step.cuh"

namespace lstm_cuda {

Status launch_step_project(const StepProject& p, const CudaPlan& plan, bool variant, bool overlap,
                           Stream stream) {
  return choose_step<false>(plan, [&]<Arithmetic a, StepTile tile>() {
    using Product = StepProduct<a, StepTileOf<tile>, 1>;
    constexpr const char* name = "step_project";
    return variant ? start_step<Product, step_project<a, tile, true>>(name, p, overlap, stream)
                   : start_step<Product, step_project<a, tile, false>>(name, p, overlap, stream);
  });
}

}  // namespace lstm_cuda
