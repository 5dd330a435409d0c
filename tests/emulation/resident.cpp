// Runs families rec_cluster and rec_group, forward and backward, in the shapes that the product has. They
// have many threads, too many for ThreadSanitizer: small_cluster.cpp and small_group.cpp run the same
// kernels in smaller ones, and harder inputs.
//   resident FAMILY ARITHMETIC ORDER SEED [CASE | FIRST/PARTS]
#include <algorithm>

#include "recurrence_run.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

const Case kClusterCases[] = {
    {6, 9, 2, 100, 0, 2, true, true, true, true},
    {3, 17, 1, 129, 0, 1, true, false, true, true, Inputs::usual, 2},
    {4, 19, 1, 256, 0, 0, true, true, true, true, Inputs::usual, 2, 1, 2},
    {3, 5, 1, 384, 0, 0, false, true, true, true},
    {3, 30, 1, 376, 0, 1, true, true, true, false, Inputs::usual, 4},
    {3, 9, 1, 512, 0, 0, false, false, true, true},
    {3, 30, 1, 499, 0, 1, true, true, false, true, Inputs::usual, 4},
    {3, 27, 1, 512, 0, 0, true, true, true, true, Inputs::usual, 4, 1, 2},
};

// Whose groups are all of a launch, or fewer than there are parts.
const Case kGroupCases[] = {
    {5, 9, 1, 512, 0, 1, true, true, true, true, Inputs::usual, 1, 2},
    {3, 20, 1, 401, 0, 0, true, false, true, true, Inputs::usual, 2, 1},
    {2, 10, 1, 760, 0, 0, false, true, true, true, Inputs::usual, 4, 1},
    {3, 5, 1, 1024, 0, 0, true, true, true, true, Inputs::usual, 1, 1},
    {2, 11, 1, 1000, 0, 0, true, false, false, true, Inputs::usual, 2, 1},
    {2, 3, 1, 2048, 0, 0, false, false, true, true, Inputs::usual, 1, 1},
};

// The plan that the tables give, whatever the planner would say.
template <std::size_t count>
std::optional<CudaPlan> plan_of(const ResidentShape (&shapes)[count], Family family,
                                Arithmetic arithmetic, const LayerShape& shape, const Case& c) {
  for (const ResidentShape& resident : shapes) {
    if (resident.hidden < shape.H) continue;
    CudaPlan plan{};
    plan.family = family, plan.possible = true, plan.arithmetic = arithmetic;
    plan.resident = resident, plan.groups = c.groups;
    plan.column_tiles = std::min(c.tiles, most_tiles(arithmetic, resident));
    plan.turns = has_turns(family, CellKind::plain, resident, plan.column_tiles, c.turns)
                     ? c.turns
                     : 3 - c.turns;
    return plan;
  }
  return {};
}

std::optional<Kernels> cluster_kernels(Arithmetic arithmetic, const LayerShape& shape,
                                       const Case& c) {
  const auto plan = arithmetic == Arithmetic::float64 ? std::nullopt
                    : arithmetic == Arithmetic::float32
                        ? plan_of(kClusterShapesExact, Family::rec_cluster, arithmetic, shape, c)
                        : plan_of(kClusterShapes, Family::rec_cluster, arithmetic, shape, c);
  if (!plan) return {};
  const auto start = [plan = *plan](const auto& p, auto kernels) {
    return with_packed(p, plan, 0, [&](const PackedWeights& weights, void*) {
      return kernels(p, plan, weights, {});
    });
  };
  return Kernels{[=](const RecurrenceForward& p) { return start(p, rec_cluster_forward); },
                 [=](const RecurrenceBackward& p) { return start(p, rec_cluster_backward); }, true};
}

std::optional<Kernels> group_kernels(Arithmetic arithmetic, const LayerShape& shape,
                                     const Case& c) {
  const auto plan = arithmetic == Arithmetic::float64 ? std::nullopt
                    : arithmetic == Arithmetic::float32
                        ? plan_of(kGroupShapesExact, Family::rec_group, arithmetic, shape, c)
                        : plan_of(kGroupShapes, Family::rec_group, arithmetic, shape, c);
  if (!plan) return {};
  const auto start = [plan = *plan, shape](const auto& p, auto kernels, bool backward) {
    return with_packed(p, plan, rec_group_words(shape, plan, backward),
                       [&](const PackedWeights& weights, void* words) {
                         return kernels(p, plan, weights, words, {});
                       });
  };
  return Kernels{[=](const RecurrenceForward& p) { return start(p, rec_group_forward, false); },
                 [=](const RecurrenceBackward& p) { return start(p, rec_group_backward, true); },
                 true};
}

}  // namespace

int main(int argc, char** argv) {
  const std::string family = argc < 5 ? "" : argv[1];
  if (family == "rec_cluster") return main_of(argc - 1, argv + 1, kClusterCases, cluster_kernels);
  if (family == "rec_group") return main_of(argc - 1, argv + 1, kGroupCases, group_kernels);
  return 2;
}
