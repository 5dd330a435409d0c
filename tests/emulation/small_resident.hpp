// The kernels of families rec_cluster and rec_group in shapes of few threads, so that sanitizers and
// many orders are quick: what small_cluster.cpp and small_group.cpp share.
//   small_FAMILY ARITHMETIC ORDER SEED [CASE | FIRST/PARTS]
#pragma once

#include <algorithm>

#include "cuda/rec_backward.cuh"
#include "cuda/rec_forward.cuh"
#include "recurrence_run.hpp"

namespace lstm_cuda::test {

// Small<arithmetic, shape, tiles of a turn, turns>::get(plan, layer): the kernels of a family. Where an
// arithmetic may not have so many tiles, fewer.
template <template <Arithmetic, ResidentShape, int, int> class Small, ResidentShape shape,
          int tiles, int turns>
std::optional<Kernels> small_kernels(Arithmetic arithmetic, const LayerShape& layer) {
  return by_arithmetic(arithmetic, [&]<Arithmetic a>() -> std::optional<Kernels> {
    if constexpr (a == Arithmetic::float64) {
      return {};
    } else {
      CudaPlan plan{};
      plan.possible = true, plan.arithmetic = a, plan.resident = shape;
      constexpr int all = std::min(tiles, most_tiles(a, shape));
      return Small<a, shape, all / turns, turns>::get(plan, layer);
    }
  });
}

// Cases whose hidden size is at most 128, and at most 256; of 4 column tiles, and of 2; the last
// ones in two turns.
inline constexpr Case kSmallCases[] = {
    {7, 11, 2, 120, 0, 2, true, true, true, true},
    {6, 6, 1, 101, 0, 1, false, true, false, true},
    {7, 11, 1, 250, 0, 0, true, false, true, true, Inputs::usual, 2},
    {6, 17, 1, 200, 0, 1, false, true, true, false, Inputs::usual, 2},
    {6, 30, 1, 128, 0, 0, true, true, true, true, Inputs::usual, 4},
    {3, 3, 1, 97, 0, 0, false, false, true, true, Inputs::weights_differ},
    {3, 3, 1, 97, 0, 0, false, false, true, true, Inputs::tiny_weights},
    {3, 3, 1, 97, 0, 0, false, false, true, true, Inputs::denormal_weights},
    {3, 3, 1, 97, 0, 0, false, false, true, true, Inputs::saturated},
    {3, 3, 1, 97, 0, 0, false, false, true, true, Inputs::closed_output},
    {4, 3, 1, 97, 0, 0, false, false, true, true, Inputs::large_gradients},
    {4, 3, 1, 97, 0, 0, false, false, true, true, Inputs::tiny_gradients},
    {4, 5, 1, 97, 0, 1, true, false, true, true, Inputs::gradients_differ},
    {4, 5, 1, 97, 0, 0, false, false, true, true, Inputs::nan_row},
    {7, 13, 2, 125, 0, 2, true, true, true, true, Inputs::usual, 2, 1, 2},
    {6, 31, 1, 256, 0, 0, true, false, true, true, Inputs::usual, 4, 1, 2},
};

}  // namespace lstm_cuda::test
