// rec_group forward: rec_forward.cuh with h sent through L2. The blocks of a group wait for each other,
// so all blocks of a launch must be resident together: launches are cooperative, and a layer with more
// parts than the plan's groups takes several.
#include "exchange_group.cuh"

namespace lstm_cuda {

int64_t rec_group_words(const LayerShape& shape, const CudaPlan& plan, bool backward) {
  const int64_t words = group_words(plan.arithmetic, plan.resident, plan.column_tiles, backward);
  return tiles_of(shape, 8 * plan.column_tiles) * shape.D * words * 4;
}

Status rec_group_forward(const RecurrenceForward& p, const CudaPlan& plan,
                         const PackedWeights& weights, void* words, Stream stream) {
  constexpr const char* kName = "rec_group_forward";
  const auto start = [&]<Arithmetic arithmetic, ResidentShape shape, int tiles, int turns>(
                         unsigned parts) {
    using F = resident::ForwardConfig<arithmetic, shape, tiles, turns>;
    using Team = resident::Team<F, resident::GroupExchange>;
    return resident::in_rounds(parts, plan.groups, [&](unsigned first, unsigned count) {
      auto* const own = static_cast<uint32_t*>(words) + first * resident::GroupExchange<F>::kWords;
      return resident::start_forward<F, Team>(kName, p, {weights, own}, first, count, stream);
    });
  };
  return resident::launch_planned<Family::rec_group, kGroupShapes, kGroupShapesExact>(
      kName, p.shape, plan, start);
}

}  // namespace lstm_cuda
