#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace lstm_cuda {
namespace {

constexpr int kDevices = 64;
struct Choice {
  int32_t family = -1;
  int16_t columns = 0, turns = 0;
};
std::atomic<Choice> forced{};
static_assert(std::atomic<Choice>::is_always_lock_free);
std::atomic<int> refused[kDevices];  // bit k: Family k

}  // namespace

bool force_kernel(const Forced& wanted) {
  if (*wanted.name == 0) {
    forced = Choice{};
    return true;
  }
  for (Family family : kFamilies) {
    if (std::strcmp(wanted.name, name_of(family)) == 0) {
      forced = Choice{int32_t(family), int16_t(wanted.columns), int16_t(wanted.turns)};
      return true;
    }
  }
  return false;
}

Forced forced_kernel() {
  const Choice choice = forced;
  return {choice.family < 0 ? "" : name_of(Family(choice.family)), choice.columns, choice.turns};
}

CudaRequest cuda_request(int device, bool allow_tf32, bool backward) {
  const int seen = device >= 0 && device < kDevices ? refused[device].load() : 0;
  const Choice choice = forced;
  return {allow_tf32, backward, choice.family, seen, choice.columns, choice.turns};
}

void remember_refusal(int device, Family family) {
  if (device >= 0 && device < kDevices) refused[device] |= 1 << int(family);
}

}  // namespace lstm_cuda
