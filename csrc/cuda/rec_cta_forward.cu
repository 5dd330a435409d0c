// rec_cta forward, of torch.nn.LSTM's cell.
#include "rec_cta_team.cuh"

namespace lstm_cuda {

Status rec_cta_forward(const RecurrenceForward& p, const CudaPlan& plan, Stream stream) {
  constexpr const char* kName = "rec_cta_forward";
  const auto start = [&]<Arithmetic arithmetic, int padded>(unsigned parts) {
    constexpr ResidentShape shape{padded, 1, padded / 8, 1, 0, 0};
    using F = resident::ForwardConfig<arithmetic, shape, 1, 1>;
    using Team = rec_cta::Team<F>;
    typename Team::Source source{};
    for (int64_t d = 0; d < p.shape.D; ++d) source.w_hh[d] = p.w_hh[d];
    return resident::start_forward<F, Team>(kName, p, source, 0, parts, stream);
  };
  return rec_cta::launch_planned(kName, p.shape, plan, start);
}

}  // namespace lstm_cuda
