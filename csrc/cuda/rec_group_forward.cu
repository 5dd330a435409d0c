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
  Status status = resident::check(kName, p.shape, plan);
  if (!status.ok()) return status;
  const auto start = [&]<Arithmetic arithmetic, ResidentShape shape, int tiles>() {
    using F = resident::ForwardConfig<arithmetic, shape, tiles>;
    const unsigned parts = unsigned(tiles_of(p.shape, F::kColumns) * p.shape.D);
    using Team = resident::Team<F, resident::GroupExchange>;
    const unsigned at_once = unsigned(plan.groups);
    for (unsigned first = 0; first < parts && status.ok(); first += at_once) {
      auto* const own = static_cast<uint32_t*>(words) + first * resident::GroupExchange<F>::kWords;
      status = resident::start_forward<F, Team>(kName, p, {weights, own}, first,
                                                std::min(at_once, parts - first), stream);
    }
  };
  return resident::by_plan<kGroupShapes, kGroupShapesExact>(plan, start)
             ? status
             : resident::unsupported(kName, plan);
}

}  // namespace lstm_cuda
