// Runs rec_cluster's kernels for other cells in the shapes that the product has: variant_run.hpp.
//   variant_cluster ARITHMETIC ORDER SEED [CASE | FIRST/PARTS]
#include "variant_run.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

// What depends on the cell alone small_variant_cluster.cpp has seen.
constexpr int64_t kWidth = 64;

template <std::size_t count>
std::optional<Kernels> of_shapes(const ResidentShape (&shapes)[count], Arithmetic arithmetic,
                                 const LayerShape& layer, const VariantCase& c) {
  const CellKind cell = c.has(kNorm) ? CellKind::norm : CellKind::options;
  const auto fits = [&](const ResidentShape& each) { return layer.H <= each.hidden; };
  const ResidentShape* const shape = std::find_if(shapes, shapes + count, fits);
  if (shape == shapes + count) return {};
  CudaPlan plan{};
  plan.family = Family::rec_cluster, plan.possible = true, plan.arithmetic = arithmetic;
  plan.resident = *shape, plan.turns = 1;
  plan.column_tiles = std::min(c.tiles, most_tiles(arithmetic, *shape));
  while (!has_turns(Family::rec_cluster, cell, *shape, plan.column_tiles, 1)) --plan.column_tiles;
  const auto start = [plan](const auto& p, auto kernels) {
    return with_packed(p, plan, 0, [&](const PackedWeights& weights, void*) {
      return kernels(p, plan, weights, {});
    });
  };
  return Kernels{[=](const RecurrenceForward& p) { return start(p, variant_cluster_forward); },
                 [=](const RecurrenceBackward& p) { return start(p, variant_cluster_backward); },
                 true};
}

std::optional<Kernels> kernels_of(Arithmetic arithmetic, const LayerShape& layer,
                                  const VariantCase& c) {
  if (arithmetic == Arithmetic::float64 || layer.H < kWidth) return {};
  return arithmetic == Arithmetic::float32 ? of_shapes(kClusterShapesExact, arithmetic, layer, c)
                                           : of_shapes(kClusterShapesVariant, arithmetic, layer, c);
}

}  // namespace

int main(int argc, char** argv) { return variants_main(argc, argv, kernels_of); }
