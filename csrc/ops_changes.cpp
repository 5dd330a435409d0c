// The ops for derivatives beyond the first, on the CPU: all in the compute type.
#include "ops.h"

#include "cpu/dispatch.h"

namespace lstm_cuda {
namespace {

ScalarType compute_type_of(const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, name,
                  " must be float64 or float32; got ", torch::headeronly::toString(type));
  return type;
}

template <class Entry, class Problem>
void run(Entry CpuKernels::Entry::* entry, const Problem& p, const Tensor& like) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  const Entry kernel = cpu_kernels()[wide ? Dtype::float64 : Dtype::float32].*entry;
  const Tensor scratch = empty({kernel(p, torch_threads(), nullptr)}, ScalarType::Byte, like);
  kernel(p, torch_threads(), scratch.data_ptr());
}

// The cells of a run, checked and kept alive.
struct CellInputs {
  ScalarType type;
  int64_t T, D, B, H;
  Sizes wide, narrow;
  Tensor gates, cells;
  OptionalTensor c0, fresh;

  CellInputs(const Tensor& gates_in, const Tensor& cells_in, const OptionalTensor& c0_in,
             const OptionalTensor& fresh_in)
      : type(compute_type_of("cells", cells_in)) {
    STD_TORCH_CHECK(cells_in.dim() == 4, "cells must be [T, D, B, H]; got ",
                    text(sizes_of(cells_in)));
    T = cells_in.size(0), D = cells_in.size(1), B = cells_in.size(2), H = cells_in.size(3);
    wide = {T, D, B, 4 * H}, narrow = {T, D, B, H};
    gates = checked("gates", gates_in, wide, type, cells_in);
    cells = checked("cells", cells_in, narrow, type, cells_in);
    c0 = checked("c0", c0_in, {D, B, H}, type, cells);
    fresh = checked("fresh", fresh_in, {T, D, B, 1}, ScalarType::Bool, cells);
  }

  bool empty() const { return T * D * B * H == 0; }
  Cells problem() const {
    return {T,
            D,
            B,
            H,
            gates.data_ptr(),
            cells.data_ptr(),
            pointer(c0),
            pointer<const uint8_t*>(fresh)};
  }
};

// A sequence whose features lie side by side.
Tensor readable(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) <= 1 ? t : torch::stable::contiguous(t);
}

