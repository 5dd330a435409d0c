// The torch side: schemas, checks, allocation, and the call. The only file that knows torch,
// through its stable ABI, so that one binary loads on torch 2.11 and newer. Shapes are said in
// recurrence.h; messages for users are made in Python, those here keep a direct caller of the ops
// from reading memory that is not there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "plan.h"
#include "recurrence.h"

namespace lstm_cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

std::string text(const Sizes& sizes) {
  std::string s = "[";
  for (size_t k = 0; k < sizes.size(); ++k) s += (k ? ", " : "") + std::to_string(sizes[k]);
  return s + "]";
}

Sizes sizes_of(const Tensor& t) {
  Sizes sizes(t.dim());
  for (int64_t k = 0; k < t.dim(); ++k) sizes[k] = t.size(k);
  return sizes;
}

Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, "x must be float64, float32, float16 or bfloat16");
  }
  return Dtype::float32;
}

ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? type : ScalarType::Float;
}

// The tensor, contiguous, after a check of its shape and type.
Tensor checked(const char* name, const Tensor& t, const Sizes& sizes, ScalarType type) {
  STD_TORCH_CHECK(sizes_of(t) == sizes, name, " must be ", text(sizes), "; got ",
                  text(sizes_of(t)));
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has another dtype than is needed here");
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU as x is");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

OptionalTensor checked(const char* name, const OptionalTensor& t, const Sizes& sizes,
                       ScalarType type) {
  return t ? OptionalTensor(checked(name, *t, sizes, type)) : std::nullopt;
}

Tensors checked(const char* name, const Tensors& list, size_t count, const Sizes& sizes,
                ScalarType type) {
  STD_TORCH_CHECK(list.size() == count, name, " must hold ", count, " tensors; got ", list.size());
  Tensors result;
  result.reserve(count);
  for (const Tensor& t : list) result.push_back(checked(name, t, sizes, type));
  return result;
}

template <class Pointer = void*>
Pointer pointer(const OptionalTensor& t) {
  return t ? static_cast<Pointer>(t->data_ptr()) : nullptr;
}

std::vector<const void*> pointers(const Tensors& list) {
  std::vector<const void*> result(list.size());
  for (size_t k = 0; k < list.size(); ++k) result[k] = list[k].data_ptr();
  return result;
}

Tensor empty(const Sizes& sizes, ScalarType type) { return torch::stable::empty(sizes, type); }

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

// What forward and backward are given alike: checked, contiguous and kept alive.
struct Inputs {
  LayerShape shape;
  ScalarType type;
  Tensor x;
  Tensors w_ih, w_hh, w_hr;
  OptionalTensor h0, c0, lengths, reset;
  std::vector<const void*> w_ih_pointers, w_hh_pointers, w_hr_pointers;

  Inputs(const Tensor& x_in, const Tensors& w_ih_in, const Tensors& w_hh_in, const Tensors& w_hr_in,
         const OptionalTensor& h0_in, const OptionalTensor& c0_in, const OptionalTensor& lengths_in,
         const OptionalTensor& reset_in, int64_t reversed)
      : type(x_in.scalar_type()), x(x_in) {
    STD_TORCH_CHECK(x.dim() == 3, "x must be [T, B, I]; got ", text(sizes_of(x)));
    STD_TORCH_CHECK(!w_ih_in.empty() && w_ih_in[0].dim() == 2 && w_ih_in[0].size(0) % 4 == 0 &&
                        w_ih_in[0].size(0) > 0,
                    "w_ih must hold a [4H, I] tensor for each direction");
    const int64_t D = int64_t(w_ih_in.size()), H = w_ih_in[0].size(0) / 4;
    const bool projected = !w_hr_in.empty();
    STD_TORCH_CHECK(!projected || w_hr_in[0].dim() == 2,
                    "w_hr must hold a [P, H] tensor for each direction");
    const int64_t P = projected ? w_hr_in[0].size(0) : H;
    shape = {dtype_of(type),     x.size(0), x.size(1), D, x.size(2), H, P,
             uint64_t(reversed), projected};
    STD_TORCH_CHECK(D <= 64, "at most 64 recurrences run in one call; got ", D);
    if (x.stride(2) != 1 && x.size(2) > 1) x = torch::stable::contiguous(x);
    w_ih = checked("w_ih", w_ih_in, D, {4 * H, shape.I}, type);
    w_hh = checked("w_hh", w_hh_in, D, {4 * H, P}, type);
    w_hr = checked("w_hr", w_hr_in, projected ? D : 0, {P, H}, type);
    h0 = checked("h0", h0_in, {D, shape.B, P}, type);
    c0 = checked("c0", c0_in, {D, shape.B, H}, type);
    lengths = checked("lengths", lengths_in, {shape.B}, ScalarType::Long);
    reset = checked("reset", reset_in, {shape.T, shape.B}, ScalarType::Bool);
    for (int64_t b = 0; lengths && b < shape.B; ++b) {
      const int64_t length = pointer<const int64_t*>(lengths)[b];
      STD_TORCH_CHECK(length >= 0 && length <= shape.T, "lengths[", b, "] must be in 0..", shape.T,
                      "; got ", length);
    }
    w_ih_pointers = pointers(w_ih);
    w_hh_pointers = pointers(w_hh);
    w_hr_pointers = pointers(w_hr);
  }

  template <class Problem>
  void fill(Problem& p) const {
    p.shape = shape;
    p.x = x.data_ptr();
    p.x_stride_t = x.stride(0);
    p.x_stride_b = x.stride(1);
    p.w_ih = w_ih_pointers.data();
    p.w_hh = w_hh_pointers.data();
    p.w_hr = shape.projected ? w_hr_pointers.data() : nullptr;
    p.h0 = pointer(h0);
    p.c0 = pointer(c0);
    p.lengths = pointer<const int64_t*>(lengths);
    p.reset = pointer<const uint8_t*>(reset);
  }
};

template <class Entry, class Problem>
void run(Entry entry, const Problem& p, bool backward) {
  const Parallel& parallel = torch_threads();
  const CpuPlan plan = plan_cpu(p.shape, parallel.threads, backward);
  const Tensor scratch = empty({entry(p, plan, parallel, nullptr)}, ScalarType::Byte);
  entry(p, plan, parallel, scratch.data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_forward(
    const Tensor& x, const Tensors& w_ih, const Tensors& w_hh, const Tensors& bias,
    const Tensors& w_hr, const OptionalTensor& h0, const OptionalTensor& c0,
    const OptionalTensor& lengths, const OptionalTensor& reset, int64_t reversed, bool save,
    bool cells) {
  const Inputs in(x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, reversed);
  const auto& [dtype, T, B, D, I, H, P, bits, projected] = in.shape;
  const ScalarType compute = compute_type(in.type);
  const Tensors b = checked("bias", bias, bias.empty() ? 0 : 2 * D, {4 * H}, in.type);
  const std::vector<const void*> b_pointers = pointers(b);
  const Tensor y = empty({T, B, D * P}, in.type), h_n = empty({D, B, P}, in.type),
               c_n = empty({D, B, H}, in.type);
  const Tensor gates = save ? empty({T, B, D, 4 * H}, compute) : empty({0}, compute);
  const Tensor c = save || cells ? empty({T, B, D, H}, compute) : empty({0}, compute);

  LayerForward p{};
  in.fill(p);
  p.b_ih = b.empty() ? nullptr : b_pointers.data();
  p.b_hh = b.empty() ? nullptr : b_pointers.data() + D;
  p.y = y.data_ptr();
  p.h_n = h_n.data_ptr();
  p.c_n = c_n.data_ptr();
  p.gates = save ? gates.data_ptr() : nullptr;
  p.c = save || cells ? c.data_ptr() : nullptr;
  run(cpu_kernels()[dtype].forward, p, false);
  return {y, h_n, c_n, gates, c};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
    const OptionalTensor& dc, const Tensor& x, const Tensors& w_ih, const Tensors& w_hh,
    const Tensors& w_hr, const OptionalTensor& h0, const OptionalTensor& c0,
    const OptionalTensor& lengths, const OptionalTensor& reset, int64_t reversed, const Tensor& y,
    const Tensor& gates, const Tensor& c, bool need_dx, bool need_dw) {
  const Inputs in(x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, reversed);
  const auto& [dtype, T, B, D, I, H, P, bits, projected] = in.shape;
  const ScalarType compute = compute_type(in.type);
  const Tensor y_in = checked("y", y, {T, B, D * P}, in.type);
  const Tensor gates_in = checked("gates", gates, {T, B, D, 4 * H}, compute);
  const Tensor c_in = checked("c", c, {T, B, D, H}, compute);
  const OptionalTensor dy_in = checked("dy", dy, {T, B, D * P}, in.type);
  const OptionalTensor dh_n_in = checked("dh_n", dh_n, {D, B, P}, in.type);
  const OptionalTensor dc_n_in = checked("dc_n", dc_n, {D, B, H}, in.type);
  const OptionalTensor dc_in = checked("dc", dc, {T, B, D, H}, compute);
  const auto wanted = [&](bool want, const Sizes& sizes) {
    return empty(want ? sizes : Sizes{0}, compute);
  };
  Tensor dx = wanted(need_dx, {T, B, I}), dh0 = wanted(h0.has_value(), {D, B, P}),
         dc0 = wanted(c0.has_value(), {D, B, H});
  Tensor dw_ih = wanted(need_dw, {D, 4 * H, I}), dw_hh = wanted(need_dw, {D, 4 * H, P}),
         db = wanted(need_dw, {D, 4 * H});
  Tensor dw_hr = wanted(need_dw && projected, {D, P, H});

  LayerBackward p{};
  in.fill(p);
  p.y = y_in.data_ptr();
  p.gates = gates_in.data_ptr();
  p.c = c_in.data_ptr();
  p.dy = pointer(dy_in);
  p.dh_n = pointer(dh_n_in);
  p.dc_n = pointer(dc_n_in);
  p.dc = pointer(dc_in);
  p.dx = need_dx ? dx.data_ptr() : nullptr;
  p.dh0 = h0 ? dh0.data_ptr() : nullptr;
  p.dc0 = c0 ? dc0.data_ptr() : nullptr;
  if (need_dw) {
    p.dw_ih = dw_ih.data_ptr();
    p.dw_hh = dw_hh.data_ptr();
    p.db = db.data_ptr();
    p.dw_hr = dw_hr.data_ptr();
  }
  run(cpu_kernels()[dtype].backward, p, true);
  if (compute != in.type) {
    for (Tensor* t : {&dx, &dh0, &dc0, &dw_ih, &dw_hh, &db, &dw_hr})
      *t = torch::stable::to(*t, in.type);
  }
  return {dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr};
}

}  // namespace
}  // namespace lstm_cuda

STABLE_TORCH_LIBRARY(lstm_cuda, m) {
  m.def(
      "layer_forward(Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[] bias, Tensor[] w_hr, Tensor? "
      "h0, Tensor? c0, "
      "Tensor? lengths, Tensor? reset, int reversed, bool save, bool cells) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor c)");
  m.def(
      "layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor[] w_ih, "
      "Tensor[] w_hh, "
      "Tensor[] w_hr, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset, int reversed, Tensor "
      "y, Tensor gates, "
      "Tensor c, bool need_dx, bool need_dw) "
      "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db, Tensor "
      "dw_hr)");
}

STABLE_TORCH_LIBRARY_IMPL(lstm_cuda, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&lstm_cuda::layer_forward));
  m.impl("layer_backward", TORCH_BOX(&lstm_cuda::layer_backward));
}
