// What the launchers of kernels that run all steps have in common.
#pragma once

#include <optional>

#include "families.h"
#include "part.cuh"

namespace lstm_cuda {

// Launches a planned kernel by start(parts), which gives nothing if it is not compiled. What cannot be
// launched is said in words: a plan should not have asked for it.
template <class Start>
Status launch_planned(const char* kernel, const LayerShape& shape, Arithmetic arithmetic,
                      int padded_hidden, int columns, int blocks, Start start) {
  Status status;
  const int64_t parts = tiles_of(shape, columns) * shape.D;
  if (shape.projected) {
    std::snprintf(status.message, sizeof status.message, "%s has no projection", kernel);
  } else if (shape.H > padded_hidden) {
    std::snprintf(status.message, sizeof status.message,
                  "%s: a hidden size of %lld does not fit the planned %d", kernel,
                  (long long)shape.H, padded_hidden);
  } else if (shape.D > kMaxRecurrences || parts * blocks > kMostOfCta || shape.T > kMostOfCta) {
    std::snprintf(status.message, sizeof status.message,
                  "%s: %lld recurrences of %lld batch rows and %lld steps are more than one launch "
                  "takes",
                  kernel, (long long)shape.D, (long long)shape.B, (long long)shape.T);
  } else if (const std::optional<Status> started = start(unsigned(parts))) {
    return *started;
  } else {
    std::snprintf(status.message, sizeof status.message,
                  "%s has no kernel for %s with a padded hidden size of %d and %d batch rows",
                  kernel, name_of(arithmetic), padded_hidden, columns);
  }
  return status;
}

}  // namespace lstm_cuda
