// rec_cluster forward: rec_forward.cuh with h sent through distributed shared memory. Clusters know
// nothing of each other, so any number of them may be resident, in any order.
#include "exchange_cluster.cuh"

namespace lstm_cuda {

Status rec_cluster_forward(const RecurrenceForward& p, const CudaPlan& plan,
                           const PackedWeights& weights, Stream stream) {
  constexpr const char* kName = "rec_cluster_forward";
  Status status = resident::check(kName, p.shape, plan);
  if (!status.ok()) return status;
  const auto start = [&]<Arithmetic arithmetic, ResidentShape shape, int tiles>() {
    using F = resident::ForwardConfig<arithmetic, shape, tiles>;
    const unsigned parts = unsigned(tiles_of(p.shape, F::kColumns) * p.shape.D);
    using Team = resident::Team<F, resident::ClusterExchange>;
    status = resident::start_forward<F, Team>(kName, p, {weights, nullptr}, 0, parts, stream);
  };
  return resident::by_plan<kClusterShapes, kClusterShapesExact>(plan, start)
             ? status
             : resident::unsupported(kName, plan);
}

}  // namespace lstm_cuda
