// Products of float32 matrices on the tensor cores of float16, to the precision of TF32.
//
// torch multiplies float32 matrices exactly unless its user says otherwise, and has no way to ask for
// TF32 in one call. A float16 has as many bits of fraction as TF32, so where TF32 is allowed operands
// are converted to it, each row of what is not summed over scaled by a power of two (scale.cuh); torch
// multiplies them with sums in float32, and the sums are scaled back in place.
//
// What this does not keep is a value more than 2^39 below the largest of its row: it is taken for zero,
// and 2^29 below that it begins to lose bits. TF32 would keep it. It matters only to a product whose
// other operand is as much larger there.
#pragma once

#include <atomic>
#include <cstdint>

#include "../host_device.h"
#include "launch.h"

namespace lstm_cuda {

// A float32 matrix. Row r begins at from + r / inner * outer_stride + r % inner * inner_stride;
// elements of a row are neighbours.
struct Matrix {
  const float* from;
  int64_t rows, columns;
  int64_t inner, outer_stride, inner_stride;
};

// float16 rows are padded to this many elements: 16 bytes, without which tensor cores are fed slowly.
constexpr int64_t kScaledMultiple = 8;
LSTM_HOST_DEVICE constexpr int64_t padded(int64_t n) {
  return (n + kScaledMultiple - 1) / kScaledMultiple * kScaledMultiple;
}

// One to convert, and where to.
struct ScaledOperand {
  Matrix matrix;
  void* to;          // float16; see scale_rows, scale_columns
  int* exponents;    // of the scales: of each row, or of each column
  unsigned* maxima;  // for scale_columns: column_maxima(matrix) numbers that it uses
};
constexpr int kMaxScaledOperands = 8;

// A matrix that is summed over its columns: a scale for each row. to: [rows, padded(columns)], zeros
// past the columns. One launch for all.
Status scale_rows(const ScaledOperand* operands, int count, Stream stream);

// A matrix that is summed over its rows: a scale for each column. to: [padded(rows), padded(columns)],
// zeros past rows and columns. Two launches for all.
Status scale_columns(const ScaledOperand* operands, int count, Stream stream);
int64_t column_maxima(const Matrix& matrix);

// What a product of two scaled operands gave, [batches, rows, columns] without gaps or, side by side,
// [rows, batches, columns], becomes the product of what they were converted from, plus a bias (null:
// none).
struct ScaledProduct {
  float* values;
  int64_t batches, rows, columns;
  const int* row_exponents;     // [batches, rows] or, side by side, [rows, batches]
  const int* column_exponents;  // [batches, columns]
  const float* bias;            // [batches, columns]
  bool side_by_side = false;
};
Status unscale(const ScaledProduct& product, Stream stream);

// Whether it pays to multiply [rows, depth] by [depth, columns] like this, in so many batches at once.
// Estimated, not measured: exact float32 runs at some 50 TFLOP/s and this at 10 times that, but
// conversions and scaling back move 8 bytes for each result and 6 to 10 for each operand, at some
// 3 TB/s, in three launches of 2 to 3 us. Below 128 in any one size memory takes all of the gain, and
// below 2^28 multiply-adds, 10 us, launches do.
bool worth_scaling(int64_t rows, int64_t columns, int64_t depth, int64_t batches = 1);

// torch refused to multiply float16 into float32, as it does while its user asks for sums in float16
// (torch.backends.cuda.matmul.allow_fp16_accumulation). It is not asked again in this process: each
// refusal costs an exception and an entry in torch's log.
inline std::atomic<bool> scaling_refused = false;

#if defined(LSTM_EMULATE)
namespace emulation {
// For tests, which have time for small products only.
inline bool scale_all_products = false;
// Has torch refuse.
inline bool refuse_scaled_products = false;
}  // namespace emulation
#endif

}  // namespace lstm_cuda
