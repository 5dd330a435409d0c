// Everything from outside that the kernels use, before any instruction set is switched on: a
// function of the standard library compiled for AVX-512 must not become the copy that the linker
// keeps for all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../plan.h"
#include "../recurrence.h"
#include "../schedule.h"
#include "arena.h"
#include "dispatch.h"
#include "parallel.h"
#include "team.h"
