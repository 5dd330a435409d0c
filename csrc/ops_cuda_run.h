// Runs a call of the layer op (ops_cuda_call.h) on CUDA: with the family that the plan gives, or the next
// one where a launch is refused.
#pragma once

#include "cuda/device.h"
#include "cuda/dispatch.h"
#include "ops_cuda_call.h"

#if !defined(LSTM_EMULATE)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace lstm_cuda {

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

template <class Call>
Status start(Call& call, const CudaPlan& plan, const Context& context) {
  const LayerShape& shape = call.p.shape;
  const Stream stream = context.stream;
  if (!keeps_weights(plan.family)) {
    call.multiply_input();
    const bool step = plan.family == Family::rec_step;
    const Scratch scratch(
        call.in, step ? rec_step_scratch(shape, plan, call.p.variant, Call::kBackward) : 0);
    return call.start(plan, scratch, stream);
  }
  const int64_t packed = packed_bytes(shape, plan, Call::kBackward);
  const int64_t words =
      plan.family == Family::rec_group ? rec_group_words(shape, plan, Call::kBackward) : 0;
  const void* const before = call.packed_before(plan, packed);
  Scratch scratch(call.in, (before ? 0 : packed) + words);
  scratch.weights = packed_weights(shape, plan, Call::kBackward, before ? before : scratch.data());
  if (words > 0) scratch.words = scratch.data() + (before ? 0 : packed);
  const bool waits = call.has_input_to_multiply();  // under which packing can hide
  Fork fork(context.index, stream, plan.pack_beside && waits && !before);
  Status status{};
  if (!before)
    status = pack_weights(shape, plan, Call::kBackward, call.p.w_hh, scratch.data(), scratch.words,
                          words, fork.stream());
  else if (words > 0)
    torch::stable::zero_(scratch.memory);
  if (!status.ok()) return status;
  call.multiply_input();
  status = fork.join();
  return status.ok() ? call.start_resident(plan, scratch, stream) : status;
}

// The same of a layer whose projection is folded into the weights.
template <class Call>
Status start_folded(Call& call, const CudaPlan& plan, const Context& context) {
  call.multiply_input();
  Call over_m = call;
  over_m.p.shape = unprojected(call.in.shape);
  over_m.p.w_hr = nullptr;
  Tensors weights;
  if (!keeps_weights(plan.family) ||
      !call.packed_before(plan, packed_bytes(over_m.p.shape, plan, Call::kBackward)))
    weights = fold_projection(call.products, call.in.w_hh, call.in.w_hr);
  const std::vector<const void*> w_hh = pointers(weights);
  over_m.p.w_hh = w_hh.data();
  Status status = call.before_folded(over_m, context.stream);
  if (status.ok()) status = start(over_m, plan, context);
  return status.ok() ? call.after_folded(over_m, context.stream) : status;
}

// Runs the recurrence with the family that the plan gives; one that cannot be launched here makes
// way for the next, now and from now on.
template <class Call>
void run(Call& call, bool allow_tf32, const Context& context) {
  const LayerShape& shape = call.in.shape;
  CudaDevice device;
  check(cuda_device(context.index, device));
  for (int refused_now = 0;;) {
    CudaRequest request = cuda_request(context.index, allow_tf32, Call::kBackward);
    request.cell = kind_of(call.p.variant);
    request.large_h = call.p.variant && has_large_h(*call.p.variant);
    // Nobody has shown that cooperative launches can be captured.
    const bool recorded = capturing(context.stream);
    if (recorded) request.refused |= 1 << int(Family::rec_group);
    request.refused |= refused_now;
    const CudaPlan plan = plan_cuda(shape, request, device);
    STD_TORCH_CHECK(plan.possible, "lstm_cuda: ", name_of(plan.family),
                    " cannot run a layer of H=", shape.H, ", P=", shape.P,
                    recorded ? " here, for a CUDA graph: " : " here: ", plan.reason);
    const Status status =
        plan.folds_projection ? start_folded(call, plan, context) : start(call, plan, context);
    if (status.ok()) return;
    if (request.forced >= 0 || plan.family == Family::rec_step) check(status);
    remember_refusal(context.index, plan.family);
    refused_now |= 1 << int(plan.family);
    if (keeps_weights(plan.family) || plan.folds_projection) call.undo_resident();
  }
}

}  // namespace lstm_cuda
