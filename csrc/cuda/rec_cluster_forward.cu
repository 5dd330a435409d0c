// rec_cluster forward: rec_forward.cuh with h sent through distributed shared memory. Clusters know
// nothing of each other, so any number of them may be resident, in any order.
#include "exchange_cluster.cuh"

namespace lstm_cuda {

Status rec_cluster_forward(const RecurrenceForward& p, const CudaPlan& plan,
                           const PackedWeights& weights, Stream stream) {
  constexpr const char* kName = "rec_cluster_forward";
  const auto start =
      [&]<Arithmetic arithmetic, ResidentShape shape, int tiles, int turns>(unsigned parts) {
        using F = resident::ForwardConfig<arithmetic, shape, tiles, turns>;
        using Team = resident::Team<F, resident::ClusterExchange>;
        return resident::start_forward<F, Team>(kName, p, {weights, nullptr}, 0, parts, stream);
      };
  return resident::launch_planned<Family::rec_cluster, kClusterShapes, kClusterShapesExact>(
      kName, p.shape, plan, start);
}

}  // namespace lstm_cuda
