#include "plan.h"

namespace lstm_cuda {
namespace {

// A core's own cache, as most processors of the last years have it.
constexpr int64_t kCoreCache = 1 << 20;

int64_t element_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : (dtype == Dtype::bfloat16 ? 2 : 4);
}

// Who does what beside each other.
void share(CpuPlan& plan, const LayerShape& s, int threads, bool backward) {
  plan.workers = 1;
  plan.in_step = false;
  plan.parts = 1;
  // Waking a second thread costs some microseconds: not for less work than that.
  const double multiplications =
      4.0 * double(s.H) * double(s.I + s.P) * double(s.T) * double(s.B) * double(s.D);
  if (threads <= 1 || multiplications < 1e6) return;
  // Every part reads all of w_hh at every step. Sharing the step instead, each worker keeps its
  // slice, but all must meet at every step: worth it for weights that no core's cache holds, or
  // where rows are too few to share.
  const int64_t bytes = 4 * s.H * s.P * element_size(s.dtype);
  // In the backward pass, directions add into the same dx, so a part is run for all of them by one
  // worker.
  const int64_t tasks = backward ? 1 : s.D, wanted = (threads + tasks - 1) / tasks;
  plan.in_step = bytes > kCoreCache ? s.B < 256 * threads : (s.B < wanted && s.H >= 192);
  plan.parts = plan.in_step ? 1 : std::max<int64_t>(1, std::min(wanted, s.B));
  const int64_t in_step = std::clamp<int64_t>(s.H / 64, 1, threads);  // a slice worth a meeting
  plan.workers = int(plan.in_step ? in_step : std::min<int64_t>(threads, plan.parts * tasks));
}

}  // namespace

CpuPlan plan_cpu(const LayerShape& shape, int threads, bool backward, Others others) {
  CpuPlan plan{};
  LayerShape s = shape;
  s.T += others.before + others.after;
  share(plan, s, threads, backward);
  const int64_t rows = (s.B + plan.parts - 1) / plan.parts;
  const int64_t weight_bytes = 4 * s.H * (s.I + s.P) * element_size(s.dtype);

  // Packing costs about as much as six rows of products; one row alone reads long rows of w at full
  // speed anyway.
  const bool few = s.T * rows <= 6;
  const bool one_row = rows == 1 && (s.T <= 16 || (s.H >= 512 && s.dtype != Dtype::bfloat16));
  plan.recurrent = few || one_row ? Weights::unpacked : Weights::packed;

  // Within the step, x needs no pre-activations in memory, if there are rows enough to keep the
  // arithmetic busy and both matrices, packed, stay in a core's cache.
  plan.input_within_step = !few && rows >= 6 && weight_bytes <= kCoreCache * 5 / 8;
  // Pre-activations should stay in the cache until their step; wide layers gain more from reading
  // w_ih seldom. Gradients of a chunk should stay there until they are multiplied, and sums of wide
  // layers, which do not, should be touched seldom.
  plan.chunk_rows = backward     ? std::max<int64_t>({(64 << 10) / s.H, 256, s.H})
                    : s.H >= 512 ? 512
                                 : std::clamp<int64_t>((16 << 10) / s.H, 64, 256);
  const bool one_chunk = shape.T <= plan.chunk_steps(rows);
  plan.input = few                                    ? Weights::unpacked
               : one_chunk && !plan.input_within_step ? Weights::packed_on_the_way
                                                      : Weights::packed;
  return plan;
}

}  // namespace lstm_cuda
