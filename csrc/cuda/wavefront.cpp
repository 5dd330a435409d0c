#include "wavefront.h"

#include <algorithm>

#include "plan_model.h"

namespace lstm_cuda {
namespace {

constexpr int64_t kShortestChunk = 128;  // steps; with fewer, starting takes too large a part
constexpr int kMostChunks = 16;
constexpr double kHost =
    80;  // [est] us in which a host starts a layer, in eager mode with autograd
constexpr double kWorthwhile = 0.85;  // of the time without a wavefront: estimates are rough

// How many layers with this plan the device holds at once.
int64_t side_by_side(const CudaPlan& plan, const LayerShape& s, const CudaDevice& device) {
  switch (plan.family) {
    case Family::rec_cta:
      return device.multiprocessors / (model::ceil_div(s.B, 8) * s.D);
    case Family::rec_cluster:
      return model::resident_clusters(plan.resident.blocks, device) /
             (model::ceil_div(s.B, 8 * plan.column_tiles) * s.D);
    default:
      // Groups of two launches might each hold what the other waits for; a step of rec_step is made
      // to fill the device.
      return 1;
  }
}

}  // namespace

int wavefront_chunks(int layers, const LayerShape& shape, const CudaRequest& request,
                     const CudaDevice& device) {
  const CudaPlan whole = plan_cuda(shape, request, device);
  if (layers < 2 || !whole.possible || side_by_side(whole, shape, device) < 2) return 1;
  double best_us = kWorthwhile * layers * std::max(whole.estimated_us, kHost);
  int best = 1;
  for (int chunks = 2; chunks <= kMostChunks && shape.T / chunks >= kShortestChunk; ++chunks) {
    LayerShape part = shape;
    part.T = model::ceil_div(shape.T, chunks);
    const CudaPlan plan = plan_cuda(part, request, device);
    const double rows = double(std::min<int64_t>(layers, side_by_side(plan, part, device)));
    // Diagonals that follow each other, or all work by as much as runs at once; and the host.
    const double us =
        plan.estimated_us * std::max(double(layers + chunks - 1), layers * chunks / rows);
    const double total = std::max(us, kHost * layers * chunks);
    if (total >= best_us) continue;
    best_us = total;
    best = chunks;
  }
  return best;
}

}  // namespace lstm_cuda
