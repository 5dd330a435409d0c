// Runs rec_cta's kernels for other cells: variant_run.hpp.
//   variant_cta ARITHMETIC ORDER SEED [CASE | FIRST/PARTS]
#include "variant_run.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

std::optional<Kernels> kernels_of(Arithmetic arithmetic, const LayerShape& shape,
                                  const VariantCase& c) {
  const auto plan = [&](bool backward) {
    CudaRequest request{arithmetic == Arithmetic::tf32, backward, int(Family::rec_cta), 0};
    request.cell = c.has(kNorm) ? CellKind::norm : CellKind::options;
    return plan_cuda(shape, request, {90, 132, 232448});
  };
  const CudaPlan forward = plan(false), backward = plan(true);
  if (!backward.possible) return {};
  Kernels kernels{
      nullptr, [=](const RecurrenceBackward& p) { return variant_cta_backward(p, backward, {}); },
      false};
  if (forward.possible)
    kernels.forward = [=](const RecurrenceForward& p) {
      return variant_cta_forward(p, forward, {});
    };
  return kernels;
}

}  // namespace

int main(int argc, char** argv) { return variants_main(argc, argv, kernels_of); }
