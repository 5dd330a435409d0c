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
  int64_t chunk_steps(const LayerShape& s, int64_t rows) const {
    return std::min(s.T, std::max<int64_t>(1, chunk_rows / std::max<int64_t>(rows, 1)));
  }
};

CpuPlan plan_cpu(const LayerShape& shape, int threads, bool backward);

}  // namespace lstm_cuda
