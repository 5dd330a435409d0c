// rec_cluster backward: rec_backward.cuh with sums sent through distributed shared memory. Clusters
// know nothing of each other, so any number of them may be resident, in any order.
#include "reduce_cluster.cuh"

namespace lstm_cuda {

Status rec_cluster_backward(const RecurrenceBackward& p, const CudaPlan& plan,
                            const PackedWeights& weights, Stream stream) {
  constexpr const char* kName = "rec_cluster_backward";
  const auto start =
      [&]<Arithmetic arithmetic, ResidentShape shape, int tiles, int turns>(unsigned parts) {
        using F = resident::BackwardConfig<arithmetic, shape, tiles, turns>;
        return resident::start_backward<F, resident::ClusterReduce>(
            kName, resident::backward_params(p, weights, nullptr), 0, parts, stream);
      };
  return resident::launch_planned<Family::rec_cluster, kClusterShapes, kClusterShapesExact>(
      kName, p.shape, plan, start);
}

}  // namespace lstm_cuda
