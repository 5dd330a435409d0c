// Recurrences of other cells that variant_run.hpp runs: sizes, options, and what comes in.
#pragma once

#include "recurrence.h"

namespace lstm_cuda::test {

// What a case has besides the options of its cell.
enum Has : unsigned {
  kPeephole = 1,
  kNorm = 2,
  kScale = 4,
  kDrawn = 8,  // choices of zoneout; else their mean
  kLengths = 16,
  kReset = 32,
  kStates = 64,
  kGradients = 128,  // all that may come in, and go out
  kWide = 256,       // c0 and its like
};
inline constexpr unsigned kUsual = kLengths | kReset | kStates | kGradients;

struct VariantCase {
  struct {
    int64_t T, B, D, H;
    uint64_t reversed;
  } sizes;
  unsigned with;
  CellOptions cell;
  int tiles = 1;  // of a cluster

  bool has(unsigned what) const { return with & what; }
};

using enum Activation;

inline constexpr VariantCase kVariantCases[] = {
    {{4, 9, 2, 21, 2}, kUsual | kPeephole, {}},
    {{4, 9, 2, 37, 1},
     kUsual | kWide | kPeephole | kScale | kDrawn,
     {.clip = 0.4, .zoneout_h = 0.3, .zoneout_c = 0.4}},
    {{3, 3, 1, 5, 1}, kReset | kStates | kGradients, {.zoneout_h = 0.3, .zoneout_c = 0.2}},
    {{3, 17, 1, 64, 0}, kLengths | kGradients | kPeephole, {.forget = Forget::coupled}, 2},
    {{3, 3, 2, 37, 2},
     kReset | kStates | kScale,
     {.forget = Forget::none, .candidate = softsign, .output = relu, .clip = 0.7}},
    {{2, 9, 1, 100, 0},
     kLengths | kStates | kGradients,
     {.recurrent = hard_sigmoid_keras, .candidate = hard_tanh}},
    {{2, 1, 1, 21, 1},
     kStates | kGradients | kWide | kPeephole | kScale | kDrawn,
     {.recurrent = hard_sigmoid_onnx, .output = identity, .zoneout_c = 0.5}},
    {{3, 3, 1, 21, 0}, kStates | kGradients | kNorm, {}},
    {{4, 9, 2, 37, 2},
     kUsual | kWide | kNorm | kPeephole | kScale | kDrawn,
     {.clip = 0.6, .zoneout_h = 0.3, .zoneout_c = 0.4}},
    {{3, 17, 1, 64, 1},
     kLengths | kReset | kGradients | kNorm | kPeephole,
     {.forget = Forget::coupled, .zoneout_c = 0.3}},
    {{3, 3, 2, 5, 1},
     kLengths | kReset | kStates | kNorm | kScale | kDrawn,
     {.output = softsign, .zoneout_h = 0.4}},
    {{2, 9, 1, 100, 0}, kLengths | kStates | kGradients | kNorm, {.recurrent = hard_sigmoid_onnx}},
    {{2, 1, 1, 128, 1},
     kReset | kStates | kGradients | kNorm | kPeephole | kDrawn,
     {.zoneout_h = 0.5}},
    // As much as possible again, in a size that is there in float64.
    {{4, 9, 2, 27, 1},
     kUsual | kPeephole | kScale | kDrawn,
     {.clip = 0.4, .zoneout_h = 0.3, .zoneout_c = 0.4}},
    {{4, 9, 2, 27, 2},
     kUsual | kNorm | kPeephole | kScale,
     {.forget = Forget::coupled, .clip = 0.6, .zoneout_h = 0.3, .zoneout_c = 0.4}},
    // Two tiles of a cluster; and wider ones.
    {{4, 9, 2, 100, 2}, kUsual | kPeephole, {}, 2},
    {{3, 17, 1, 37, 0}, kUsual | kScale | kDrawn, {.zoneout_h = 0.3, .zoneout_c = 0.4}, 2},
    {{4, 5, 1, 129, 1}, kReset, {.forget = Forget::coupled, .zoneout_h = 0.3}},
    {{3, 9, 1, 256, 0},
     kUsual | kScale,
     {.forget = Forget::none, .recurrent = hard_sigmoid_onnx, .candidate = softsign},
     2},
    {{3, 9, 1, 333, 1},
     kUsual | kPeephole | kScale | kDrawn,
     {.forget = Forget::coupled, .clip = 0.4, .zoneout_h = 0.5, .zoneout_c = 0.5},
     2},
    {{3, 17, 1, 256, 0}, kLengths | kNorm, {.output = softsign, .zoneout_h = 0.5}},
    {{3, 3, 1, 400, 0},
     kReset | kStates | kGradients | kWide | kNorm | kPeephole,
     {.clip = 0.3, .zoneout_h = 0.3, .zoneout_c = 0.4}},
    {{3, 1, 1, 129, 1}, kStates | kGradients | kNorm | kScale, {.forget = Forget::none}},
};

}  // namespace lstm_cuda::test
