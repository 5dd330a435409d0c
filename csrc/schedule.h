// What happens to which batch row at which step: direction, lengths and resets, the same for
// forward and backward and for every device.
#pragma once

#include "host_device.h"
#include "recurrence.h"

namespace lstm_cuda {

struct Schedule {
  int64_t T, B;
  bool reversed;
  const int64_t* lengths;  // [B] or null
  const uint8_t* reset;    // [T, B] or null

  // Clamped: where the values are not on the host, nobody has looked at them.
  LSTM_HOST_DEVICE int64_t length(int64_t b) const {
    if (!lengths) return T;
    const int64_t length = lengths[b];
    return length < 0 ? 0 : length < T ? length : T;
  }
  LSTM_HOST_DEVICE bool active(int64_t t, int64_t b) const { return t < length(b); }

  // Step `index` in the order of the recurrence happens at this time.
  LSTM_HOST_DEVICE int64_t time(int64_t index) const { return reversed ? T - 1 - index : index; }

  // The row's first and its last step in the order of the recurrence; only for rows of length > 0.
  LSTM_HOST_DEVICE int64_t first(int64_t b) const { return reversed ? length(b) - 1 : 0; }
  LSTM_HOST_DEVICE int64_t last(int64_t b) const { return reversed ? 0 : length(b) - 1; }

  // The step before t in the order of the recurrence, or -1 where the row starts from h0, c0.
  LSTM_HOST_DEVICE int64_t previous(int64_t t, int64_t b) const {
    if (!reversed) return t - 1;
    return t + 1 < length(b) ? t + 1 : -1;
  }
  // The step after t in the order of the recurrence, or -1 where t is the row's last.
  LSTM_HOST_DEVICE int64_t next(int64_t t, int64_t b) const {
    if (reversed) return t - 1;
    return t + 1 < length(b) ? t + 1 : -1;
  }
  // True if no state crosses into step t. reset[t] is a boundary between t-1 and t in either
  // direction.
  LSTM_HOST_DEVICE bool fresh(int64_t t, int64_t b) const {
    const uint8_t* const boundary = boundary_before(t, b);
    return boundary && *boundary;
  }
  // Where `fresh` looks: who loads it ahead need not wait at once. Null if there is no boundary.
  LSTM_HOST_DEVICE const uint8_t* boundary_before(int64_t t, int64_t b) const {
    if (!reset) return nullptr;
    if (!reversed) return reset + t * B + b;
    return t + 1 < length(b) ? reset + (t + 1) * B + b : nullptr;
  }
};

LSTM_HOST_DEVICE Schedule schedule_of(const LayerShape& shape, int64_t d, const int64_t* lengths,
                                      const uint8_t* reset) {
  return {shape.T, shape.B, bool((shape.reversed >> d) & 1), lengths, reset};
}

}  // namespace lstm_cuda
