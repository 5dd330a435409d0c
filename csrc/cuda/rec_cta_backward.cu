// rec_cta backward, of torch.nn.LSTM's cell.
#include "rec_cta_backward.cuh"

namespace lstm_cuda {

Status rec_cta_backward(const RecurrenceBackward& p, const CudaPlan& plan, Stream stream) {
  return rec_cta::start_backward<CellKind::plain>("rec_cta_backward", p, plan, stream);
}

}  // namespace lstm_cuda
