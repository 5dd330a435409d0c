// Which way a layer is run, from its sizes alone: pure functions, no launching.
#pragma once

#include <algorithm>

#include "recurrence.h"

namespace lstm_cuda {

enum class Weights {
  packed,             // once a call, shared by all workers
  packed_on_the_way,  // by each worker, a group of hidden units at a time: used once, so not kept
  unpacked,           // read where they are
};

struct CpuPlan {
  int workers;             // threads that are of use
  bool in_step;            // all workers share each step; otherwise each takes a part of the batch
  int64_t parts;           // ranges of batch rows
  Weights input;           // w_ih in the forward pass
  Weights recurrent;       // w_hh in the forward pass
  bool input_within_step;  // x w_ih^T belongs to the step, not to a chunk of steps before it
  int64_t chunk_rows;      // time steps times batch rows of a part that are multiplied together

  int64_t first_row(int64_t part, int64_t B) const { return part * B / parts; }
  // Steps of a chunk, a multiple of those whose weight gradients are summed by themselves. Long sums
  // go in such spans so that rounding errors grow with the number of spans, not of terms. Both are
  // counted from the first step of a sequence.
  int64_t chunk_steps(int64_t rows) const {
    return most_steps(rows) / span_steps(rows) * span_steps(rows);
  }
  int64_t span_steps(int64_t rows) const {
    const int64_t steps = most_steps(rows);
    return std::max<int64_t>(1, steps / std::max<int64_t>(1, (steps * rows + 511) / 512));
  }

 private:
  int64_t most_steps(int64_t rows) const {
    return std::max<int64_t>(1, chunk_rows / std::max<int64_t>(rows, 1));
  }
};

// What results depend on is chosen by the whole sequence.
CpuPlan plan_cpu(const LayerShape& shape, int threads, bool backward, Others others = {});

}  // namespace lstm_cuda
