#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace lstm_cuda {
namespace {

struct Capability {
  const char* name;
  bool supported;
  const CpuKernels* kernels;
};

const Capability* capabilities(int* count) {
  static const Capability table[] = {
      {"generic", true, &generic::kernels},
#if defined(__x86_64__)
      {"avx2",
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c"),
       &avx2::kernels},
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
       &avx512::kernels},
      {"avx512_bf16",
       __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
       &avx512_bf16::kernels},
#endif
  };
  *count = int(sizeof(table) / sizeof(table[0]));
  return table;
}

// The widest supported one that is not past `name` in the table; null if there is no such name.
const Capability* widest(const char* name) {
  int count;
  const Capability* table = capabilities(&count);
  const Capability* best = nullptr;
  for (int k = 0; k < count; ++k) {
    if (table[k].supported) best = &table[k];
    if (name && std::strcmp(table[k].name, name) == 0) return best;
  }
  return name ? nullptr : best;
}

std::atomic<const Capability*>& chosen() {
  static std::atomic<const Capability*> capability{[] {
    const Capability* asked = widest(std::getenv("LSTM_CUDA_CPU_CAPABILITY"));
    return asked ? asked : widest(nullptr);
  }()};
  return capability;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *chosen().load()->kernels; }

int cpu_capability_count() {
  int count;
  capabilities(&count);
  return count;
}

const char* cpu_capability_name(int index) {
  int count;
  return capabilities(&count)[index].name;
}

const char* cpu_capability() { return chosen().load()->name; }

bool set_cpu_capability(const char* name) {
  const Capability* asked = widest(name);
  if (asked) chosen() = asked;
  return asked != nullptr;
}

}  // namespace lstm_cuda
