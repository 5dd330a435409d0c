// rec_cta forward, of other cells than torch.nn.LSTM's.
#include "rec_cta_team.cuh"

namespace lstm_cuda {

Status variant_cta_forward(const RecurrenceForward& p, const CudaPlan& plan, Stream stream) {
  return p.variant->norm
             ? rec_cta::forward<CellKind::norm>("variant_cta_forward", p, plan, stream)
             : rec_cta::forward<CellKind::options>("variant_cta_forward", p, plan, stream);
}

}  // namespace lstm_cuda
