// rec_group backward: rec_backward.cuh with sums sent through L2. The blocks of a group wait for
// each other, so all blocks of a launch must be resident together: launches are cooperative, and a
// layer with more parts than the plan's groups takes several.
#include "reduce_group.cuh"

namespace lstm_cuda {

Status rec_group_backward(const RecurrenceBackward& p, const CudaPlan& plan,
                          const PackedWeights& weights, void* words, Stream stream) {
  constexpr const char* kName = "rec_group_backward";
  const auto start = [&]<Arithmetic arithmetic, ResidentShape shape, int tiles, int turns>(
                         unsigned parts) {
    using F = resident::BackwardConfig<arithmetic, shape, tiles, turns>;
    return resident::in_rounds(parts, plan.groups, [&](unsigned first, unsigned count) {
      auto* const own = static_cast<uint32_t*>(words) + first * resident::GroupReduce<F>::kWords;
      return resident::start_backward<F, resident::GroupReduce>(
          kName, resident::backward_params(p, weights, own), first, count, stream);
    });
  };
  return resident::launch_planned<Family::rec_group, kGroupShapes, kGroupShapesExact>(
      kName, p.shape, plan, start);
}

}  // namespace lstm_cuda
