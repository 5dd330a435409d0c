#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace lstm_cuda {
namespace {

constexpr int kDevices = 64;
std::atomic<int> forced{-1};
std::atomic<int> refused[kDevices];  // bit k: Family k

}  // namespace

bool force_kernel(const char* name) {
  if (*name == 0) {
    forced = -1;
    return true;
  }
  for (Family family : kFamilies) {
    if (std::strcmp(name, name_of(family)) == 0) {
      forced = int(family);
      return true;
    }
  }
  return false;
}

const char* forced_kernel() {
  const int family = forced;
  return family < 0 ? "" : name_of(Family(family));
}

CudaRequest cuda_request(int device, bool allow_tf32, bool backward) {
  const int seen = device >= 0 && device < kDevices ? refused[device].load() : 0;
  return {allow_tf32, backward, forced, seen};
}

void remember_refusal(int device, Family family) {
  if (device >= 0 && device < kDevices) refused[device] |= 1 << int(family);
}

}  // namespace lstm_cuda
