// Runs variant_cluster_backward in the shapes that the product has: variant_cluster_run.hpp.
#include <algorithm>

#include "variant_cluster_run.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

template <std::size_t count>
BackwardStart start_of(const ResidentShape (&shapes)[count], Arithmetic arithmetic,
                       const LayerShape& layer, const VariantCase& c) {
  const CellKind cell = c.norm ? CellKind::norm : CellKind::options;
  for (const ResidentShape& resident : shapes) {
    if (resident.hidden < layer.H) continue;
    CudaPlan plan{};
    plan.family = Family::rec_cluster, plan.possible = true, plan.arithmetic = arithmetic;
    plan.resident = resident, plan.turns = 1;
    plan.column_tiles = std::min(c.tiles, most_tiles(arithmetic, resident));
    while (!has_turns(Family::rec_cluster, cell, resident, plan.column_tiles, 1))
      --plan.column_tiles;
    return [plan](const RecurrenceBackward& p) {
      return with_packed(p, plan, 0, [&](const PackedWeights& weights, void*) {
        return variant_cluster_backward(p, plan, weights, {});
      });
    };
  }
  return {};
}

BackwardStart choose(Arithmetic arithmetic, const LayerShape& layer, const VariantCase& c) {
  if (arithmetic == Arithmetic::float64) return {};
  return arithmetic == Arithmetic::float32 ? start_of(kClusterShapesExact, arithmetic, layer, c)
                                           : start_of(kClusterShapesVariant, arithmetic, layer, c);
}

}  // namespace

// Of the plain cell: not compiled here.
namespace lstm_cuda {
Status launch_step_forward(const StepForward&, const CudaPlan&, bool, Stream) { std::abort(); }
Status launch_step_backward(const StepBackward&, const CudaPlan&, bool, Stream) { std::abort(); }
}  // namespace lstm_cuda

int main(int argc, char** argv) { return variant_cluster_main(argc, argv, choose); }
