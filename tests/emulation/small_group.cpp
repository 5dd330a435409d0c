#include "cuda/exchange_group.cuh"
#include "cuda/reduce_group.cuh"
#include "small_resident.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

template <Arithmetic arithmetic, ResidentShape shape, int tiles, int turns>
struct Small {
  static Kernels get(const CudaPlan& plan, const LayerShape& layer) {
    // ThreadSanitizer knows 8000 threads at most.
    constexpr int kTogether = 4096 / (32 * shape.blocks * shape.warps);
    const unsigned parts = unsigned(tiles_of(layer, 8 * tiles * turns) * layer.D);
    return {[=](const RecurrenceForward& p) {
              using F = resident::ForwardConfig<arithmetic, shape, tiles, turns>;
              using Team = resident::Team<F, resident::GroupExchange>;
              const int64_t bytes = 4 * resident::GroupExchange<F>::kWords * parts;
              return with_packed(p, plan, bytes, [&](const PackedWeights& weights, void* words) {
                return resident::in_rounds(parts, kTogether, [&](unsigned first, unsigned count) {
                  auto* const own =
                      static_cast<uint32_t*>(words) + first * resident::GroupExchange<F>::kWords;
                  return resident::start_forward<F, Team>("small_group", p, {weights, own}, first,
                                                          count, {});
                });
              });
            },
            [=](const RecurrenceBackward& p) {
              using F = resident::BackwardConfig<arithmetic, shape, tiles, turns>;
              const int64_t bytes = 4 * resident::GroupReduce<F>::kWords * parts;
              return with_packed(p, plan, bytes, [&](const PackedWeights& weights, void* words) {
                return resident::in_rounds(parts, kTogether, [&](unsigned first, unsigned count) {
                  auto* const own =
                      static_cast<uint32_t*>(words) + first * resident::GroupReduce<F>::kWords;
                  return resident::start_backward<F, resident::GroupReduce>(
                      "small_group", resident::backward_params(p, weights, own), first, count, {});
                });
              });
            },
            true};
  }
};

// All weights in registers, and some in shared memory.
constexpr ResidentShape kHeld{128, 8, 4, 4, 0, 0}, kShared{256, 16, 4, 4, 2, 2};

std::optional<Kernels> choose(Arithmetic arithmetic, const LayerShape& layer, const Case& c) {
  if (c.H > 128) return small_kernels<Small, kShared, 2, 1>(arithmetic, layer);
  if (c.tiles == 4) return small_kernels<Small, kHeld, 4, 1>(arithmetic, layer);
  return small_kernels<Small, kHeld, 1, 1>(arithmetic, layer);
}

}  // namespace

int main(int argc, char** argv) { return main_of(argc, argv, kSmallCases, choose); }
