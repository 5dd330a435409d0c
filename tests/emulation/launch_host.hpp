// launch.h under emulation: a kernel has run to its end when launch() returns.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>
#include <type_traits>
#include <vector>

#include "runtime/runtime.hpp"

namespace lstm_cuda {

struct Stream {};  // there is one, and all work on it is done at once

namespace emulation {

// What was launched since a test cleared the list, refused launches too.
inline std::vector<LaunchShape>& launches() {
  static std::vector<LaunchShape> list;
  return list;
}

}  // namespace emulation

template <auto kernel, class Params>
Status launch(const LaunchShape& shape, const Params& params, Stream) {
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4000);
  if (shape.blocks == 0) return {};
  emulation::launches().push_back(shape);
  Status status;
  const std::string& refused = emulation::settings().refused;
  unsigned& spared = emulation::settings().spared;
  if (!refused.empty() && std::string(shape.kernel).starts_with(refused) && spared-- == 0) {
    spared = 0;
    std::snprintf(status.message, sizeof status.message, "the launch of %s was refused",
                  shape.kernel);
    return status;
  }
  const auto entry = [](const void* from) {
    alignas(Params) std::byte copy[sizeof(Params)];
    emulation::copy_parameters(copy, from, sizeof copy);
    kernel(*reinterpret_cast<const Params*>(copy));
  };
  const std::string report = emulation::run({shape.blocks, shape.threads, shape.cluster,
                                             shape.shared_bytes, shape.cooperative, shape.overlap},
                                            entry, &params);
  if (!report.empty())
    std::snprintf(status.message, sizeof status.message, "the launch of %s failed: %s",
                  shape.kernel, report.c_str());
  return status;
}

}  // namespace lstm_cuda
