// What rec_step needs before its first step, in one launch: weights in rows that products can read,
// rings filled with the initial state or zeros.
#pragma once

#include "families.h"

namespace lstm_cuda {

// Copies matrices [rows, gates * columns], converts them and pads them with zeros.
struct PrepareJob {
  enum class From { memory, compute, w_hh, w_hr };
  From from;
  const void* source;     // memory, or of compute: the first matrix (null: zeros), others following
  int64_t source_stride;  // elements, from matrix to matrix
  int64_t sources;        // matrices that have a source; further ones are filled with zeros
  int64_t row_stride, column_stride;  // elements; from gate to gate it is `columns` column strides
  int64_t rows, columns, gates;
  void* to;
  bool compute;                                   // as compute; otherwise as products read it
  int64_t matrices, padded_rows, padded_columns;  // written; padded_columns counts all gates
  int64_t pitch, gate_columns;                    // elements: from row to row, from gate to gate
};

struct Prepare {
  const void* w_hh[kMaxRecurrences];
  const void* w_hr[kMaxRecurrences];
  PrepareJob jobs[6];
  int count;
};

Status launch_prepare(const Prepare& p, Arithmetic arithmetic, Stream stream);

}  // namespace lstm_cuda
