// rec_cta backward, of cells of other kinds than torch.nn.LSTM's.
#include "variant_cta_backward.cuh"

namespace lstm_cuda {

Status variant_cta_backward(const RecurrenceBackward& p, const CudaPlan& plan, Stream stream) {
  constexpr const char* kName = "variant_cta_backward";
  return kind_of(p.variant) == CellKind::norm
             ? rec_cta::start_backward<CellKind::norm>(kName, p, plan, stream)
             : rec_cta::start_backward<CellKind::options>(kName, p, plan, stream);
}

}  // namespace lstm_cuda
