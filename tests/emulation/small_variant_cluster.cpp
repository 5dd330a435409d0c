// Runs variant_cluster_backward's kernels in a shape of few threads, each with several cells, so
// that sanitizers are quick: variant_cluster_run.hpp.
#include <algorithm>

#include "cuda/reduce_cluster.cuh"
#include "variant_cluster_run.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

constexpr ResidentShape kShape{128, 4, 4, 2, 0, 0};

template <Arithmetic arithmetic, int tiles, CellKind cell>
BackwardStart start_of(const LayerShape& layer) {
  CudaPlan plan{};
  plan.possible = true, plan.arithmetic = arithmetic, plan.resident = kShape;
  const unsigned parts = unsigned(tiles_of(layer, 8 * tiles) * layer.D);
  return [=](const RecurrenceBackward& p) {
    using F = resident::BackwardConfig<arithmetic, kShape, tiles, 1, cell>;
    return with_packed(p, plan, 0, [&](const PackedWeights& weights, void*) {
      return resident::start_backward<F, resident::ClusterReduce>(
          "small_variant_cluster", resident::backward_params(p, weights, nullptr), 0, parts, {});
    });
  };
}

BackwardStart choose(Arithmetic arithmetic, const LayerShape& layer, const VariantCase& c) {
  if (layer.H > kShape.hidden) return {};
  return by_arithmetic(arithmetic, [&]<Arithmetic a>() -> BackwardStart {
    if constexpr (a == Arithmetic::float64) {
      return {};
    } else {
      if (c.norm) return start_of<a, 1, CellKind::norm>(layer);
      constexpr int most = std::min(2, most_tiles(a, kShape));
      if (c.tiles == 2) return start_of<a, most, CellKind::options>(layer);
      return start_of<a, 1, CellKind::options>(layer);
    }
  });
}

}  // namespace

// Of the plain cell: not compiled here.
namespace lstm_cuda {
Status launch_step_forward(const StepForward&, const CudaPlan&, bool, Stream) { std::abort(); }
Status launch_step_backward(const StepBackward&, const CudaPlan&, bool, Stream) { std::abort(); }
}  // namespace lstm_cuda

int main(int argc, char** argv) { return variant_cluster_main(argc, argv, choose); }
