// The torch side on CUDA: the large products are torch's, the recurrence between them is ours.
//
//   forward    gates_x = x w_ih^T + b_ih + b_hh          [T, B, D, 4H], then the recurrence in place
//   backward   the recurrence gives dgates [T, B, D, 4H], and with all steps and rows as one index
//              dx = dgates w_ih    dw_ih = dgates^T x    dw_hh = dgates^T h_prev    db = sum dgates
//              dw_hr = dh^T m
//
// Everything is put on the current stream; nothing waits for the device, so a call can be captured
// in a CUDA graph.
#include "ops.h"

#include <array>

#include "cuda/device.h"
#include "cuda/dispatch.h"
#include "cuda/families.h"
#include "cuda/operands.h"
#include "cuda/plan.h"

#if !defined(LSTM_EMULATE)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace lstm_cuda {
namespace {

// torch's op with the arguments of its schema; the result is its only output.
template <class... Arguments>
Tensor call(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor cat(const Tensors& list) {
  return list.size() == 1 ? list[0] : call("aten::cat", "", list, int64_t(0));
}
Tensor shaped(const Tensor& t, const Sizes& sizes) { return torch::stable::view(t, sizes); }
Tensor mm(const Tensor& a, const Tensor& b) { return call("aten::mm", "", a, b); }

// Product of each recurrence's own matrices: sum over n of a[n, d, :]^T b[n, d, :].
Tensor products_by_recurrence(const Tensor& a, const Tensor& b) {
  return call("aten::bmm", "", transpose(transpose(a, 0, 1), 1, 2), transpose(b, 0, 1));
}

void check(const Status& status) { STD_TORCH_CHECK(status.ok(), "lstm_cuda: ", status.message); }

#if defined(LSTM_EMULATE)
struct Context {
  int index = emulation::settings().device;
  Stream stream{};
  explicit Context(const Tensor&) {}
};
#else
// x's device made current, and torch's current stream there.
struct Context {
  int index;
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;

  explicit Context(const Tensor& x) : index(x.get_device_index()), guard(x.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<Stream>(current);
  }
};
#endif

Status start(const RecurrenceForward& p, const CudaPlan& plan, void* scratch, Stream stream) {
  return plan.family == Family::rec_cta ? rec_cta_forward(p, plan, stream)
                                        : rec_step_forward(p, plan, scratch, stream);
}
Status start(const RecurrenceBackward& p, const CudaPlan& plan, void* scratch, Stream stream) {
  return plan.family == Family::rec_cta ? rec_cta_backward(p, plan, stream)
                                        : rec_step_backward(p, plan, scratch, stream);
}

// Runs the recurrence with the family that the plan gives; one that cannot be launched here makes
// way for the next, now and from now on.
template <class Problem>
void run(const Problem& p, bool allow_tf32, bool backward, const Tensor& x,
         const Context& context) {
  CudaDevice device;
  check(cuda_device(context.index, device));
  for (;;) {
    const CudaRequest request = cuda_request(context.index, allow_tf32, backward);
    const CudaPlan plan = plan_cuda(p.shape, request, device);
    STD_TORCH_CHECK(plan.possible, "lstm_cuda: ", name_of(plan.family),
                    " cannot run a layer of H=", p.shape.H, ", P=", p.shape.P,
                    " here: ", plan.reason);
    const int64_t bytes =
        plan.family == Family::rec_step ? rec_step_scratch(p.shape, plan, backward) : 0;
    const Tensor scratch = empty({bytes}, ScalarType::Byte, x);
    const Status status = start(p, plan, scratch.data_ptr(), context.stream);
    if (status.ok()) return;
    if (request.forced >= 0 || plan.family == Family::rec_step) check(status);
    remember_refusal(context.index, plan.family);
  }
}

// To the given state, or to zeros: what a layer without steps gives.
Tensor state_or_zeros(const OptionalTensor& state, const Sizes& sizes, ScalarType type,
                      const Tensor& x) {
  Tensor result = empty(sizes, type, x);
  return state ? torch::stable::copy_(result, *state) : torch::stable::zero_(result);
}

template <class Problem>
void fill(Problem& p, const Inputs& in) {
  p.shape = in.shape;
  p.w_hh = in.w_hh_pointers.data();
  p.w_hr = in.shape.projected ? in.w_hr_pointers.data() : nullptr;
  p.c0 = pointer(in.c0);
  p.lengths = pointer<const int64_t*>(in.lengths);
  p.reset = pointer<const uint8_t*>(in.reset);
}

ForwardResult layer_forward(const Tensor& x, const Tensors& w_ih, const Tensors& w_hh,
                            const Tensors& bias, const Tensors& w_hr, const OptionalTensor& h0,
                            const OptionalTensor& c0, const OptionalTensor& lengths,
                            const OptionalTensor& reset, int64_t reversed, bool save, bool cells,
                            bool allow_tf32) {
  const Inputs in(x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, reversed);
  const auto& [dtype, T, B, D, I, H, P, bits, projected] = in.shape;
  const ScalarType compute = compute_type(in.type);
  const Tensors b = checked("bias", bias, bias.empty() ? 0 : 2 * D, {4 * H}, in.type, x);
  const Context context(x);
  const Tensor y = empty({T, B, D * P}, in.type, x);
  const Tensor c = empty(save || cells ? Sizes{T, B, D, H} : Sizes{0}, compute, x);
  if (T == 0 || B == 0) {
    const Tensor gates = empty(save ? Sizes{T, B, D, 4 * H} : Sizes{0}, in.type, x);
    return {y, state_or_zeros(in.h0, {D, B, P}, in.type, x),
            state_or_zeros(in.c0, {D, B, H}, in.type, x), gates, c};
  }

  OptionalTensor biases;
  if (!b.empty()) {
    const std::vector<const void*> b_pointers = pointers(b);
    biases = empty({D * 4 * H}, in.type, x);
    check(add_biases(in.shape, b_pointers.data(), b_pointers.data() + D, biases->data_ptr(),
                     context.stream));
  }
  const Tensor rows = torch::stable::reshape(in.x, Sizes{T * B, I});
  const Tensor gates =
      shaped(call("aten::linear", "", rows, cat(in.w_ih), biases), {T, B, D, 4 * H});
  const Tensor h_n = empty({D, B, P}, in.type, x), c_n = empty({D, B, H}, in.type, x);

  RecurrenceForward p{};
  fill(p, in);
  p.h0 = pointer(in.h0);
  p.gates = gates.data_ptr();
  p.save = save;
  p.y = y.data_ptr();
  p.h_n = h_n.data_ptr();
  p.c_n = c_n.data_ptr();
  p.c = save || cells ? c.data_ptr() : nullptr;
  run(p, allow_tf32, false, x, context);
  return {y, h_n, c_n, save ? gates : empty({0}, in.type, x), c};
}

BackwardResult layer_backward(const OptionalTensor& dy, const OptionalTensor& dh_n,
                              const OptionalTensor& dc_n, const OptionalTensor& dc, const Tensor& x,
                              const Tensors& w_ih, const Tensors& w_hh, const Tensors& w_hr,
                              const OptionalTensor& h0, const OptionalTensor& c0,
                              const OptionalTensor& lengths, const OptionalTensor& reset,
                              int64_t reversed, const Tensor& y, const Tensor& gates,
                              const Tensor& c, bool need_dx, bool need_dw, bool allow_tf32) {
  const Inputs in(x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, reversed);
  const auto& [dtype, T, B, D, I, H, P, bits, projected] = in.shape;
  const Gradients grads(in, dy, dh_n, dc_n, dc, y, gates, c, in.type);
  const Context context(x);
  const Tensor nothing = empty({0}, in.type, x);
  if (T == 0 || B == 0) {
    const auto zeros_if = [&](bool wanted, const Sizes& sizes) {
      return wanted ? state_or_zeros({}, sizes, in.type, x) : nothing;
    };
    return {zeros_if(need_dx, {T, B, I}),
            h0 ? state_or_zeros(grads.dh_n, {D, B, P}, in.type, x) : nothing,
            c0 ? state_or_zeros(grads.dc_n, {D, B, H}, in.type, x) : nothing,
            zeros_if(need_dw, {D, 4 * H, I}),
            zeros_if(need_dw, {D, 4 * H, P}),
            zeros_if(need_dw, {D, 4 * H}),
            zeros_if(need_dw && projected, {D, P, H})};
  }

  const int64_t rows = T * B;
  const Tensor dgates = empty({rows, D, 4 * H}, in.type, x);
  const Tensor dh = projected ? empty({rows, D, P}, in.type, x) : nothing;
  const Tensor dh0 = h0 ? empty({D, B, P}, in.type, x) : nothing;
  const Tensor dc0 = c0 ? empty({D, B, H}, in.type, x) : nothing;
  RecurrenceBackward p{};
  fill(p, in);
  p.gates = grads.gates.data_ptr();
  p.c = grads.c.data_ptr();
  p.dy = pointer(grads.dy);
  p.dh_n = pointer(grads.dh_n);
  p.dc_n = pointer(grads.dc_n);
  p.dc = pointer(grads.dc);
  p.dgates = dgates.data_ptr();
  p.dh = projected ? dh.data_ptr() : nullptr;
  p.dh0 = h0 ? dh0.data_ptr() : nullptr;
  p.dc0 = c0 ? dc0.data_ptr() : nullptr;
  run(p, allow_tf32, true, x, context);

  const Tensor flat = shaped(dgates, {rows, D * 4 * H});
  Tensor dx = nothing, dw_ih = nothing, dw_hh = nothing, db = nothing, dw_hr = nothing;
  if (need_dx) dx = shaped(mm(flat, cat(in.w_ih)), {T, B, I});
  if (need_dw) {
    // What stands in x past a row's length must not meet the zeros of dgates: it may be NaN.
    Tensor x_rows = in.x;
    if (lengths) {
      x_rows = empty({rows, I}, in.type, x);
      check(copy_input(in.shape, in.x.data_ptr(), in.x.stride(0), in.x.stride(1), p.lengths,
                       x_rows.data_ptr(), context.stream));
    } else {
      x_rows = torch::stable::reshape(in.x, Sizes{rows, I});
    }
    dw_ih = shaped(mm(transpose(flat, 0, 1), x_rows), {D, 4 * H, I});
    db = shaped(call("aten::sum", "dim_IntList", flat, std::optional<Sizes>(Sizes{0}), false,
                     std::optional<ScalarType>()),
                {D, 4 * H});
    const Tensor h_prev = empty({rows, D, P}, in.type, x);
    check(copy_previous_h(in.shape, grads.y.data_ptr(), pointer(in.h0), p.lengths, p.reset,
                          h_prev.data_ptr(), context.stream));
    dw_hh = products_by_recurrence(dgates, h_prev);
    if (projected) {
      const Tensor m = empty({rows, D, H}, in.type, x);
      check(cell_outputs(in.shape, p.gates, p.c, p.lengths, m.data_ptr(), context.stream));
      dw_hr = products_by_recurrence(dh, m);
    }
  }
  return {dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr};
}

}  // namespace
}  // namespace lstm_cuda

#if defined(LSTM_EMULATE)
STABLE_TORCH_LIBRARY(lstm_cuda_emulated, m) {
  m.def(lstm_cuda::kForwardSchema);
  m.def(lstm_cuda::kBackwardSchema);
}
STABLE_TORCH_LIBRARY_IMPL(lstm_cuda_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(lstm_cuda, CUDA, m) {
#endif
  m.impl("layer_forward", TORCH_BOX(&lstm_cuda::layer_forward));
  m.impl("layer_backward", TORCH_BOX(&lstm_cuda::layer_backward));
}
