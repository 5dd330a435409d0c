// What happens to which batch row at which step: direction, lengths and resets, the same for
// forward and backward.
#pragma once

#include "../recurrence.h"

namespace lstm_cuda {

struct Schedule {
  int64_t T, B;
  bool reversed;
  const int64_t* lengths;  // [B] or null
  const uint8_t* reset;    // [T, B] or null

  int64_t length(int64_t b) const { return lengths ? lengths[b] : T; }
  bool active(int64_t t, int64_t b) const { return t < length(b); }

  // Step `index` in the order of the recurrence happens at this time.
  int64_t time(int64_t index) const { return reversed ? T - 1 - index : index; }

  // The step before t in the order of the recurrence, or -1 where the row starts from h0, c0.
  int64_t previous(int64_t t, int64_t b) const {
    if (!reversed) return t - 1;
    return t + 1 < length(b) ? t + 1 : -1;
  }
  // True if no state crosses into step t. reset[t] is a boundary between t-1 and t in either
  // direction.
  bool fresh(int64_t t, int64_t b) const {
    if (!reset) return false;
    if (!reversed) return reset[t * B + b];
    return t + 1 < length(b) && reset[(t + 1) * B + b];
  }
};

inline Schedule schedule_of(const LayerShape& shape, int64_t d, const int64_t* lengths,
                            const uint8_t* reset) {
  return {shape.T, shape.B, bool((shape.reversed >> d) & 1), lengths, reset};
}

}  // namespace lstm_cuda
