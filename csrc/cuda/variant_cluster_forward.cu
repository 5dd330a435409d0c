// rec_cluster forward, of other cells than torch.nn.LSTM's.
#include "exchange_cluster.cuh"

namespace lstm_cuda {
namespace {

template <CellKind cell>
Status forward(const RecurrenceForward& p, const CudaPlan& plan, const PackedWeights& weights,
               Stream stream) {
  constexpr const char* kName = "variant_cluster_forward";
  const auto start =
      [&]<Arithmetic arithmetic, ResidentShape shape, int tiles, int turns>(unsigned parts) {
        using F = resident::ForwardConfig<arithmetic, shape, tiles, turns, cell>;
        using Team = resident::Team<F, resident::ClusterExchange>;
        return resident::start_forward<F, Team>(kName, p, {weights, nullptr}, 0, parts, stream);
      };
  return resident::launch_planned<Family::rec_cluster, kClusterShapesVariant, kClusterShapesExact,
                                  cell>(kName, p.shape, plan, start);
}

}  // namespace

Status variant_cluster_forward(const RecurrenceForward& p, const CudaPlan& plan,
                               const PackedWeights& weights, Stream stream) {
  return p.variant->norm ? forward<CellKind::norm>(p, plan, weights, stream)
                         : forward<CellKind::options>(p, plan, weights, stream);
}

}  // namespace lstm_cuda
