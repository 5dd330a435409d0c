// launch.h under emulation: a kernel has run to its end when launch() returns, or on a stream beside
// the caller's as late as may be: when that is joined (run_deferred).
#pragma once

#include <cstddef>
#include <cstdio>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "runtime/runtime.hpp"

namespace lstm_cuda {

struct Stream {
  bool beside = false;  // of a Fork; there is one other stream
};

namespace emulation {

struct Launched : LaunchShape {
  bool beside;
};

// What was launched since a test cleared the list, refused launches too.
inline std::vector<Launched>& launches() {
  static std::vector<Launched> list;
  return list;
}

// Launches beside the caller's stream that have not run yet.
inline std::vector<std::function<Status()>>& deferred() {
  static std::vector<std::function<Status()>> list;
  return list;
}
inline Status run_deferred() {
  Status status;
  for (const auto& start : std::exchange(deferred(), {}))
    if (status.ok()) status = start();
  return status;
}

}  // namespace emulation

template <auto kernel, class Params>
Status launch(const LaunchShape& shape, const Params& params, Stream stream) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4000);
  if (shape.blocks == 0) return {};
  emulation::launches().push_back({shape, stream.beside});
  Status status;
  const std::string& refused = emulation::settings().refused;
  unsigned& spared = emulation::settings().spared;
  if (!refused.empty() && std::string(shape.kernel).starts_with(refused) && spared-- == 0) {
    spared = 0;
    std::snprintf(status.message, sizeof status.message, "the launch of %s was refused",
                  shape.kernel);
    return status;
  }
  const auto start = [shape, params] {
    const auto entry = [](const void* from) {
      alignas(Params) std::byte copy[sizeof(Params)];
      emulation::copy_parameters(copy, from, sizeof copy);
      kernel(*reinterpret_cast<const Params*>(copy));
    };
    const std::string report =
        emulation::run({shape.blocks, shape.threads, shape.cluster, shape.shared_bytes,
                        shape.cooperative, shape.overlap},
                       entry, &params);
    Status status;
    if (!report.empty())
      std::snprintf(status.message, sizeof status.message, "the launch of %s failed: %s",
                    shape.kernel, report.c_str());
    return status;
  };
  if (!stream.beside) return start();
  emulation::deferred().push_back(start);
  return status;
}

}  // namespace lstm_cuda
