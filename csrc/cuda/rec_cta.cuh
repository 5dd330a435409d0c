// What the launchers of family rec_cta's two kernels share.
#pragma once

#include "launcher.cuh"
#include "rec_cta_product.cuh"

namespace lstm_cuda::rec_cta {

// start<arithmetic, padded hidden size>(parts), if the plan's is compiled: where the weights fit the
// registers of one block.
template <CellKind cell, bool backward, class Start>
Status launch_planned(const char* kernel, const LayerShape& shape, const CudaPlan& plan,
                      Start start) {
  const auto by_size = [&](unsigned parts) {
    return by_arithmetic(plan.arithmetic, [&]<Arithmetic a>() -> std::optional<Status> {
      constexpr int widest = widest_cta(a, cell, backward);
      if (plan.padded_hidden == 32) return start.template operator()<a, 32>(parts);
      if constexpr (widest >= 64)
        if (plan.padded_hidden == 64) return start.template operator()<a, 64>(parts);
      if constexpr (widest >= 128)
        if (plan.padded_hidden == 128) return start.template operator()<a, 128>(parts);
      return {};
    });
  };
  return lstm_cuda::launch_planned(kernel, shape, plan.arithmetic, plan.padded_hidden, kColumns, 1,
                                   by_size);
}

}  // namespace lstm_cuda::rec_cta
