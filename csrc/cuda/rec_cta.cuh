// What the forward and the backward kernel of family rec_cta share, beside their product: the ring of
// input rows, and what a launch can hold.
#pragma once

#include "families.h"
#include "part.cuh"
#include "rec_cta_product.cuh"

namespace lstm_cuda::rec_cta {

inline constexpr int kSlots = 4;  // of a ring: inputs are fetched kSlots - 1 steps ahead

// A ring of input rows: for each of kSlots steps one row of up to kWidth values for each column.
// Threads share out the columns; the 16 bytes between rows keep the columns' banks apart.
template <class Value, int kWidth, int kThreads>
struct RowRing {
  static constexpr int kPerChunk = 16 / sizeof(Value);
  static constexpr int kPitch = kWidth + kPerChunk;
  static constexpr int kSlotValues = kColumns * kPitch;
  static constexpr int kValues = kSlots * kSlotValues;
  static constexpr int kThreadsOfColumn = kThreads / kColumns;

  Value* values;
  int width;     // of the rows in global memory
  bool aligned;  // these begin at multiples of 16 bytes, and so end

  LSTM_DEVICE RowRing(ptx::Shared& shared, const void* rows, int row_width)
      : values(shared.take<Value>(kValues, 16)),
        width(row_width),
        aligned((reinterpret_cast<uintptr_t>(rows) | unsigned(row_width) * sizeof(Value)) % 16 ==
                0) {}

  static LSTM_DEVICE int column_to_fetch() { return int(ptx::thread_index()) / kThreadsOfColumn; }

  // Begins to copy this thread's share of its column's row; to be waited for like cp.async. Rows
  // that are not aligned are copied at once.
  LSTM_DEVICE void fetch(unsigned step, const Value* row) const {
    Value* to = values + step % kSlots * kSlotValues + column_to_fetch() * kPitch;
    LSTM_UNROLL
    for (int i = 0; i < kWidth; i += kThreadsOfColumn * kPerChunk) {
      const int k = i + int(ptx::thread_index()) % kThreadsOfColumn * kPerChunk;
      if (k >= width) continue;
      if (aligned) {
        ptx::cp_async16(to + k, row + k);
      } else {
        LSTM_UNROLL
        for (int e = 0; e < kPerChunk; ++e)
          if (k + e < width) to[k + e] = row[k + e];
      }
    }
  }

  LSTM_DEVICE Value at(unsigned step, int column, int k) const {
    return values[step % kSlots * kSlotValues + column * kPitch + k];
  }
};

inline Status unsupported(const char* kernel, const CudaPlan& plan) {
  Status status;
  std::snprintf(status.message, sizeof status.message,
                "%s has no kernel for %s with a padded hidden size of %d", kernel,
                name_of(plan.arithmetic), plan.padded_hidden);
  return status;
}

// What one launch cannot hold, or empty.
inline Status check(const char* kernel, const LayerShape& shape, const CudaPlan& plan) {
  Status status;
  const int64_t blocks = tiles_of(shape, kColumns) * shape.D;
  if (shape.projected)
    std::snprintf(status.message, sizeof status.message, "%s has no projection", kernel);
  else if (shape.H > plan.padded_hidden)
    std::snprintf(status.message, sizeof status.message,
                  "%s: a hidden size of %lld does not fit the planned %d", kernel,
                  (long long)shape.H, plan.padded_hidden);
  else if (shape.D > kMaxRecurrences || blocks > kMostOfCta || shape.T > kMostOfCta)
    std::snprintf(status.message, sizeof status.message,
                  "%s: %lld recurrences of %lld batch rows and %lld steps are more than one launch "
                  "takes",
                  kernel, (long long)shape.D, (long long)shape.B, (long long)shape.T);
  return status;
}

inline unsigned blocks_of(const LayerShape& shape) {
  return unsigned(tiles_of(shape, kColumns) * shape.D);
}

}  // namespace lstm_cuda::rec_cta
