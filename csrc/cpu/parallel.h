// How kernels ask for threads without knowing whose they are.
#pragma once

#include <cstdint>
#include <type_traits>

namespace lstm_cuda {

struct Parallel {
  int threads;
  // Runs task(context, index) for every index below count, possibly at the same time, and waits for
  // all.
  void (*run)(int64_t count, void (*task)(void* context, int64_t index), void* context);

  template <class F>
  void for_each(int64_t count, F&& body) const {
    if (threads == 1 || count <= 1) {
      for (int64_t index = 0; index < count; ++index) body(index);
      return;
    }
    run(
        count,
        [](void* context, int64_t index) {
          (*static_cast<std::remove_reference_t<F>*>(context))(index);
        },
        &body);
  }
};

}  // namespace lstm_cuda
