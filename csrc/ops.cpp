// The torch side: the ops' schemas, and the call on the CPU (on CUDA: ops_cuda.cpp). Shapes are said
// in recurrence.h.
#include "ops.h"

#include "cpu/dispatch.h"
#include "plan.h"

namespace lstm_cuda {

const Parallel& torch_threads() {
  static thread_local Parallel parallel;
  parallel = {int(torch::stable::get_num_threads()),
              [](int64_t count, void (*task)(void*, int64_t), void* context) {
                torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
                  for (int64_t index = begin; index < end; ++index) task(context, index);
                });
              }};
  return parallel;
}

namespace {

template <class Problem>
void fill(const Inputs& in, Problem& p) {
  p.shape = in.shape;
  p.x = in.x.data_ptr();
  p.x_stride_t = in.x.stride(0);
  p.x_stride_b = in.x.stride(1);
  p.w_ih = in.w_ih.empty() ? nullptr : in.w_ih_pointers.data();
  p.w_hh = in.w_hh_pointers.data();
  p.w_hr = in.shape.projected ? in.w_hr_pointers.data() : nullptr;
  p.h0 = pointer(in.h0);
  p.c0 = pointer(in.c0);
  p.wide_c = in.c_type != in.type;
  p.lengths = pointer<const int64_t*>(in.lengths);
  p.reset = pointer<const uint8_t*>(in.reset);
}

void check_lengths(const Inputs& in) {
  for (int64_t b = 0; in.lengths && b < in.shape.B; ++b) {
    const int64_t length = pointer<const int64_t*>(in.lengths)[b];
    STD_TORCH_CHECK(length >= 0 && length <= in.shape.T, "lengths[", b, "] must be in 0..",
                    in.shape.T, "; got ", length);
  }
}

template <class Entry, class Problem>
void run(Entry entry, const Problem& p, bool backward, const Tensor& x) {
  const Parallel& parallel = torch_threads();
  const CpuPlan plan = plan_cpu(p.shape, parallel.threads, backward, p.others);
  const Tensor scratch = empty({entry(p, plan, parallel, nullptr)}, ScalarType::Byte, x);
  entry(p, plan, parallel, scratch.data_ptr());
}

// p holds what not every call has.
ForwardResult run_forward(LayerForward p, const Inputs& in, const OptionalTensors& bias_or_none,
                          bool save, bool cells) {
  check_lengths(in);
  const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
  const Tensor& x = in.x;
  const ScalarType compute = compute_type(in.type);
  const Tensors bias = bias_or_none.value_or(Tensors{});
  const Tensors b = checked("bias", bias, bias.empty() ? 0 : 2 * D, {4 * H}, in.type, x);
  const std::vector<const void*> b_pointers = pointers(b);
  const Tensor y = empty({T, B, D * P}, in.type, x), h_n = empty({D, B, P}, in.type, x),
               c_n = empty({D, B, H}, in.c_type, x);
  const Tensor gates = empty(save ? Sizes{T, B, D, 4 * H} : Sizes{0}, compute, x);
  const Tensor c = empty(save || cells ? Sizes{T, B, D, H} : Sizes{0}, compute, x);
  fill(in, p);
  p.b_ih = b.empty() ? nullptr : b_pointers.data();
  p.b_hh = b.empty() ? nullptr : b_pointers.data() + D;
  p.y = y.data_ptr();
  p.h_n = h_n.data_ptr();
  p.c_n = c_n.data_ptr();
  p.gates = save ? gates.data_ptr() : nullptr;
  p.c = save || cells ? c.data_ptr() : nullptr;
  run(cpu_kernels()[dtype].forward, p, false, x);
  return {y, h_n, c_n, gates, c};
}

ForwardResult layer_forward(const Tensor& x, const Tensors& w_ih, const Tensors& w_hh,
                            const OptionalTensors& bias, const OptionalTensors& w_hr,
                            const OptionalTensor& h0, const OptionalTensor& c0,
                            const OptionalTensor& lengths, const OptionalTensor& reset,
                            int64_t reversed, bool save, bool cells, bool /*allow_tf32*/,
                            const OptionalTensor& /*packed*/, int64_t /*packed_layout*/,
                            int64_t before, int64_t after) {
  STD_TORCH_CHECK(!w_ih.empty(), "w_ih must hold a [4H, I] tensor for each direction");
  const Inputs in(x, w_ih, w_hh, w_hr.value_or(Tensors{}), h0, c0, lengths, reset, reversed);
  LayerForward p{};
  p.others = {before, after};
  return run_forward(p, in, bias, save, cells);
}

VariantForwardResult variant_forward(
    const Tensor& x, const OptionalTensors& w_ih, const Tensors& w_hh, const OptionalTensors& bias,
    const OptionalTensors& w_hr, const OptionalTensor& h0, const OptionalTensor& c0,
    const OptionalTensor& lengths, const OptionalTensor& reset, int64_t reversed, bool save,
    bool cells, bool /*allow_tf32*/, int64_t forget, int64_t recurrent_activation,
    int64_t activation, int64_t output_activation, double cell_clip, double zoneout_h,
    double zoneout_c, const OptionalTensor& peephole, const OptionalTensor& norm,
    const OptionalTensor& h_scale, const OptionalTensor& seed, int64_t first_step) {
  const Inputs in(x, w_ih.value_or(Tensors{}), w_hh, w_hr.value_or(Tensors{}), h0, c0, lengths,
                  reset, reversed);
  const VariantInputs options(in, forget, recurrent_activation, activation, output_activation,
                              cell_clip, zoneout_h, zoneout_c, peephole, norm, h_scale, seed,
                              first_step);
  options.check_gates_x(in, bias);
  const std::tuple<Tensor, Tensor> statistics = options.statistics(in, save);
  const Variant variant = options.variant(statistics);
  LayerForward p{};
  p.variant = &variant;
  return std::tuple_cat(run_forward(p, in, bias, save, cells), statistics);
}

// Gradients in the compute type; p holds what not every call has.
BackwardResult run_backward(LayerBackward p, const Inputs& in, const Gradients& grads, bool need_dx,
                            bool need_dh0, bool need_dw) {
  const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
  const auto wanted = [&](bool want, const Sizes& sizes) {
    return empty(want ? sizes : Sizes{0}, compute_type(in.type), in.x);
  };
  const Tensor dx = wanted(need_dx, {T, B, inputs * I}), dh0 = wanted(need_dh0, {D, B, P}),
               dc0 = wanted(in.c0.has_value(), {D, B, H});
  const bool of_input = need_dw && !in.w_ih.empty();
  const Tensor dw_ih = wanted(of_input, {D, 4 * H, I}), dw_hh = wanted(need_dw, {D, 4 * H, P}),
               db = wanted(of_input, {D, 4 * H}), dw_hr = wanted(need_dw && projected, {D, P, H});
  fill(in, p);
  p.y = grads.y.data_ptr();
  p.gates = grads.gates.data_ptr();
  p.c = grads.c.data_ptr();
  p.dy = pointer(grads.dy);
  p.dh_n = pointer(grads.dh_n);
  p.dc_n = pointer(grads.dc_n);
  p.dc = pointer(grads.dc);
  p.dx = need_dx ? dx.data_ptr() : nullptr;
  p.dh0 = need_dh0 ? dh0.data_ptr() : nullptr;
  p.dc0 = in.c0 ? dc0.data_ptr() : nullptr;
  if (need_dw) {
    p.dw_ih = dw_ih.data_ptr();
    p.dw_hh = dw_hh.data_ptr();
    p.db = db.data_ptr();
    p.dw_hr = dw_hr.data_ptr();
  }
  run(cpu_kernels()[dtype].backward, p, true, in.x);
  return {dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr};
}

// From the compute type to the types of what was given.
void round(BackwardResult& result, const Inputs& in) {
  const ScalarType compute = compute_type(in.type);
  if (compute == in.type) return;
  auto& [dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr] = result;
  for (Tensor* t : {&dh0, &dw_ih, &dw_hh, &db, &dw_hr}) *t = torch::stable::to(*t, in.type);
  if (in.x.scalar_type() != compute) dx = torch::stable::to(dx, in.type);
  if (in.c_type != compute) dc0 = torch::stable::to(dc0, in.type);
}

BackwardResult layer_backward(const OptionalTensor& dy, const OptionalTensor& dh_n,
                              const OptionalTensor& dc_n, const OptionalTensor& dc, const Tensor& x,
                              const Tensors& w_ih, const Tensors& w_hh,
                              const OptionalTensors& w_hr_or_none, const OptionalTensor& h0,
                              const OptionalTensor& c0, const OptionalTensor& lengths,
                              const OptionalTensor& reset, int64_t reversed, const Tensor& y,
                              const Tensor& gates, const Tensor& c, bool need_dx, bool need_dw,
                              bool /*allow_tf32*/, const OptionalTensor& dgates_in) {
  const Inputs in(x, w_ih, w_hh, w_hr_or_none.value_or(Tensors{}), h0, c0, lengths, reset,
                  reversed);
  check_lengths(in);
  const ScalarType compute = compute_type(in.type);
  const Gradients grads(in, dy, dh_n, dc_n, dc, y, gates, c, compute);
  const OptionalTensor dgates = checked("dgates", dgates_in, sizes_of(grads.gates), compute, x);
  LayerBackward p{};
  p.dgates = pointer(dgates);
  BackwardResult result = run_backward(p, in, grads, need_dx, h0.has_value(), need_dw);
  round(result, in);
  return result;
}

VariantBackwardResult variant_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
    const OptionalTensor& dc, const Tensor& x, const OptionalTensors& w_ih, const Tensors& w_hh,
    const OptionalTensors& w_hr, const OptionalTensor& h0, const OptionalTensor& c0,
    const OptionalTensor& lengths, const OptionalTensor& reset, int64_t reversed, const Tensor& y,
    const Tensor& gates, const Tensor& c, bool need_dx, bool need_dw, bool /*allow_tf32*/,
    int64_t forget, int64_t recurrent_activation, int64_t activation, int64_t output_activation,
    double cell_clip, double zoneout_h, double zoneout_c, const OptionalTensor& peephole,
    const OptionalTensor& norm, const OptionalTensor& h_scale, const OptionalTensor& seed,
    int64_t first_step, const Tensor& normed, const Tensor& rstd) {
  const Inputs in(x, w_ih.value_or(Tensors{}), w_hh, w_hr.value_or(Tensors{}), h0, c0, lengths,
                  reset, reversed);
  check_lengths(in);
  const VariantInputs options(in, forget, recurrent_activation, activation, output_activation,
                              cell_clip, zoneout_h, zoneout_c, peephole, norm, h_scale, seed,
                              first_step);
  options.check_gates_x(in, {});
  const LayerShape& s = in.shape;
  const ScalarType compute = compute_type(in.type);
  const Gradients grads(in, dy, dh_n, dc_n, dc, y, gates, c, compute);
  const Tensor dmore = empty({s.D, need_dw ? options.sums() : 0, s.H}, compute, x);
  const std::tuple<Tensor, Tensor> statistics = options.checked_statistics(in, normed, rstd);
  Variant variant = options.variant(statistics);
  variant.dmore = dmore.data_ptr();
  LayerBackward p{};
  p.variant = &variant;
  BackwardResult result = run_backward(p, in, grads, need_dx, h0.has_value(), need_dw);
  round(result, in);
  return std::tuple_cat(result, options.split(dmore));
}

