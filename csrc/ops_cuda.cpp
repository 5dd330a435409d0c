// The torch side on CUDA: the large products are torch's, the recurrence between them is ours.
//
//   forward    gates_x = x w_ih^T + b_ih + b_hh          [T, B, D, 4H], then the recurrence in place
//   backward   the recurrence gives dgates [T, B, D, 4H], and with all steps and rows as one index
//              dx = dgates w_ih    dw_ih = dgates^T x    dw_hh = dgates^T h_prev    db = sum dgates
//              dw_hr = dh^T m
//
// A projection h = w_hr m is a part of rec_step's recurrence; for the other families it is folded into
// the weights (ops_projection.h).
//
// Everything is put on the current stream, or beside it where that joins it again; nothing waits for
// the device, so a call can be captured in a CUDA graph.
#include "ops_cuda_run.h"

namespace lstm_cuda {
namespace {

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
  p.wide_c = in.c_type != in.type;
  p.lengths = pointer<const int64_t*>(in.lengths);
  p.reset = pointer<const uint8_t*>(in.reset);
}

// p holds what not every call has.
ForwardResult run_forward(RecurrenceForward p, const Inputs& in,
                          const OptionalTensors& bias_or_none, bool save, bool cells,
                          bool allow_tf32, const OptionalTensor& packed, int64_t layout,
                          const OptionalTensor& h_operand) {
  const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
  const Tensor& x = in.x;
  const Tensors bias = bias_or_none.value_or(Tensors{});
  const ScalarType compute = compute_type(in.type);
  const Tensors b = checked("bias", bias, bias.empty() ? 0 : 2 * D, {4 * H}, in.type, x);
  const Context context(x);
  const Tensor y = empty({T, B, D * P}, in.type, x);
  const Tensor c = empty(save || cells ? Sizes{T, B, D, H} : Sizes{0}, compute, x);
  if (T == 0 || B == 0) {
    const Tensor gates = empty(save ? Sizes{T, B, D, 4 * H} : Sizes{0}, in.type, x);
    return {y, state_or_zeros(in.h0, {D, B, P}, in.type, x),
            state_or_zeros(in.c0, {D, B, H}, in.c_type, x), gates, c};
  }

  OptionalTensor biases;
  if (!b.empty()) {
    const std::vector<const void*> b_pointers = pointers(b);
    biases = empty({D * 4 * H}, in.type, x);
    check(add_biases(in.shape, b_pointers.data(), b_pointers.data() + D, biases->data_ptr(),
                     context.stream));
  }
  const Tensor h_n = empty({D, B, P}, in.type, x), c_n = empty({D, B, H}, in.c_type, x);

  ForwardCall forward{in,     Products(in.w_hh[0], allow_tf32, context.stream),
                      biases, packed,
                      layout, h_operand ? h_operand : in.h0,
                      y,      h_n,
                      p};
  if (p.gates_x && save) {
    forward.gates = empty({T, B, D, 4 * H}, in.type, x);
    forward.p.gates = forward.gates.data_ptr();
  }
  fill(forward.p, in);
  forward.p.h0 = pointer(in.h0);
  forward.p.h_operand = pointer(h_operand);
  forward.p.save = save;
  forward.p.y = y.data_ptr();
  forward.p.h_n = h_n.data_ptr();
  forward.p.c_n = c_n.data_ptr();
  forward.p.c = save || cells ? c.data_ptr() : nullptr;
  run(forward, allow_tf32, context);
  return {forward.y, h_n, c_n, save ? forward.gates : empty({0}, in.type, x), c};
}

ForwardResult layer_forward(const Tensor& x, const Tensors& w_ih, const Tensors& w_hh,
                            const OptionalTensors& bias, const OptionalTensors& w_hr,
                            const OptionalTensor& h0, const OptionalTensor& c0,
                            const OptionalTensor& lengths, const OptionalTensor& reset,
                            int64_t reversed, bool save, bool cells, bool allow_tf32,
                            const OptionalTensor& packed, int64_t layout, int64_t /*before*/,
                            int64_t /*after*/) {
  const Inputs in(x, w_ih, w_hh, w_hr.value_or(Tensors{}), h0, c0, lengths, reset, reversed);
  return run_forward({}, in, bias, save, cells, allow_tf32, packed, layout, {});
}

// t [.., D, B, P] times h_scale, as products read it.
Tensor scaled_h(const Tensor& t, const Tensor& h_scale) {
  return torch::stable::to(call("aten::mul", "Tensor", t, h_scale), t.scalar_type());
}

VariantForwardResult variant_forward(
    const Tensor& x_in, const OptionalTensors& w_ih, const Tensors& w_hh,
    const OptionalTensors& bias, const OptionalTensors& w_hr, const OptionalTensor& h0,
    const OptionalTensor& c0, const OptionalTensor& lengths, const OptionalTensor& reset,
    int64_t reversed, bool save, bool cells, bool allow_tf32, int64_t forget,
    int64_t recurrent_activation, int64_t activation, int64_t output_activation, double cell_clip,
    double zoneout_h, double zoneout_c, const OptionalTensor& peephole, const OptionalTensor& norm,
    const OptionalTensor& h_scale, const OptionalTensor& seed, int64_t first_step) {
  const Tensor x = w_ih ? x_in : torch::stable::contiguous(x_in);
  const Inputs in(x, w_ih.value_or(Tensors{}), w_hh, w_hr.value_or(Tensors{}), h0, c0, lengths,
                  reset, reversed);
  const VariantInputs options(in, forget, recurrent_activation, activation, output_activation,
                              cell_clip, zoneout_h, zoneout_c, peephole, norm, h_scale, seed,
                              first_step);
  options.check_gates_x(in, bias);
  const std::tuple<Tensor, Tensor> statistics = options.statistics(in, save);
  const Variant variant = options.variant(statistics);
  const OptionalTensor h_operand =
      in.h0 && options.h_scale ? OptionalTensor(scaled_h(*in.h0, *options.h_scale)) : std::nullopt;
  RecurrenceForward p{};
  p.variant = &variant;
  p.gates_x = w_ih ? nullptr : in.x.data_ptr();
  return std::tuple_cat(run_forward(p, in, bias, save, cells, allow_tf32, {}, 0, h_operand),
                        statistics);
}

// What only some calls want of backward.
struct Wanted {
  bool dx, dw;
  OptionalTensor h_scale;  // of h where w_hh multiplies it
};

// p holds what not every call has: with dgates_x there are no weights of inputs here.
BackwardResult run_backward(RecurrenceBackward p, const Inputs& in, const Gradients& grads,
                            const Wanted& need, bool allow_tf32) {
  const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
  const Tensor& x = in.x;
  const bool of_input = need.dw && !in.w_ih.empty();
  const bool of_gates_x = need.dx && in.w_ih.empty();
  const Context context(x);
  // Apart each time: results of an op are not the same tensor.
  const auto nothing = [&] { return empty({0}, in.type, x); };
  if (T == 0 || B == 0) {
    const auto zeros_if = [&](bool wanted, const Sizes& sizes, ScalarType type) {
      return wanted ? state_or_zeros({}, sizes, type, x) : nothing();
    };
    return {zeros_if(need.dx, {T, B, inputs * I}, x.scalar_type()),
            in.h0 ? state_or_zeros(grads.dh_n, {D, B, P}, in.type, x) : nothing(),
            in.c0 ? state_or_zeros(grads.dc_n, {D, B, H}, in.c_type, x) : nothing(),
            zeros_if(of_input, {D, 4 * H, I}, in.type),
            zeros_if(need.dw, {D, 4 * H, P}, in.type),
            zeros_if(of_input, {D, 4 * H}, in.type),
            zeros_if(need.dw && projected, {D, P, H}, in.type)};
  }

  const int64_t rows = T * B;
  const Tensor dgates = empty({rows, D, 4 * H}, in.type, x);
  const Tensor dh = projected ? empty({rows, D, P}, in.type, x) : nothing();
  const Tensor dc0 = in.c0 ? empty({D, B, H}, in.c_type, x) : nothing();
  const Tensor dgates_x = of_gates_x ? empty({T, B, D * 4 * H}, x.scalar_type(), x) : nothing();
  const Tensor m = need.dw && projected ? empty({rows, D * H}, in.type, x) : nothing();
  const Products products(in.w_hh[0], allow_tf32, context.stream);
  BackwardCall backward{in,         products, grads.dy,
                        grads.dh_n, dgates,   in.h0 ? empty({D, B, P}, in.type, x) : nothing(),
                        need.dw,    p};
  fill(backward.p, in);
  backward.p.gates = grads.gates.data_ptr();
  backward.p.c = grads.c.data_ptr();
  backward.p.dy = pointer(grads.dy);
  backward.p.dh_n = pointer(grads.dh_n);
  backward.p.dc_n = pointer(grads.dc_n);
  backward.p.dc = pointer(grads.dc);
  backward.p.dgates = dgates.data_ptr();
  backward.p.dh = projected ? dh.data_ptr() : nullptr;
  backward.p.dh0 = in.h0 ? backward.dh0.data_ptr() : nullptr;
  backward.p.dc0 = in.c0 ? dc0.data_ptr() : nullptr;
  backward.p.dgates_x = of_gates_x ? dgates_x.data_ptr() : nullptr;
  backward.p.m = p.variant && need.dw && projected ? m.data_ptr() : nullptr;
  run(backward, allow_tf32, context);

  const Tensor flat = shaped(dgates, {rows, D * 4 * H});
  Tensor dx = dgates_x, dw_ih = nothing(), dw_hh = nothing(), db = nothing(), dw_hr = nothing();
  if (need.dx && !of_gates_x)
    dx = shaped(products.multiply_each(flat, cat(in.w_ih), inputs), {T, B, inputs * I});
  if (need.dw) {
    Tensor h_prev = empty({rows, D * P}, in.type, x);
    check(copy_previous_h(in.shape, grads.y.data_ptr(), pointer(in.h0), backward.p.lengths,
                          backward.p.reset, h_prev.data_ptr(), context.stream));
    if (need.h_scale)
      h_prev = shaped(scaled_h(shaped(h_prev, {T, B, D, P}), transpose(*need.h_scale, 0, 1)),
                      {rows, D * P});
    std::vector<Products::OverRows> wanted{{flat, h_prev, D}};
    if (projected) {
      if (!p.variant)
        check(cell_outputs(in.shape, backward.p.gates, backward.p.c, backward.p.lengths,
                           m.data_ptr(), context.stream));
      wanted.push_back({shaped(dh, {rows, D * P}), m, D});
    }
    if (of_input) {
      // What stands in x past a row's length must not meet the zeros of dgates: it may be NaN.
      Tensor x_rows = x;
      if (in.lengths) {
        x_rows = empty({rows, inputs * I}, in.type, x);
        check(copy_input(in.shape, x.data_ptr(), x.stride(0), x.stride(1), backward.p.lengths,
                         x_rows.data_ptr(), context.stream));
      }
      db = shaped(sum(flat, 0), {D, 4 * H});
      wanted.push_back({flat, x_rows, inputs});
    }
    const Tensors dw = products.over_rows(wanted);
    dw_hh = dw[0];
    if (projected) dw_hr = dw[1];
    if (of_input) dw_ih = shaped(dw.back(), {D, 4 * H, I});
  }
  return {dx, backward.dh0, dc0, dw_ih, dw_hh, db, dw_hr};
}

BackwardResult layer_backward(const OptionalTensor& dy, const OptionalTensor& dh_n,
                              const OptionalTensor& dc_n, const OptionalTensor& dc, const Tensor& x,
                              const Tensors& w_ih, const Tensors& w_hh, const OptionalTensors& w_hr,
                              const OptionalTensor& h0, const OptionalTensor& c0,
                              const OptionalTensor& lengths, const OptionalTensor& reset,
                              int64_t reversed, const Tensor& y, const Tensor& gates,
                              const Tensor& c, bool need_dx, bool need_dw, bool allow_tf32,
                              const OptionalTensor& of_gates) {
  STD_TORCH_CHECK(!of_gates, "dgates must be None on CUDA: no kernel reads it");
  const Inputs in(x, w_ih, w_hh, w_hr.value_or(Tensors{}), h0, c0, lengths, reset, reversed);
  const Gradients grads(in, dy, dh_n, dc_n, dc, y, gates, c, in.type);
  return run_backward({}, in, grads, {need_dx, need_dw, {}}, allow_tf32);
}

VariantBackwardResult variant_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
    const OptionalTensor& dc, const Tensor& x, const OptionalTensors& w_ih, const Tensors& w_hh,
    const OptionalTensors& w_hr, const OptionalTensor& h0, const OptionalTensor& c0,
    const OptionalTensor& lengths, const OptionalTensor& reset, int64_t reversed, const Tensor& y,
    const Tensor& gates, const Tensor& c, bool need_dx, bool need_dw, bool allow_tf32,
    int64_t forget, int64_t recurrent_activation, int64_t activation, int64_t output_activation,
    double cell_clip, double zoneout_h, double zoneout_c, const OptionalTensor& peephole,
    const OptionalTensor& norm, const OptionalTensor& h_scale, const OptionalTensor& seed,
    int64_t first_step, const Tensor& normed, const Tensor& rstd) {
  const Inputs in(x, w_ih.value_or(Tensors{}), w_hh, w_hr.value_or(Tensors{}), h0, c0, lengths,
                  reset, reversed);
  const VariantInputs options(in, forget, recurrent_activation, activation, output_activation,
                              cell_clip, zoneout_h, zoneout_c, peephole, norm, h_scale, seed,
                              first_step);
  options.check_gates_x(in, {});
  const Gradients grads(in, dy, dh_n, dc_n, dc, y, gates, c, in.type);
  const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
  const ScalarType compute = compute_type(in.type);
  const std::tuple<Tensor, Tensor> statistics = options.checked_statistics(in, normed, rstd);
  Variant variant = options.variant(statistics);
  const Tensor sums = state_or_zeros({}, {D, B, need_dw ? options.sums() : 0, H}, compute, x);
  variant.dmore = need_dw && options.sums() > 0 ? sums.data_ptr() : nullptr;
  RecurrenceBackward p{};
  p.variant = &variant;
  const BackwardResult result =
      run_backward(p, in, grads, {need_dx, need_dw, options.h_scale}, allow_tf32);
  return std::tuple_cat(result, options.split(sum(sums, 1)));
}

