// The large products of ops_cuda.cpp, by torch. Those of float32 obey torch's setting for matrix
// products, which is exact unless its user says otherwise; where TF32 is allowed for RNNs, the ones it
// pays for go through float16 instead (cuda/scaled_product.h).
#pragma once

#if defined(LSTM_EMULATE)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

#include <array>
#include <atomic>

#include "cuda/scaled_product.h"
#include "ops.h"

namespace lstm_cuda {

// torch's op with the arguments of its schema; the result is its only output. Nothing if it failed.
template <class... Arguments>
std::optional<Tensor> try_call(const char* op, const char* overload,
                               const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  if (torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS)
    return {};
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The same, which must not fail.
template <class... Arguments>
Tensor call(const char* op, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor cat(const Tensors& list, int64_t dim = 0) {
  return list.size() == 1 ? list[0] : call("aten::cat", "", list, dim);
}
inline Tensor shaped(const Tensor& t, const Sizes& sizes) { return torch::stable::view(t, sizes); }
// The same of what an op returns and nobody else has: not a view, which could not carry a tangent.
inline Tensor result_shaped(const Tensor& t, const Sizes& sizes) {
  return call("aten::_unsafe_view", "", t, sizes);
}
inline Tensor sum(const Tensor& t, int64_t dim) {
  return call("aten::sum", "dim_IntList", t, std::optional<Sizes>(Sizes{dim}), false,
              std::optional<ScalarType>());
}
inline Tensor mm(const Tensor& a, const Tensor& b) { return call("aten::mm", "", a, b); }
inline Tensor bmm(const Tensor& a, const Tensor& b) { return call("aten::bmm", "", a, b); }
// sum += a b, of each pair in a batch. Of any strides, as the result of a product may be. (Scalars, as
// torch's op has them, do not go through its dispatcher.)
inline void add_bmm(const Tensor& sum, const Tensor& a, const Tensor& b) {
#if defined(LSTM_EMULATE)
  constexpr auto add = aoti_torch_cpu_baddbmm_out;
#else
  constexpr auto add = aoti_torch_cuda_baddbmm_out;
#endif
  TORCH_ERROR_CODE_CHECK(add(sum.get(), sum.get(), a.get(), b.get(), 1, 1));
}

inline void check(const Status& status) {
  STD_TORCH_CHECK(status.ok(), "lstm_cuda: ", status.message);
}

// a b, or of each pair in a batch, for float16 a and b, with sums and results in float32. The results of
// a batch may be wanted somewhere.
inline std::optional<Tensor> half_product(const Tensor& a, const Tensor& b,
                                          const OptionalTensor& to = {}) {
  const bool batched = a.dim() == 3;
#if defined(LSTM_EMULATE)
  // CPUs have no such product (so asking for it is a way to be refused). This one rounds where that does.
  if (!emulation::refuse_scaled_products) {
    const auto widened = [](const Tensor& t) {
      Tensor wide = empty(sizes_of(t), ScalarType::Float, t);
      return torch::stable::copy_(wide, t);
    };
    if (to) return call("aten::bmm", "out", widened(a), widened(b), *to);
    return batched ? bmm(widened(a), widened(b)) : mm(widened(a), widened(b));
  }
#endif
  if (to) return try_call("aten::bmm", "dtype_out", a, b, ScalarType::Float, *to);
  return try_call(batched ? "aten::bmm" : "aten::mm", "dtype", a, b, ScalarType::Float);
}

class Products {
 public:
  // tf32: operands of float32 products may be rounded to TF32.
  Products(const Tensor& x, bool tf32, Stream stream)
      : scaling_(tf32 && x.scalar_type() == ScalarType::Float), stream_(stream) {}

  // x w^T + bias. x: [M, K] or [T, B, K] with neighbours in the last dimension; w: [N, K].
  Tensor linear(const Tensor& x, const Tensor& w, const OptionalTensor& bias) const {
    const Matrix rows = matrix(x);
    return scaled_if(
        worth_scaling(rows.rows, w.size(0), rows.columns),
        [&] {
          const std::vector<Scaled> of = convert<scale_rows>({x, w});
          return product(of[0].values, of[0].exponents, transpose(of[1].values, 0, 1),
                         of[1].exponents, bias);
        },
        [&] { return call("aten::linear", "", flat(x), w, bias); });
  }

  // a b. a: [M, K], b: [K, N].
  Tensor multiply(const Tensor& a, const Tensor& b) const {
    return scaled_if(
        worth_scaling(a.size(0), b.size(1), a.size(1)),
        [&] {
          const Scaled left = convert<scale_rows>({a})[0], right = convert<scale_columns>({b})[0];
          return product(left.values, left.exponents, columns(right, b.size(1)), right.exponents,
                         {});
        },
        [&] { return mm(a, b); });
  }

  // The same of n pairs side by side. x: [M, n K] or [T, B, n K]; w: [n N, K]; bias: [n N]; the result:
  // [M, n N].
  Tensor linear_each(const Tensor& x, const Tensor& w, const OptionalTensor& bias,
                     int64_t n) const {
    if (n == 1) return linear(x, w, bias);
    const Tensor a = split(x, n);
    const int64_t K = w.size(1), N = w.size(0) / n;
    return scaled_if(
        worth_scaling(a.size(0), N, K, n),
        [&] {
          const std::vector<Scaled> of = convert<scale_rows>({a, w});
          const Tensor b = transpose(shaped(of[1].values, {n, N, padded(K)}), 1, 2);
          return product_each(of[0], b, of[1].exponents, bias);
        },
        [&] { return exact_each(a, transpose(shaped(w, {n, N, K}), 1, 2), bias); });
  }

  // a: [M, n K], b: [n K, N]; the result: [M, n N].
  Tensor multiply_each(const Tensor& all, const Tensor& b, int64_t n) const {
    if (n == 1) return multiply(all, b);
    const Tensor a = split(all, n);
    const int64_t K = b.size(0) / n, N = b.size(1);
    const Tensor each = shaped(b, {n, K, N});
    return scaled_if(
        worth_scaling(a.size(0), N, K, n),
        [&] {
          const Tensor beside = torch::stable::contiguous(transpose(each, 0, 1));
          const Scaled left = convert<scale_rows>({a})[0],
                       right = convert<scale_columns>({shaped(beside, {K, n * N})})[0];
          return product_each(left, by_recurrence(columns(right, n * N), n), right.exponents, {});
        },
        [&] { return exact_each(a, each, {}); });
  }

  // For each recurrence d the sum over rows of a[row, d, :]^T b[row, d, :]: [D, M, N]. a: [rows, D * M],
  // b: [rows, D * N], or with [T, B] for the rows.
  struct OverRows {
    Tensor a, b;
    int64_t D;
  };
  // Converted together, since a may be in several.
  std::vector<Tensor> over_rows(const std::vector<OverRows>& list) const {
    Tensors distinct;
    const auto place = [&](const Tensor& t) {
      size_t k = 0;
      while (k < distinct.size() && distinct[k].data_ptr() != t.data_ptr()) ++k;
      return k;
    };
    const auto worth = [](const OverRows& each) {
      const Matrix a = matrix(each.a), b = matrix(each.b);
      return worth_scaling(a.columns / each.D, b.columns / each.D, a.rows);
    };
    for (const OverRows& each : list)
      for (const Tensor* t : {&each.a, &each.b})
        if (scaling() && worth(each) && place(*t) == distinct.size()) distinct.push_back(*t);
    const std::vector<Scaled> converted = convert<scale_columns>(distinct);

    std::vector<Tensor> results;
    for (const OverRows& each : list)
      results.push_back(scaled_if(
          worth(each),
          [&] {
            const Scaled &a = converted[place(each.a)], &b = converted[place(each.b)];
            const auto split = [&](const Scaled& t, const Tensor& of) {
              return by_recurrence(columns(t, matrix(of).columns), each.D);
            };
            return product(transpose(split(a, each.a), 1, 2), a.exponents, split(b, each.b),
                           b.exponents, {});
          },
          [&] {
            return bmm(transpose(by_recurrence(flat(each.a), each.D), 1, 2),
                       by_recurrence(flat(each.b), each.D));
          }));
    return results;
  }

 private:
  // A matrix in float16, padded, and the exponents of its scales.
  struct Scaled {
    Tensor values, exponents;
  };

  bool scaling() const { return scaling_ && !scaling_refused; }

  // The product with scaled operands, if they are worth it and torch does not refuse.
  template <class Make, class MakeExact>
  Tensor scaled_if(bool worth, Make make, MakeExact make_exact) const {
    if (!scaling() || !worth) return make_exact();
    if (const std::optional<Tensor> result = make()) return *result;
    const Tensor result = make_exact();  // throws if memory was short, which is no refusal
    scaling_refused = true;
    return result;
  }

  static Tensor flat(const Tensor& t) {
    return t.dim() == 2 ? t : torch::stable::reshape(t, {t.size(0) * t.size(1), t.size(2)});
  }
  // Of a float32 tensor, as `flat` has it.
  static Matrix matrix(const Tensor& t) {
    const bool steps = t.dim() == 3;
    const int64_t rows = t.size(steps ? 1 : 0);
    return {static_cast<const float*>(t.data_ptr()),
            steps ? t.size(0) * rows : rows,
            t.size(steps ? 2 : 1),
            rows,
            steps ? t.stride(0) : 0,
            t.stride(steps ? 1 : 0)};
  }
  // n matrices side by side, [M, n K] or [T, B, n K], as [M, n, K].
  static Tensor split(const Tensor& t, int64_t n) {
    const Tensor rows = flat(t);
    return shaped(rows, {rows.size(0), n, rows.size(1) / n});
  }
  // [rows, D * N] as [D, rows, N].
  static Tensor by_recurrence(const Tensor& t, int64_t D) {
    return transpose(shaped(t, {t.size(0), D, t.size(1) / D}), 0, 1);
  }
  // Without the columns that were added.
  static Tensor columns(const Scaled& t, int64_t count) {
    Tensor values = t.values;
    return values.size(1) == count ? values : torch::stable::narrow(values, 1, 0, count);
  }

  template <auto scale>
  std::vector<Scaled> convert(const Tensors& list) const {
    constexpr bool kColumns = scale == scale_columns;
    std::array<ScaledOperand, kMaxScaledOperands> operands;
    std::vector<Scaled> results;
    Tensors scratch;
    for (size_t k = 0; k < list.size(); ++k) {
      const Matrix m = matrix(list[k]);
      results.push_back({empty({kColumns ? padded(m.rows) : m.rows, padded(m.columns)},
                               ScalarType::Half, list[k]),
                         empty({kColumns ? m.columns : m.rows}, ScalarType::Int, list[k])});
      scratch.push_back(empty({kColumns ? column_maxima(m) : 0}, ScalarType::Int, list[k]));
      operands[k] = {m, results[k].values.data_ptr(),
                     static_cast<int*>(results[k].exponents.data_ptr()),
                     static_cast<unsigned*>(scratch[k].data_ptr())};
    }
    check(scale(operands.data(), int(list.size()), stream_));
    return results;
  }

  // a b + bias, from converted matrices.
  std::optional<Tensor> product(const Tensor& a, const Tensor& a_exponents, const Tensor& b,
                                const Tensor& b_exponents, const OptionalTensor& bias) const {
    std::optional<Tensor> result = half_product(a, b);
    if (!result) return {};
    const int64_t dim = result->dim();
    check(unscale({static_cast<float*>(result->data_ptr()), dim == 3 ? result->size(0) : 1,
                   result->size(dim - 2), result->size(dim - 1),
                   static_cast<const int*>(a_exponents.data_ptr()),
                   static_cast<const int*>(b_exponents.data_ptr()), pointer<const float*>(bias)},
                  stream_));
    return result;
  }

  // a[:, k] b[k] + bias[k], side by side. a: [M, n, K], b: [n, K, N], bias: [n N].
  static Tensor exact_each(const Tensor& a, const Tensor& b, const OptionalTensor& bias) {
    const int64_t n = b.size(0);
    Tensor result = empty({a.size(0), n * b.size(2)}, a.scalar_type(), a);
    const Tensor each = by_recurrence(result, n), a_each = transpose(a, 0, 1);
    if (bias) {
      torch::stable::copy_(result, *bias);
      add_bmm(each, a_each, b);
    } else {
      call("aten::bmm", "out", a_each, b, each);
    }
    return result;
  }
  // The same from converted matrices, of which a has rows [M, n].
  std::optional<Tensor> product_each(const Scaled& a, const Tensor& b, const Tensor& b_exponents,
                                     const OptionalTensor& bias) const {
    const int64_t n = b.size(0), M = a.values.size(0) / n, N = b.size(2);
    const Tensor result = empty({M, n * N}, ScalarType::Float, b);
    const Tensor a_each = transpose(shaped(a.values, {M, n, a.values.size(1)}), 0, 1);
    if (!half_product(a_each, b, by_recurrence(result, n))) return {};
    check(unscale(
        {static_cast<float*>(result.data_ptr()), n, M, N,
         static_cast<const int*>(a.exponents.data_ptr()),
         static_cast<const int*>(b_exponents.data_ptr()), pointer<const float*>(bias), true},
        stream_));
    return result;
  }

  bool scaling_;
  Stream stream_;
};

}  // namespace lstm_cuda
