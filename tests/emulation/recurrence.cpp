// Runs families rec_cta and rec_step, forward and backward, on small problems. Built plain, with
// AddressSanitizer and with ThreadSanitizer, and from broken copies of the kernels.
//   recurrence FAMILY ARITHMETIC ORDER SEED [CASE | FIRST/PARTS]
#include <cstdlib>

#include "cuda/rec_step.cuh"
#include "recurrence_run.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

const Case kCases[] = {
    {4, 9, 2, 21, 0, 2, true, true, true, true},
    {3, 3, 1, 70, 0, 1, true, false, true, true},
    {3, 17, 1, 24, 0, 0, false, true, false, true},
    {2, 8, 1, 64, 0, 0, false, false, true, false},
    {4, 5, 2, 19, 6, 2, true, true, true, true},
    {3, 5, 1, 40, 33, 1, true, false, false, false},
    {2, 37, 1, 27, 0, 0, false, false, true, false},
    {3, 3, 1, 27, 0, 0, false, false, true, true, Inputs::weights_differ},
    {3, 3, 1, 27, 0, 0, false, false, true, true, Inputs::tiny_weights},
    {3, 3, 1, 27, 0, 0, false, false, true, true, Inputs::saturated},
    {3, 3, 1, 27, 0, 0, false, false, true, true, Inputs::closed_output},
    {3, 3, 1, 27, 0, 0, false, false, true, true, Inputs::large_gradients},
    {3, 3, 1, 27, 0, 0, false, false, true, true, Inputs::tiny_gradients},
    {3, 5, 1, 27, 0, 1, true, false, true, true, Inputs::gradients_differ},
    {4, 5, 1, 27, 0, 1, false, false, true, true, Inputs::nan_row},
};

std::optional<Kernels> cta_kernels(Arithmetic arithmetic, const LayerShape& shape, const Case&) {
  const CudaPlan plan = plan_cuda(
      shape, {arithmetic == Arithmetic::tf32, true, int(Family::rec_cta), 0}, {90, 132, 232448});
  if (!plan.possible || plan.folds_projection) return {};  // folding is not the kernel's work
  return Kernels{[=](const RecurrenceForward& p) { return rec_cta_forward(p, plan, {}); },
                 [=](const RecurrenceBackward& p) { return rec_cta_backward(p, plan, {}); }, false};
}

std::optional<Kernels> step_kernels(Arithmetic arithmetic, const LayerShape& shape, const Case&) {
  // A device with few multiprocessors is given larger tiles.
  const int multiprocessors = shape.B > 32 ? 1 : 132;
  const auto start = [=](const auto& p, auto kernels, bool backward) {
    const CudaPlan plan =
        plan_cuda(shape, {arithmetic == Arithmetic::tf32, backward, int(Family::rec_step), 0},
                  {90, multiprocessors, 232448});
    const DeviceBuffer<char> scratch(size_t(rec_step_scratch(shape, plan, nullptr, backward)));
    return kernels(p, plan, scratch.data(), {});
  };
  return Kernels{[=](const RecurrenceForward& p) { return start(p, rec_step_forward, false); },
                 [=](const RecurrenceBackward& p) { return start(p, rec_step_backward, true); },
                 false};
}

}  // namespace

// Of other cells, which variants.cpp runs: not compiled here.
namespace lstm_cuda {
Status launch_variant_forward(const StepForward&, const CudaPlan&, bool, Stream) { std::abort(); }
Status launch_variant_backward(const StepBackward&, const CudaPlan&, bool, Stream) { std::abort(); }
}  // namespace lstm_cuda

int main(int argc, char** argv) {
  const std::string family = argc < 5 ? "" : argv[1];
  if (family == "rec_cta") return main_of(argc - 1, argv + 1, kCases, cta_kernels);
  if (family == "rec_step") return main_of(argc - 1, argv + 1, kCases, step_kernels);
  return 2;
}
