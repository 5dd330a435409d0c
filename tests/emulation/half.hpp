// float16 by arithmetic of its own, for what conversions are compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace lstm_cuda::test {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The number of a float16's bits, and the float16 nearest to a number, ties to even.
inline double from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? std::nan("") : sign * kInfinity;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}
inline double round_to_half(double v) {
  if (!std::isfinite(v) || v == 0) return v;
  const int last = std::max(std::ilogb(v), -14) - 10;  // the last place's power of two
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(v, -last)), last);
  return std::fabs(rounded) > 65504 ? std::copysign(kInfinity, v) : rounded;
}

}  // namespace lstm_cuda::test