Sequence sequence(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

struct Sources {
  OptionalTensor x, z, c, m;
  Tensor W;
  OptionalTensor V;
  int64_t I;

  Sources(const CellInputs& in, const OptionalTensor& x_in, const OptionalTensor& z_in,
          const OptionalTensor& c_in, const OptionalTensor& m_in, const Tensor& W_in,
          const OptionalTensor& V_in)
      : z(checked("source_z", z_in, in.wide, in.type, in.cells)),
        c(checked("source_c", c_in, in.narrow, in.type, in.cells)),
        m(checked("source_m", m_in, in.narrow, in.type, in.cells)),
        W(checked("W", W_in, {in.D, 4 * in.H, in.H}, in.type, in.cells)),
        I(V_in && V_in->dim() == 3 ? V_in->size(2) : 0) {
    V = checked("V", V_in, {in.D, 4 * in.H, I}, in.type, in.cells);
    STD_TORCH_CHECK(V || !x_in, "V must be given with source_x");
    if (!x_in) return;
    const Sizes sizes{in.T, in.D, in.B, I};
    STD_TORCH_CHECK(sizes_of(*x_in) == sizes, "source_x must be ", text(sizes), "; got ",
                    text(sizes_of(*x_in)));
    STD_TORCH_CHECK(x_in->scalar_type() == in.type && x_in->device() == in.cells.device(),
                    "source_x must have the dtype and device of cells");
    x = readable(*x_in);
  }

  LinearRecurrence problem(const CellInputs& in, bool transposed) const {
    LinearRecurrence p{};
    p.cells = in.problem();
    p.transposed = transposed;
    p.I = I;
    if (x && I > 0) p.source_x = sequence(*x);
    p.source_z = pointer(z);
    p.source_c = pointer(c);
    p.source_m = pointer(m);
    p.W = W.data_ptr();
    p.V = pointer(V);
    return p;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> changes(
    bool transposed, const OptionalTensor& source_x, const OptionalTensor& source_z,
    const OptionalTensor& source_gates, const OptionalTensor& source_c,
    const OptionalTensor& source_m, const Tensor& gates, const Tensor& cells,
    const OptionalTensor& c0, const Tensor& W, const OptionalTensor& V,
    const OptionalTensor& fresh) {
  STD_TORCH_CHECK(transposed || !source_gates,
                  "source_gates must be None unless transposed: it is a gradient");
  STD_TORCH_CHECK(!transposed || !source_x, "source_x must be None if transposed: it is a change");
  const CellInputs in(gates, cells, c0, fresh);
  const Sources sources(in, source_x, source_z, source_c, source_m, W, V);
  const OptionalTensor by_gates = checked("source_gates", source_gates, in.wide, in.type, in.cells);
  const bool gives_x = transposed && V;
  const Tensor x = empty(gives_x ? Sizes{in.T, in.D, in.B, sources.I} : Sizes{0}, in.type,
                         in.cells),
               z = empty(in.wide, in.type, in.cells), c = empty(in.narrow, in.type, in.cells),
               m = empty(in.narrow, in.type, in.cells);
  LinearRecurrence p = sources.problem(in, transposed);
  p.source_gates = pointer(by_gates);
  p.x = gives_x && sources.I > 0 ? x.data_ptr() : nullptr;
  p.z = z.data_ptr();
  p.c = c.data_ptr();
  p.m = m.data_ptr();
  if (!in.empty()) run(&CpuKernels::Entry::changes, p, in.cells);
  return {x, z, c, m};
}

// Both solutions' part in the gradients by the cells: checked, with the results.
struct GradientInputs {
  OptionalTensor source_gates;
  Tensor dc, dm, dgates, dcells, dc0;

  GradientInputs(const CellInputs& in, const OptionalTensor& source_gates_in, const Tensor& dc_in,
                 const Tensor& dm_in)
      : source_gates(checked("source_gates", source_gates_in, in.wide, in.type, in.cells)),
        dc(checked("dc", dc_in, in.narrow, in.type, in.cells)),
        dm(checked("dm", dm_in, in.narrow, in.type, in.cells)),
        dgates(lstm_cuda::empty(in.wide, in.type, in.cells)),
        dcells(lstm_cuda::empty(in.narrow, in.type, in.cells)),
        dc0(lstm_cuda::empty(in.c0 ? Sizes{in.D, in.B, in.H} : Sizes{0}, in.type, in.cells)) {
    if (in.empty()) torch::stable::zero_(dc0);
  }

  CellGradients problem(const CellInputs& in) const {
    CellGradients p{};
    p.cells = in.problem();
    p.source_gates = pointer(source_gates);
    p.dc = dc.data_ptr();
    p.dm = dm.data_ptr();
    p.dgates = dgates.data_ptr();
    p.dcells = dcells.data_ptr();
    p.dc0 = in.c0 ? dc0.data_ptr() : nullptr;
    return p;
  }
};

std::tuple<Tensor, Tensor, Tensor> cell_gradients(const OptionalTensor& source_gates,
                                                  const Tensor& dc, const Tensor& dm,
                                                  const Tensor& z, const Tensor& change_c,
                                                  const Tensor& gates, const Tensor& cells,
                                                  const OptionalTensor& c0,
                                                  const OptionalTensor& fresh) {
  const CellInputs in(gates, cells, c0, fresh);
  const GradientInputs grads(in, source_gates, dc, dm);
  const Tensor z_in = checked("z", z, in.wide, in.type, in.cells),
               c_in = checked("change_c", change_c, in.narrow, in.type, in.cells);
  CellGradients p = grads.problem(in);
  p.z = z_in.data_ptr();
  p.change_c = c_in.data_ptr();
  if (!in.empty()) run(&CpuKernels::Entry::cell_gradients, p, in.cells);
  return {grads.dgates, grads.dcells, grads.dc0};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tangents_with_gradients(
    const OptionalTensor& source_x, const OptionalTensor& source_z, const OptionalTensor& source_c,
    const OptionalTensor& source_m, const OptionalTensor& source_gates, const Tensor& dc,
    const Tensor& dm, const Tensor& gates, const Tensor& cells, const OptionalTensor& c0,
    const Tensor& W, const OptionalTensor& V, const OptionalTensor& fresh) {
  const CellInputs in(gates, cells, c0, fresh);
  const Sources sources(in, source_x, source_z, source_c, source_m, W, V);
  const GradientInputs grads(in, source_gates, dc, dm);
  const Tensor c = empty(in.narrow, in.type, in.cells), m = empty(in.narrow, in.type, in.cells);
  const CellGradients gradients = grads.problem(in);
  LinearRecurrence p = sources.problem(in, false);
  p.c = c.data_ptr();
  p.m = m.data_ptr();
  p.gradients = &gradients;
  if (!in.empty()) run(&CpuKernels::Entry::changes, p, in.cells);
  return {c, m, grads.dgates, grads.dcells, grads.dc0};
}

Tensor product(const Tensor& a, const Tensor& w) {
  STD_TORCH_CHECK(a.dim() == 4, "a must be [T, D, B, m]; got ", text(sizes_of(a)));
  const ScalarType type = compute_type_of("a", a);
  const int64_t T = a.size(0), D = a.size(1), B = a.size(2), m = a.size(3);
  STD_TORCH_CHECK(w.dim() == 3 && w.size(0) == D && w.size(1) == m, "w must be [", D, ", ", m,
                  ", n]; got ", text(sizes_of(w)));
  STD_TORCH_CHECK(w.scalar_type() == type && w.device() == a.device(),
                  "w must have a's dtype and device");
  const int64_t n = w.size(2);
  const Tensor rows = readable(a);
  const Tensor matrix = w.stride(1) == 1 || w.stride(2) == 1 ? w : torch::stable::contiguous(w);
  Tensor out = empty({T, D, B, n}, type, a);
  const Product p{T,
                  D,
                  B,
                  m,
                  n,
                  sequence(rows),
                  matrix.data_ptr(),
                  matrix.stride(0),
                  matrix.stride(1),
                  matrix.stride(2),
                  out.data_ptr()};
  if (T * D * B * m * n > 0)
    run(&CpuKernels::Entry::product, p, a);
  else
    torch::stable::zero_(out);
  return out;
}

Tensor outer_products(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.dim() == 4, "a must be [T, D, B, m]; got ", text(sizes_of(a)));
  const ScalarType type = compute_type_of("a", a);
  const int64_t T = a.size(0), D = a.size(1), B = a.size(2), m = a.size(3);
  STD_TORCH_CHECK(b.dim() == 4 && b.size(0) == T && b.size(1) == D && b.size(2) == B, "b must be [",
                  T, ", ", D, ", ", B, ", n]; got ", text(sizes_of(b)));
  STD_TORCH_CHECK(b.scalar_type() == type && b.device() == a.device(),
                  "b must have a's dtype and device");
  const int64_t n = b.size(3);
  const Tensor left = readable(a), right = readable(b);
  Tensor out = empty({D, m, n}, type, a);
  const OuterProducts p{T, D, B, m, n, sequence(left), sequence(right), out.data_ptr()};
  if (T * D * B * m * n > 0)
    run(&CpuKernels::Entry::outer_products, p, a);
  else
    torch::stable::zero_(out);
  return out;
}

}  // namespace
}  // namespace lstm_cuda

STABLE_TORCH_LIBRARY_IMPL(lstm_cuda, CPU, m) {
  m.impl("changes", TORCH_BOX(&lstm_cuda::changes));
  m.impl("cell_gradients", TORCH_BOX(&lstm_cuda::cell_gradients));
  m.impl("tangents_with_gradients", TORCH_BOX(&lstm_cuda::tangents_with_gradients));
  m.impl("product", TORCH_BOX(&lstm_cuda::product));
  m.impl("outer_products", TORCH_BOX(&lstm_cuda::outer_products));
}
