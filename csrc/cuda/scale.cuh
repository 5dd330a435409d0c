// Powers of two that fit float32 operands into float16.
//
// A row (of what is not summed over) is multiplied by the power of two that brings its largest finite
// value to [2^14, 2^15): 29 powers of two below that keep all of float16's bits, as many as TF32 has.
// The power's exponent is kept in -126 .. 126, so that it and its inverse are floats. What is not
// finite has no say in it.
#pragma once

#include <cstring>

#include "ptx.cuh"

namespace lstm_cuda {

// The bits of |v|, which are in the order of the sizes; 0 where v is not finite.
LSTM_DEVICE unsigned finite_size(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits &= 0x7FFFFFFFu;
  return bits < 0x7F800000u ? bits : 0;
}

// 2^exponent; -126 .. 127.
LSTM_DEVICE float power_of_two(int exponent) {
  const unsigned bits = unsigned(exponent + 127) << 23;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Of a row whose largest size is this, as bits. Its exponent field is 0 for numbers below 2^-126, which
// the clamp brings where it brings all below 2^-112.
LSTM_DEVICE int clamped_exponent(unsigned largest) {
  const int exponent = 14 + 127 - int(largest >> 23);
  return exponent < 126 ? exponent : 126;
}

// The same, where a row of zeros is to be left as it is.
LSTM_DEVICE int scale_exponent(unsigned largest) {
  return largest == 0 ? 0 : clamped_exponent(largest);
}

}  // namespace lstm_cuda
