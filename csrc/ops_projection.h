// A projection around a recurrence that has none, so that kernels which keep their weights run it, too.
//
// With h = w_hr m, a step's product w_hh h is (w_hh w_hr) m. So the recurrence over m, [T, B, D, H], is
// one without a projection and with weights w_hh w_hr; all else is large products before and after it.
// h0 is no w_hr m: its product with w_hh is added to gates_x (operands.h).
//
//   forward    recurrence -> m    y = m w_hr^T
//   backward   dm = dy w_hr    recurrence -> dgates    dh = dy + dgates[next step] w_hh
#pragma once

#include "ops_products.h"

namespace lstm_cuda {

// That of the recurrence over m.
inline LayerShape unprojected(LayerShape shape) {
  shape.P = shape.H;
  shape.projected = false;
  return shape;
}

// w_hh w_hr of each recurrence: [4H, H].
inline Tensors fold_projection(const Products& products, const Tensors& w_hh, const Tensors& w_hr) {
  Tensors folded;
  for (size_t d = 0; d < w_hh.size(); ++d) folded.push_back(products.multiply(w_hh[d], w_hr[d]));
  return folded;
}

// product(rows[:, d, :], d) of each recurrence, side by side. rows: [..., D, K], as it lies in memory;
// the result: [T * B, D * N].
template <class Product>
Tensor each_recurrence(const Tensor& rows, const LayerShape& shape, Product product) {
  Tensor all = shaped(rows, {shape.T * shape.B, -1});
  const int64_t K = all.size(1) / shape.D;
  Tensors results;
  for (int64_t d = 0; d < shape.D; ++d)
    results.push_back(product(torch::stable::narrow(all, 1, d * K, K), d));
  return cat(results, 1);
}

}  // namespace lstm_cuda
