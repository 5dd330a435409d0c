// rec_group backward: rec_backward.cuh with sums sent through L2. The blocks of a group wait for
// each other, so all blocks of a launch must be resident together: launches are cooperative, and a
// layer with more parts than the plan's groups takes several.
#include "reduce_group.cuh"

namespace lstm_cuda {

Status rec_group_backward(const RecurrenceBackward& p, const CudaPlan& plan,
                          const PackedWeights& weights, void* words, Stream stream) {
  constexpr const char* kName = "rec_group_backward";
  Status status = resident::check(kName, p.shape, plan);
  if (!status.ok()) return status;
  const auto start = [&]<Arithmetic arithmetic, ResidentShape shape, int tiles>() {
    using F = resident::BackwardConfig<arithmetic, shape, tiles>;
    const unsigned parts = unsigned(tiles_of(p.shape, F::kColumns) * p.shape.D);
    const unsigned at_once = unsigned(plan.groups);
    for (unsigned first = 0; first < parts && status.ok(); first += at_once) {
      auto* const own = static_cast<uint32_t*>(words) + first * resident::GroupReduce<F>::kWords;
      status = resident::start_backward<F, resident::GroupReduce>(
          kName, resident::backward_params(p, weights, own), first,
          std::min(at_once, parts - first), stream);
    }
  };
  return resident::by_plan<kGroupShapes, kGroupShapesExact>(plan, start)
             ? status
             : resident::unsupported(kName, plan);
}

}  // namespace lstm_cuda
