// Checks and allocation for the torch side of either device (ops.h).
#include "ops.h"

namespace lstm_cuda {

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

namespace {

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

}  // namespace

ScalarType compute_type(ScalarType type) {
  return type == ScalarType::Double ? type : ScalarType::Float;
}

Tensor checked(const char* name, const Tensor& t, const Sizes& sizes, ScalarType type,
               const Tensor& x) {
  STD_TORCH_CHECK(sizes_of(t) == sizes, name, " must be ", text(sizes), "; got ",
                  text(sizes_of(t)));
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has another dtype than is needed here");
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on x's device");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

OptionalTensor checked(const char* name, const OptionalTensor& t, const Sizes& sizes,
                       ScalarType type, const Tensor& x) {
  return t ? OptionalTensor(checked(name, *t, sizes, type, x)) : std::nullopt;
}

Tensors checked(const char* name, const Tensors& list, size_t count, const Sizes& sizes,
                ScalarType type, const Tensor& x) {
  STD_TORCH_CHECK(list.size() == count, name, " must hold ", count, " tensors; got ", list.size());
  Tensors result;
  result.reserve(count);
  for (const Tensor& t : list) result.push_back(checked(name, t, sizes, type, x));
  return result;
}

std::vector<const void*> pointers(const Tensors& list) {
  std::vector<const void*> result(list.size());
  for (size_t k = 0; k < list.size(); ++k) result[k] = list[k].data_ptr();
  return result;
}

Tensor empty(const Sizes& sizes, ScalarType type, const Tensor& x) {
  return torch::stable::empty(sizes, type, std::nullopt, x.device());
}

Inputs::Inputs(const Tensor& x_in, const Tensors& w_ih_in, const Tensors& w_hh_in,
               const Tensors& w_hr_in, const OptionalTensor& h0_in, const OptionalTensor& c0_in,
               const OptionalTensor& lengths_in, const OptionalTensor& reset_in, int64_t reversed)
    : type(w_ih_in.empty() && !w_hh_in.empty() ? w_hh_in[0].scalar_type() : x_in.scalar_type()),
      c_type(c0_in ? c0_in->scalar_type() : type),
      x(x_in) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [T, B, inputs * I]; got ", text(sizes_of(x)));
  const Tensors& w = w_ih_in.empty() ? w_hh_in : w_ih_in;
  STD_TORCH_CHECK(!w.empty() && w[0].dim() == 2 && w[0].size(0) % 4 == 0 && w[0].size(0) > 0,
                  "w_ih must hold a [4H, I] tensor for each direction");
  const int64_t D = int64_t(w.size()), H = w[0].size(0) / 4,
                I = w_ih_in.empty() ? 4 * H : w[0].size(1), inputs = I > 0 ? x.size(2) / I : 1;
  STD_TORCH_CHECK(x.size(2) == inputs * I && inputs > 0 && D % inputs == 0, "x must be [T, B, n * ",
                  I, "] where n divides the ", D, " recurrences; got ", text(sizes_of(x)));
  const bool projected = !w_hr_in.empty();
  STD_TORCH_CHECK(!projected || w_hr_in[0].dim() == 2,
                  "w_hr must hold a [P, H] tensor for each direction");
  const int64_t P = projected ? w_hr_in[0].size(0) : H;
  shape = {dtype_of(type), x.size(0), x.size(1), D, I, H, P, uint64_t(reversed), projected, inputs};
  STD_TORCH_CHECK(D <= kMaxRecurrences, "at most ", kMaxRecurrences,
                  " recurrences run in one call; got ", D);
  if (x.stride(2) != 1 && x.size(2) > 1) x = torch::stable::contiguous(x);
  STD_TORCH_CHECK(!w_ih_in.empty() || (inputs == D && x.scalar_type() == compute_type(type)),
                  "without w_ih, x must be [T, B, D * 4H] in the compute type");
  w_ih = checked("w_ih", w_ih_in, w_ih_in.empty() ? 0 : D, {4 * H, I}, type, x);
  w_hh = checked("w_hh", w_hh_in, D, {4 * H, P}, type, x);
  w_hr = checked("w_hr", w_hr_in, projected ? D : 0, {P, H}, type, x);
  h0 = checked("h0", h0_in, {D, shape.B, P}, type, x);
  STD_TORCH_CHECK(c_type == type || c_type == compute_type(type), "c0 must be ",
                  torch::headeronly::toString(type), " like x, or ",
                  torch::headeronly::toString(compute_type(type)), "; got ",
                  torch::headeronly::toString(c_type));
  c0 = checked("c0", c0_in, {D, shape.B, H}, c_type, x);
  lengths = checked("lengths", lengths_in, {shape.B}, ScalarType::Long, x);
  reset = checked("reset", reset_in, {shape.T, shape.B}, ScalarType::Bool, x);
  w_ih_pointers = pointers(w_ih);
  w_hh_pointers = pointers(w_hh);
  w_hr_pointers = pointers(w_hr);
}

Gradients::Gradients(const Inputs& in, const OptionalTensor& dy_in, const OptionalTensor& dh_n_in,
                     const OptionalTensor& dc_n_in, const OptionalTensor& dc_in, const Tensor& y_in,
                     const Tensor& gates_in, const Tensor& c_in, ScalarType gates_type) {
  const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
  const ScalarType compute = compute_type(in.type);
  y = checked("y", y_in, {T, B, D * P}, in.type, in.x);
  gates = checked("gates", gates_in, {T, B, D, 4 * H}, gates_type, in.x);
  c = checked("c", c_in, {T, B, D, H}, compute, in.x);
  dy = checked("dy", dy_in, {T, B, D * P}, in.type, in.x);
  dh_n = checked("dh_n", dh_n_in, {D, B, P}, in.type, in.x);
  dc_n = checked("dc_n", dc_n_in, {D, B, H}, in.c_type, in.x);
  dc = checked("dc", dc_in, {T, B, D, H}, compute, in.x);
}

VariantInputs::VariantInputs(const Inputs& in, int64_t forget, int64_t recurrent_activation,
                             int64_t activation, int64_t output_activation, double cell_clip,
                             double zoneout_h, double zoneout_c, const OptionalTensor& peephole_in,
                             const OptionalTensor& norm_in, const OptionalTensor& h_scale_in,
                             const OptionalTensor& seed_in, int64_t first_step_in) {
  const auto& [dtype, T, B, D, I, H, P, bits, projected, inputs] = in.shape;
  const ScalarType compute = compute_type(in.type);
  STD_TORCH_CHECK(forget >= 0 && forget <= int64_t(Forget::coupled), "forget must be in 0..2; got ",
                  forget);
  for (const int64_t number : {recurrent_activation, activation, output_activation}) {
    STD_TORCH_CHECK(number >= 0 && number <= int64_t(Activation::identity),
                    "activations must be in 0..", int64_t(Activation::identity), "; got ", number);
  }
  for (const double probability : {zoneout_h, zoneout_c}) {
    STD_TORCH_CHECK(probability >= 0 && probability <= 1, "zoneout must be in 0..1; got ",
                    probability);
  }
  cell = {Forget(forget),
          Activation(recurrent_activation),
          Activation(activation),
          Activation(output_activation),
          cell_clip,
          zoneout_h,
          zoneout_c};
  peephole = checked("peephole", peephole_in, {D, 3, H}, compute, in.x);
  norm = checked("norm", norm_in, {D, 6, H}, compute, in.x);
  h_scale = checked("h_scale", h_scale_in, {D, B, P}, compute, in.x);
  seed = checked("seed", seed_in, {D}, ScalarType::Long, in.x);
  first_step = first_step_in;
}

void VariantInputs::check_gates_x(const Inputs& in, const OptionalTensors& bias) const {
  STD_TORCH_CHECK(!in.w_ih.empty() || !bias, "bias is part of gates_x where there is no w_ih");
  STD_TORCH_CHECK(norm.has_value() == in.w_ih.empty(),
                  "w_ih must be left out with norm, which needs gates_x, and only then");
}

namespace {

std::tuple<Sizes, Sizes> sizes_of_statistics(const LayerShape& s, bool kept) {
  if (!kept) return {{0}, {0}};
  return {{s.T, s.B, s.D, 4 * s.H}, {s.T, s.B, s.D}};
}

}  // namespace

std::tuple<Tensor, Tensor> VariantInputs::statistics(const Inputs& in, bool save) const {
  const auto [normed, rstd] = sizes_of_statistics(in.shape, save && norm);
  const ScalarType compute = compute_type(in.type);
  return {empty(normed, compute, in.x), empty(rstd, compute, in.x)};
}

std::tuple<Tensor, Tensor> VariantInputs::checked_statistics(const Inputs& in, const Tensor& normed,
                                                             const Tensor& rstd) const {
  const auto [normed_sizes, rstd_sizes] = sizes_of_statistics(in.shape, norm.has_value());
  const ScalarType compute = compute_type(in.type);
  return {checked("normed", normed, normed_sizes, compute, in.x),
          checked("rstd", rstd, rstd_sizes, compute, in.x)};
}

Variant VariantInputs::variant(const std::tuple<Tensor, Tensor>& statistics) const {
  const auto& [normed, rstd] = statistics;
  const bool kept = rstd.dim() == 3;
  Variant v{};
  v.cell = cell;
  v.peephole = pointer(peephole);
  v.norm = pointer(norm);
  v.h_scale = pointer(h_scale);
  v.seed = pointer<const int64_t*>(seed);
  v.first_step = first_step;
  v.normed = kept ? normed.data_ptr() : nullptr;
  v.rstd = kept ? rstd.data_ptr() : nullptr;
  return v;
}

std::tuple<Tensor, Tensor> VariantInputs::split(const Tensor& dmore) const {
  int64_t first = 0;
  const auto part = [&](int64_t rows) {
    if (dmore.size(1) == 0 || rows == 0) return empty({0}, dmore.scalar_type(), dmore);
    Tensor whole = dmore;
    const Tensor result = torch::stable::clone(torch::stable::narrow(whole, 1, first, rows));
    first += rows;
    return result;
  };
  Tensor of_peephole = part(peephole ? 3 : 0);
  return {of_peephole, part(norm ? 6 : 0)};
}

}  // namespace lstm_cuda
