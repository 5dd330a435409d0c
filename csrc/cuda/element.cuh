// Types of the kernels by arithmetic, and sigmoid and tanh for the cell on a GPU.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../cell.h"
#include "plan.h"
#include "ptx.cuh"

namespace lstm_cuda {

LSTM_DEVICE int lane() { return int(ptx::thread_index() % 32); }
LSTM_DEVICE int warp() { return int(ptx::thread_index() / 32); }

// Element: how tensors are stored. Compute: sums, cell state, pre-activations in registers.
template <Arithmetic>
struct Types {
  using Element = float;
  using Compute = float;
};
template <>
struct Types<Arithmetic::float64> {
  using Element = double;
  using Compute = double;
};
template <>
struct Types<Arithmetic::float16> {
  using Element = __half;
  using Compute = float;
};
template <>
struct Types<Arithmetic::bfloat16> {
  using Element = __nv_bfloat16;
  using Compute = float;
};

LSTM_DEVICE double to_compute(double v) { return v; }
LSTM_DEVICE float to_compute(float v) { return v; }
LSTM_DEVICE float to_compute(__half v) { return __half2float(v); }
LSTM_DEVICE float to_compute(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class Element>
LSTM_DEVICE Element to_element(double v) {
  return v;
}
template <class Element>
LSTM_DEVICE Element to_element(float v) {
  if constexpr (std::is_floating_point_v<Element>)
    return v;
  else if constexpr (std::is_same_v<Element, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

// Element `at` of what is in memory as Element or, if `wide`, as Compute; null is zeros.
template <Arithmetic arithmetic>
LSTM_DEVICE auto load_either(const void* from, bool wide, int64_t at) {
  using Compute = typename Types<arithmetic>::Compute;
  using Element = typename Types<arithmetic>::Element;
  if (!from) return Compute(0);
  if constexpr (!std::is_same_v<Element, Compute>)
    if (wide) return static_cast<const Compute*>(from)[at];
  return to_compute(static_cast<const Element*>(from)[at]);
}
template <Arithmetic arithmetic, class Compute>
LSTM_DEVICE void store_either(void* to, bool wide, int64_t at, Compute v) {
  using Element = typename Types<arithmetic>::Element;
  if constexpr (!std::is_same_v<Element, Compute>)
    if (wide) {
      static_cast<Compute*>(to)[at] = v;
      return;
    }
  static_cast<Element*>(to)[at] = to_element<Element>(v);
}

// Two values in one register as products read them, the first in the lower half; and back.
template <Arithmetic arithmetic>
LSTM_DEVICE uint32_t packed(float first, float second) {
  uint32_t bits;
  if constexpr (arithmetic == Arithmetic::bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    std::memcpy(&bits, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    std::memcpy(&bits, &pair, 4);
  }
  return bits;
}

template <class Element>
LSTM_DEVICE void halves(uint32_t bits, Element (&both)[2]) {
  static_assert(sizeof(Element) == 2);
  std::memcpy(static_cast<void*>(both), &bits, 4);
}

// A value as products read it.
template <Arithmetic arithmetic, class Element>
LSTM_DEVICE Element operand(Element v) {
  if constexpr (arithmetic == Arithmetic::tf32)
    return ptx::round_tf32(v);
  else
    return v;
}

// Calls start<arithmetic>().
template <class Start>
auto by_arithmetic(Arithmetic arithmetic, Start start) {
  switch (arithmetic) {
    case Arithmetic::float64:
      return start.template operator()<Arithmetic::float64>();
    case Arithmetic::float32:
      return start.template operator()<Arithmetic::float32>();
    case Arithmetic::tf32:
      return start.template operator()<Arithmetic::tf32>();
    case Arithmetic::float16:
      return start.template operator()<Arithmetic::float16>();
    default:
      return start.template operator()<Arithmetic::bfloat16>();
  }
}

// The same for kernels that make no products: float32 has one.
template <class Start>
auto by_dtype(Dtype dtype, Start start) {
  switch (dtype) {
    case Dtype::float64:
      return start.template operator()<Arithmetic::float64>();
    case Dtype::float32:
      return start.template operator()<Arithmetic::float32>();
    case Dtype::float16:
      return start.template operator()<Arithmetic::float16>();
    default:
      return start.template operator()<Arithmetic::bfloat16>();
  }
}

// The Math that cell.h asks for.
//   float64: the library's.
//   bfloat16: the tanh of the special function unit, whose relative error of 2^-11 is a quarter of the
//   rounding of a bfloat16. It is all of that of a float16: gradients there would miss their bounds.
//   others: from 2^x and 1/x of that unit, a few units of the last place of a float.
template <Arithmetic arithmetic>
struct DeviceMath {
  static LSTM_DEVICE float sigmoid(float x) {
    return ptx::reciprocal_approx(1.f + ptx::exp2_approx(-1.44269504f * x));
  }
  static LSTM_DEVICE float tanh(float x) {
    const float size = x < 0 ? -x : x;
    // Near zero 1 - 2 / (1 + e^2x) cancels; there a minimax polynomial, relative error 3e-9.
    const float u = x * x;
    const float near =
        x +
        x * u *
            (-0.333332986f +
             u * (0.133319244f + u * (-0.0537838303f + u * (0.0207959656f + u * -0.00589515176f))));
    const float far =
        1.f - 2.f * ptx::reciprocal_approx(1.f + ptx::exp2_approx(2.88539008f * size));
    return size < 0.6f ? near : x < 0 ? -far : far;  // a NaN is neither near nor negative
  }
};
template <>
struct DeviceMath<Arithmetic::float64> {
  static LSTM_DEVICE double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }
  static LSTM_DEVICE double tanh(double x) { return ::tanh(x); }
};
template <>
struct DeviceMath<Arithmetic::bfloat16> {
  static LSTM_DEVICE float sigmoid(float x) { return 0.5f * ptx::tanh_approx(0.5f * x) + 0.5f; }
  static LSTM_DEVICE float tanh(float x) { return ptx::tanh_approx(x); }
};

}  // namespace lstm_cuda
