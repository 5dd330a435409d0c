// Family rec_cluster, backward, for other cells than torch.nn.LSTM's: the kernel of
// rec_cluster_backward.cu with what variant_backward_cells.cuh has besides.
#include "reduce_cluster.cuh"

namespace lstm_cuda {

namespace {

template <CellKind cell>
Status start_cell(const RecurrenceBackward& p, const CudaPlan& plan, const PackedWeights& weights,
                  Stream stream) {
  constexpr const char* kName = "variant_cluster_backward";
  const auto start =
      [&]<Arithmetic arithmetic, ResidentShape shape, int tiles, int turns>(unsigned parts) {
        using F = resident::BackwardConfig<arithmetic, shape, tiles, turns, cell>;
        return resident::start_backward<F, resident::ClusterReduce>(
            kName, resident::backward_params(p, weights, nullptr), 0, parts, stream);
      };
  return resident::launch_planned<Family::rec_cluster, kClusterShapesVariant, kClusterShapesExact,
                                  cell>(kName, p.shape, plan, start);
}

}  // namespace

Status variant_cluster_backward(const RecurrenceBackward& p, const CudaPlan& plan,
                                const PackedWeights& weights, Stream stream) {
  return kind_of(p.variant) == CellKind::norm
             ? start_cell<CellKind::norm>(p, plan, weights, stream)
             : start_cell<CellKind::options>(p, plan, weights, stream);
}

}  // namespace lstm_cuda
