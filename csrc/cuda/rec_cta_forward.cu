// rec_cta forward, of torch.nn.LSTM's cell.
#include "rec_cta_team.cuh"

namespace lstm_cuda {

Status rec_cta_forward(const RecurrenceForward& p, const CudaPlan& plan, Stream stream) {
  return rec_cta::forward<CellKind::plain>("rec_cta_forward", p, plan, stream);
}

}  // namespace lstm_cuda
