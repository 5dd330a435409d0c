// Runs rec_cluster's kernels for other cells in a shape of few threads, each with several cells, so that
// sanitizers are quick: variant_run.hpp.
//   small_variant_cluster ARITHMETIC ORDER SEED [CASE | FIRST/PARTS]
#include "cuda/exchange_cluster.cuh"
#include "cuda/reduce_cluster.cuh"
#include "variant_run.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

constexpr ResidentShape kShape{128, 4, 4, 2, 0, 0};

template <Arithmetic arithmetic, int tiles, CellKind cell>
Kernels with(const LayerShape& layer) {
  CudaPlan plan{};
  plan.possible = true, plan.arithmetic = arithmetic, plan.resident = kShape;
  const unsigned parts = unsigned(tiles_of(layer, 8 * tiles) * layer.D);
  using resident::ClusterExchange, resident::ClusterReduce;
  using Forward = resident::ForwardConfig<arithmetic, kShape, tiles, 1, cell>;
  using Backward = resident::BackwardConfig<arithmetic, kShape, tiles, 1, cell>;
  return {[=](const RecurrenceForward& p) {
            return with_packed(p, plan, 0, [&](const PackedWeights& weights, void*) {
              return resident::start_forward<Forward, resident::Team<Forward, ClusterExchange>>(
                  "small_variant_cluster", p, {weights, nullptr}, 0, parts, {});
            });
          },
          [=](const RecurrenceBackward& p) {
            return with_packed(p, plan, 0, [&](const PackedWeights& weights, void*) {
              return resident::start_backward<Backward, ClusterReduce>(
                  "small_variant_cluster", resident::backward_params(p, weights, nullptr), 0, parts,
                  {});
            });
          },
          true};
}

std::optional<Kernels> kernels_of(Arithmetic arithmetic, const LayerShape& layer,
                                  const VariantCase& c) {
  if (layer.H > kShape.hidden) return {};
  return by_arithmetic(arithmetic, [&]<Arithmetic a>() -> std::optional<Kernels> {
    if constexpr (a == Arithmetic::float64) {
      return {};
    } else {
      if (c.has(kNorm)) return with<a, 1, CellKind::norm>(layer);
      constexpr int most = std::min(2, most_tiles(a, kShape));
      if (c.tiles == 2) return with<a, most, CellKind::options>(layer);
      return with<a, 1, CellKind::options>(layer);
    }
  });
}

}  // namespace

int main(int argc, char** argv) { return variants_main(argc, argv, kernels_of); }
