#pragma once

#include "state.hpp"

namespace lstm_cuda::emulation {

// Waits for all lanes of the mask, and returns when `run` has been called with what each gave as
// its argument. Memory is ordered by warp_sync alone: the hardware promises no more.
void collective(const char* name, Collective::Run run, void* argument, unsigned mask,
                const Site& at, bool orders_memory = false);

}  // namespace lstm_cuda::emulation
