#include "cuda/exchange_cluster.cuh"
#include "cuda/reduce_cluster.cuh"
#include "small_resident.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

template <Arithmetic arithmetic, ResidentShape shape, int tiles, int turns>
struct Small {
  static Kernels get(const CudaPlan& plan, const LayerShape& layer) {
    const unsigned parts = unsigned(tiles_of(layer, 8 * tiles * turns) * layer.D);
    return {[=](const RecurrenceForward& p) {
              using F = resident::ForwardConfig<arithmetic, shape, tiles, turns>;
              using Team = resident::Team<F, resident::ClusterExchange>;
              return with_packed(p, plan, 0, [&](const PackedWeights& weights, void*) {
                return resident::start_forward<F, Team>("small_cluster", p, {weights, nullptr}, 0,
                                                        parts, {});
              });
            },
            [=](const RecurrenceBackward& p) {
              using F = resident::BackwardConfig<arithmetic, shape, tiles, turns>;
              return with_packed(p, plan, 0, [&](const PackedWeights& weights, void*) {
                return resident::start_backward<F, resident::ClusterReduce>(
                    "small_cluster", resident::backward_params(p, weights, nullptr), 0, parts, {});
              });
            },
            true};
  }
};

// Depth in two parts of one chunk, in two of two, and in four.
constexpr ResidentShape kHalves{128, 4, 8, 2, 0, 0}, kChunks{256, 8, 4, 2, 0, 0},
    kQuarters{128, 4, 8, 4, 0, 0};

std::optional<Kernels> choose(Arithmetic arithmetic, const LayerShape& layer, const Case& c) {
  if (c.turns == 2 && c.H > 128) return small_kernels<Small, kChunks, 4, 2>(arithmetic, layer);
  if (c.turns == 2) return small_kernels<Small, kQuarters, 2, 2>(arithmetic, layer);
  if (c.H > 128) return small_kernels<Small, kChunks, 2, 1>(arithmetic, layer);
  if (c.tiles == 4) return small_kernels<Small, kHalves, 4, 1>(arithmetic, layer);
  if (c.reset && c.D == 1) return small_kernels<Small, kQuarters, 2, 1>(arithmetic, layer);
  return small_kernels<Small, kHalves, 1, 1>(arithmetic, layer);
}

}  // namespace

int main(int argc, char** argv) { return main_of(argc, argv, kSmallCases, choose); }
