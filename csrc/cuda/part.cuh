// Which part of a layer a block, cluster or group of blocks runs: one recurrence of a tile of batch
// rows, for all steps.
#pragma once

#include "../schedule.h"
#include "ptx.cuh"

namespace lstm_cuda {

// The rows are the columns of all matrices. The schedule ends with the longest of them.
struct Part {
  int d;
  int rows;    // of the tile's columns, those that are in the batch
  int64_t b0;  // the first of them
  Schedule schedule;

  LSTM_DEVICE int64_t b(int column) const { return b0 + column; }

  LSTM_DEVICE int length(int column) const {
    return column < rows ? int(schedule.length(b(column))) : 0;
  }
  // The first step of a row of this length.
  LSTM_DEVICE int first(int row_length) const {
    return int(Schedule{row_length, 1, schedule.reversed, nullptr, nullptr}.first(0));
  }
  // Bit j: column + j has this step, and no state crosses into it.
  LSTM_DEVICE unsigned fresh(int step, int64_t t, int column, const int (&length)[2]) const {
    unsigned bits = 0;
    if (schedule.reset && step < schedule.T) {
      LSTM_UNROLL
      for (int j = 0; j < 2; ++j)
        if (t < length[j]) bits |= unsigned(schedule.fresh(t, b(column + j))) << j;
    }
    return bits;
  }
  // Of row (t, b, d) in [T, B, D, ...].
  LSTM_DEVICE int64_t row(const LayerShape& shape, int64_t t, int64_t b) const {
    return (t * shape.B + b) * shape.D + d;
  }
};

LSTM_HOST_DEVICE int64_t tiles_of(const LayerShape& shape, int columns) {
  return (shape.B + columns - 1) / columns;
}

// Parts are numbered recurrence by recurrence, tile by tile.
LSTM_DEVICE Part part_of(const LayerShape& shape, const int64_t* lengths, const uint8_t* reset,
                         unsigned number, int columns) {
  const unsigned tiles = unsigned(tiles_of(shape, columns));
  Part part{int(number / tiles), columns, int64_t(number % tiles) * columns, {}};
  if (part.b(columns) > shape.B) part.rows = int(shape.B - part.b0);
  part.schedule = schedule_of(shape, part.d, lengths, reset);
  if (lengths) {
    int64_t longest = 0;
    for (int column = 0; column < part.rows; ++column) {
      const int64_t length = part.schedule.length(part.b(column));
      longest = length > longest ? length : longest;
    }
    part.schedule.T = longest;
  }
  return part;
}

}  // namespace lstm_cuda
