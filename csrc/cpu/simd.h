// Vectors of LSTM_VECTOR_BYTES bytes on top of the compiler's vector extension, and the few places
// where an instruction set has something better. Included once by each kernels_<isa>.cpp, inside
// that file's target and namespace.
//
// Masks: `n` is how many leading lanes are real; memory past them is neither read nor written.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

#define LSTM_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(LSTM_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(LSTM_VECTOR_BYTES)));
};
template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(LSTM_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(LSTM_VECTOR_BYTES)));
};
template <>
struct Lanes<uint32_t> {
  typedef uint32_t Vec __attribute__((vector_size(LSTM_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(LSTM_VECTOR_BYTES)));
};
typedef uint16_t Half16 __attribute__((vector_size(LSTM_VECTOR_BYTES / 2)));

template <class T>
using Vec = typename Lanes<T>::Vec;
template <class T>
constexpr int kLanes = LSTM_VECTOR_BYTES / int(sizeof(T));

template <class To, class From>
LSTM_INLINE To bit_cast(const From& from) {
  return __builtin_bit_cast(
      To, from);  // not memcpy: that would force arrays of vectors out of registers
}

template <class T>
LSTM_INLINE Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

// ---- raw lanes: full and partial ----------------------------------------------------------------

template <class V, class E>
LSTM_INLINE V load_lanes(const E* p, int n) {
  constexpr int lanes = sizeof(V) / sizeof(E);
  V v{};
  if (n >= lanes) {
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
#if LSTM_VECTOR_BYTES == 64
  if constexpr (sizeof(E) == 4) return bit_cast<V>(_mm512_maskz_loadu_epi32((1u << n) - 1, p));
  if constexpr (sizeof(E) == 8) return bit_cast<V>(_mm512_maskz_loadu_epi64((1u << n) - 1, p));
  if constexpr (sizeof(E) == 2) return bit_cast<V>(_mm256_maskz_loadu_epi16((1u << n) - 1, p));
#else
  E lane[lanes] = {};
  for (int l = 0; l < n; ++l) lane[l] = p[l];
  __builtin_memcpy(&v, lane, sizeof v);
  return v;
#endif
}

template <class V, class E>
LSTM_INLINE void store_lanes(E* p, const V& v, int n) {
  constexpr int lanes = sizeof(V) / sizeof(E);
  if (n >= lanes) {
    __builtin_memcpy(p, &v, sizeof v);
    return;
  }
#if LSTM_VECTOR_BYTES == 64
  if constexpr (sizeof(E) == 4) _mm512_mask_storeu_epi32(p, (1u << n) - 1, bit_cast<__m512i>(v));
  if constexpr (sizeof(E) == 8) _mm512_mask_storeu_epi64(p, (1u << n) - 1, bit_cast<__m512i>(v));
  if constexpr (sizeof(E) == 2) _mm256_mask_storeu_epi16(p, (1u << n) - 1, bit_cast<__m256i>(v));
#else
  E lane[lanes];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int l = 0; l < n; ++l) p[l] = lane[l];
#endif
}

// ---- 16-bit types: stored narrow, computed in float ---------------------------------------------

LSTM_INLINE Vec<uint32_t> widen_bits(const Half16& bits) {
  return __builtin_convertvector(bits, Vec<uint32_t>);
}

LSTM_INLINE Vec<float> widen(const Half16& bits, BFloat16) {
  return bit_cast<Vec<float>>(widen_bits(bits) << 16);
}

LSTM_INLINE Vec<float> widen(const Half16& bits, Float16) {
#if LSTM_VECTOR_BYTES == 64
  return bit_cast<Vec<float>>(_mm512_maskz_cvtph_ps(__mmask16(-1), bit_cast<__m256i>(bits)));
#elif LSTM_VECTOR_BYTES == 32
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  // Rebias the exponent; subnormals (exponent 0) are small integers times 2^-24, and 31 means inf
  // or NaN.
  const Vec<uint32_t> u = widen_bits(bits), sign = (u & 0x8000u) << 16, body = u & 0x7fffu,
                      exponent = body >> 10;
  const Vec<uint32_t> normal = (body << 13) + ((127u - 15u) << 23);
  const Vec<uint32_t> tiny =
      bit_cast<Vec<uint32_t>>(__builtin_convertvector(body, Vec<float>) * 0x1p-24f);
  const Vec<uint32_t> special = (body << 13) | 0x7f800000u;
  const Vec<uint32_t> magnitude = exponent == 0 ? tiny : (exponent == 31 ? special : normal);
  return bit_cast<Vec<float>>(magnitude | sign);
#endif
}

LSTM_INLINE Half16 narrow(const Vec<float>& v, BFloat16) {
#ifdef LSTM_CPU_BFLOAT16_PAIRS
  return bit_cast<Half16>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
#else
  // Round to nearest even; a NaN keeps its top bits and stays quiet.
  const Vec<uint32_t> u = bit_cast<Vec<uint32_t>>(v);
  const Vec<uint32_t> rounded = (u + (((u >> 16) & 1u) + 0x7fffu)) >> 16;
  const Vec<uint32_t> quiet = (u >> 16) | 0x40u;
  const Vec<uint32_t> bits = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  return __builtin_convertvector(bits, Half16);
#endif
}

LSTM_INLINE Half16 narrow(const Vec<float>& v, Float16) {
#if LSTM_VECTOR_BYTES == 64
  return bit_cast<Half16>(_mm512_maskz_cvtps_ph(__mmask16(-1), bit_cast<__m512>(v),
                                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif LSTM_VECTOR_BYTES == 32
  return bit_cast<Half16>(
      _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Vec<uint32_t> u = bit_cast<Vec<uint32_t>>(v), sign = (u >> 16) & 0x8000u,
                      body = u & 0x7fffffffu;
  // Below 2^-14 the result is a multiple of 2^-24: adding 0.5 lets the float unit round it into the
  // low mantissa bits.
  const Vec<uint32_t> tiny =
      bit_cast<Vec<uint32_t>>(bit_cast<Vec<float>>(body) + 0.5f) - 0x3f000000u;
  const Vec<uint32_t> normal = (body + (((body >> 13) & 1u) + 0xfffu) - ((127u - 15u) << 23)) >> 13;
  const Vec<uint32_t> special =
      body > 0x7f800000u ? Vec<uint32_t>{} + 0x7e00u : Vec<uint32_t>{} + 0x7c00u;
  const Vec<uint32_t> magnitude =
      body >= 0x477ff000u ? special : (body < 0x38800000u ? tiny : normal);
  return __builtin_convertvector(magnitude | sign, Half16);
#endif
}

// ---- typed loads and stores: memory type S, compute type T --------------------------------------

template <class T, class S>
LSTM_INLINE Vec<T> load(const S* p, int n = kLanes<T>) {
  if constexpr (std::is_same_v<T, S>) {
    return load_lanes<Vec<T>>(p, n);
  } else {
    return widen(load_lanes<Half16>(reinterpret_cast<const uint16_t*>(p), n), S{});
  }
}

template <class T, class S>
LSTM_INLINE void store(S* p, const Vec<T>& v, int n = kLanes<T>) {
  if constexpr (std::is_same_v<T, S>) {
    store_lanes(p, v, n);
  } else {
    store_lanes(reinterpret_cast<uint16_t*>(p), narrow(v, S{}), n);
  }
}

// From element `at` on, of memory that is of type T if `wide`, else of type S.
template <class T, class S>
LSTM_INLINE Vec<T> load_either(const void* p, bool wide, int64_t at, int n) {
  return wide ? load<T>(static_cast<const T*>(p) + at, n)
              : load<T>(static_cast<const S*>(p) + at, n);
}

template <class T, class S>
LSTM_INLINE void store_either(void* p, bool wide, int64_t at, const Vec<T>& v, int n) {
  if (wide)
    store<T>(static_cast<T*>(p) + at, v, n);
  else
    store<T>(static_cast<S*>(p) + at, v, n);
}

// What is left of v after a trip through memory type S.
template <class T, class S>
LSTM_INLINE Vec<T> rounded(const Vec<T>& v) {
  if constexpr (std::is_same_v<T, S>) {
    return v;
  } else {
    return widen(narrow(v, S{}), S{});
  }
}

// ---- transpose of a square of lanes -------------------------------------------------------------

template <int Stage, class V, int... L>
LSTM_INLINE void exchange(V& a, V& b, std::integer_sequence<int, L...>) {
  constexpr int W = sizeof...(L);
  const V low = __builtin_shufflevector(a, b, ((L & Stage) ? W + L - Stage : L)...);
  const V high = __builtin_shufflevector(a, b, ((L & Stage) ? W + L : L + Stage)...);
  a = low;
  b = high;
}

template <int Stage, int W, class V>
LSTM_INLINE void transpose(V (&rows)[W]) {
  if constexpr (Stage < W) {
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      if (!(r & Stage))
        exchange<Stage>(rows[r], rows[r + Stage], std::make_integer_sequence<int, W>{});
    }
    transpose<2 * Stage>(rows);
  }
}

// Leaves in rows[0] the sums over the lanes of each of the W vectors.
template <int Stage, int W, class V>
LSTM_INLINE void add_across(V (&rows)[W]) {
  if constexpr (Stage < W) {
#pragma GCC unroll 16
    for (int r = 0; r < W; r += 2 * Stage) {
      exchange<Stage>(rows[r], rows[r + Stage], std::make_integer_sequence<int, W>{});
      rows[r] += rows[r + Stage];
    }
    add_across<2 * Stage>(rows);
  }
}

// ---- activations --------------------------------------------------------------------------------

template <class T>
struct MathConstants;
// 2^f - 1 = f p(f) for |f| <= 1/2; p fitted for least relative error: 7e-9 (float), 2e-17 (double).
template <>
struct MathConstants<float> {
  static constexpr float coefficient[] = {0.693147187683f,   0.240226485153f,   0.0555035814538f,
                                          0.00961844366003f, 0.00133904794817f, 0.000153374491108f};
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float to_integer =
      12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr int32_t mantissa = 23, bias = 127;
  static constexpr float sigmoid_limit = 87.0f,
                         tanh_limit = 10.0f;  // both functions are constant beyond
};
template <>
struct MathConstants<double> {
  static constexpr double coefficient[] = {
      0.69314718055994530942,     0.24022650695910098491,   0.055504108664821594483,
      0.0096181291076067151349,   0.0013333558146416842887, 0.00015403530442027068268,
      0.000015252733829991239541, 1.3215442410711871372e-6, 1.017806235138810327e-7,
      7.0726213565393493909e-9,   4.4549794711760614859e-10};
  static constexpr double log2e = 1.4426950408889634074;
  static constexpr double to_integer = 6755399441055744.0;
  static constexpr int64_t mantissa = 52, bias = 1023;
  static constexpr double sigmoid_limit = 708.0, tanh_limit = 20.0;
};

template <class T>
struct Math {
  using V = Vec<T>;
  using Constants = MathConstants<T>;
  using Int = typename Lanes<T>::Int;

  // 2^y = scale + scale * tail, for y below the largest exponent; in two parts so that 2^y - 1
  // loses nothing near zero.
  static LSTM_INLINE void exp2_parts(const V& y, V& scale, V& tail) {
    V f;
#if LSTM_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, float>) {
      const __m512 value = bit_cast<__m512>(y);
      const __m512 fraction =
          _mm512_maskz_reduce_ps(__mmask16(-1), value, _MM_FROUND_TO_NEAREST_INT);
      f = bit_cast<V>(fraction);
      scale =
          bit_cast<V>(_mm512_maskz_scalef_ps(__mmask16(-1), _mm512_set1_ps(1), value - fraction));
    } else
#endif
    {
      const V low = broadcast<T>(1 - T(Constants::bias)), bounded = y < low ? low : y;
      const V z = bounded + Constants::to_integer;
      f = bounded - (z - Constants::to_integer);
      scale = bit_cast<V>((bit_cast<Int>(z) << Constants::mantissa) +
                          (Constants::bias << Constants::mantissa));
    }
    constexpr int degree = sizeof(Constants::coefficient) / sizeof(T) - 1;
    V p = broadcast<T>(Constants::coefficient[degree]);
#pragma GCC unroll 16
    for (int k = degree - 1; k >= 0; --k) p = p * f + Constants::coefficient[k];
    tail = f * p;
  }

  // NaN passes through.
  static LSTM_INLINE V at_most(const V& x, T limit) {
    const V high = broadcast<T>(limit);
#if LSTM_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, float>) {
      return bit_cast<V>(
          _mm512_maskz_min_ps(__mmask16(-1), bit_cast<__m512>(high), bit_cast<__m512>(x)));
    }
#endif
    return x > high ? high : x;
  }
  static LSTM_INLINE V divide(const V& a, const V& b) {
#if LSTM_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, float>) {
      // 14 bits and one Newton step; the denominators here are finite and at least 1 in size.
      const V r = bit_cast<V>(_mm512_maskz_rcp14_ps(__mmask16(-1), bit_cast<__m512>(b)));
      return a * (r * (2 - b * r));
    }
#endif
    return a / b;
  }

  static LSTM_INLINE V sigmoid(const V& x) {
    constexpr T limit = Constants::log2e * Constants::sigmoid_limit;
    V scale, tail;
    exp2_parts(at_most(x * -Constants::log2e, limit), scale, tail);
    return divide(broadcast<T>(1), (1 + scale) + scale * tail);
  }

  // tanh(x) = (e - 1) / (e + 1) with e = exp(2x): right to a few ulp also for small x.
  static LSTM_INLINE V tanh(const V& x) {
    constexpr T limit = 2 * Constants::log2e * Constants::tanh_limit;
    V scale, tail;
    exp2_parts(at_most(x * (2 * Constants::log2e), limit), scale, tail);
    const V e = (scale - 1) + scale * tail;
    return divide(e, e + 2);
  }
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