PieceResult piece_backward(const OptionalTensor& dy, const OptionalTensor& dh_n,
                           const OptionalTensor& dc_n, const OptionalTensor& dc, const Tensor& x,
                           const Tensors& w_ih, const Tensors& w_hh,
                           const OptionalTensors& w_hr_or_none, const Tensor& h0, const Tensor& c0,
                           const OptionalTensor& lengths, const OptionalTensor& reset,
                           int64_t reversed, const Tensor& y, const Tensor& gates, const Tensor& c,
                           bool need_dx, bool need_dw, int64_t before, int64_t after,
                           const OptionalTensor& carry, const Tensor& sums) {
  const Inputs in(x, w_ih, w_hh, w_hr_or_none.value_or(Tensors{}), h0, c0, lengths, reset,
                  reversed);
  check_lengths(in);
  const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
  const ScalarType compute = compute_type(in.type);
  const Gradients grads(in, dy, dh_n, dc_n, dc, y, gates, c, compute);
  const OptionalTensor carry_in = checked("carry", carry, {D, B, 4 * H}, compute, x);
  const Tensor carry_out = empty(before > 0 ? Sizes{D, B, 4 * H} : Sizes{0}, compute, x);
  LayerBackward p{};
  p.others = {before, after};
  p.carry_in = pointer(carry_in);
  p.carry_out = before > 0 ? carry_out.data_ptr() : nullptr;
  if (need_dw) {
    const int64_t parts = plan_cpu(in.shape, torch_threads().threads, true, p.others).parts,
                  weights = D * (4 * H * (I + P + 1) + (projected ? P * H : 0));
    p.sums = checked("sums", sums, {2 * parts * weights}, compute, x).data_ptr();
  }
  const bool first = before == 0;
  return std::tuple_cat(run_backward(p, in, grads, need_dx, first, need_dw && first),
                        std::tuple(carry_out));
}

}  // namespace
}  // namespace lstm_cuda

STABLE_TORCH_LIBRARY(lstm_cuda, m) {
  m.def(lstm_cuda::kForwardSchema);
  m.def(lstm_cuda::kBackwardSchema);
  m.def(lstm_cuda::kPieceBackwardSchema);
  m.def(lstm_cuda::kVariantForwardSchema);
  m.def(lstm_cuda::kVariantBackwardSchema);
  m.def(lstm_cuda::kChangesSchema);
  m.def(lstm_cuda::kCellGradientsSchema);
  m.def(lstm_cuda::kTangentsWithGradientsSchema);
  m.def(lstm_cuda::kProductSchema);
  m.def(lstm_cuda::kOuterProductsSchema);
  m.def(lstm_cuda::kPackSchema);
}

STABLE_TORCH_LIBRARY_IMPL(lstm_cuda, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&lstm_cuda::layer_forward));
  m.impl("layer_backward", TORCH_BOX(&lstm_cuda::layer_backward));
  m.impl("piece_backward", TORCH_BOX(&lstm_cuda::piece_backward));
  m.impl("variant_forward", TORCH_BOX(&lstm_cuda::variant_forward));
  m.impl("variant_backward", TORCH_BOX(&lstm_cuda::variant_backward));
}