ScalarType type_of(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::float16    ? ScalarType::Half
         : arithmetic == Arithmetic::bfloat16 ? ScalarType::BFloat16
                                              : ScalarType::Float;
}

Tensor pack_weights_ahead(const Tensors& w_hh, const Tensors& w_hr, int64_t layout) {
  STD_TORCH_CHECK(!w_hh.empty() && w_hh.size() <= size_t(kMaxRecurrences),
                  "lstm_cuda: w_hh must have 1 to 64 tensors; got ", w_hh.size());
  CudaPlan plan;
  STD_TORCH_CHECK(plan_of_layout(layout, plan), "lstm_cuda: no packed weights have layout ",
                  layout);
  const Tensor& first = w_hh[0];
  STD_TORCH_CHECK(first.dim() == 2, "lstm_cuda: w_hh must be [4H, P]; got ", first.dim(), "-D");
  const int64_t P = first.size(1), H = w_hr.empty() ? P : first.size(0) / 4;
  const ScalarType type = type_of(plan.arithmetic);
  LayerShape shape{};
  shape.D = int64_t(w_hh.size());
  shape.H = shape.P = H;
  Tensors weights = checked("w_hh", w_hh, w_hh.size(), {4 * H, P}, type, first);
  const Tensors projections =
      checked("w_hr", w_hr, w_hr.empty() ? 0 : w_hh.size(), {P, H}, type, first);
  STD_TORCH_CHECK(shape.H <= plan.resident.hidden, "lstm_cuda: layout ", layout,
                  " is for hidden sizes up to ", plan.resident.hidden, "; got ", shape.H);
  const Context context(first);
  if (!projections.empty())
    weights = fold_projection(Products(first, plan.arithmetic == Arithmetic::tf32, context.stream),
                              weights, projections);
  const Tensor packed = empty({packed_bytes(shape, plan, false)}, ScalarType::Byte, first);
  check(pack_weights(shape, plan, false, pointers(weights).data(), packed.data_ptr(), nullptr, 0,
                     context.stream));
  return packed;
}

}  // namespace
}  // namespace lstm_cuda

#if defined(LSTM_EMULATE)
STABLE_TORCH_LIBRARY(lstm_cuda_emulated, m) {
  m.def(lstm_cuda::kForwardSchema);
  m.def(lstm_cuda::kBackwardSchema);
  m.def(lstm_cuda::kVariantForwardSchema);
  m.def(lstm_cuda::kVariantBackwardSchema);
  m.def(lstm_cuda::kPackSchema);
}
STABLE_TORCH_LIBRARY_IMPL(lstm_cuda_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(lstm_cuda, CUDA, m) {
#endif
  m.impl("layer_forward", TORCH_BOX(&lstm_cuda::layer_forward));
  m.impl("layer_backward", TORCH_BOX(&lstm_cuda::layer_backward));
  m.impl("variant_forward", TORCH_BOX(&lstm_cuda::variant_forward));
  m.impl("variant_backward", TORCH_BOX(&lstm_cuda::variant_backward));
  m.impl("pack_weights", TORCH_BOX(&lstm_cuda::pack_weights_ahead));
}
