// What the emulation itself promises: repeatable orders, launches that leave nothing behind, and
// what tests can set and see.
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"
#include "memory.hpp"

using namespace lstm_cuda;
using emulation::DeviceBuffer;
using emulation::Order;

namespace {

int failures = 0;
void check(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

struct Params {
  std::uint32_t* counter;
  std::uint32_t* out;
};

// out: in which order threads got past a barrier.
LSTM_KERNEL(64) arrivals(Params p) {
  ptx::block_sync();
  p.out[ptx::block_index() * 64 + ptx::thread_index()] = ptx::flag_add_release(p.counter, 1);
}

LSTM_KERNEL(32) ranks(Params p) {
  ptx::cluster_sync();
  if (ptx::thread_index() == 0) p.out[ptx::block_index()] = ptx::cluster_rank();
}

LSTM_KERNEL(32) stuck(Params p) { ptx::flag_wait_acquire(p.counter, 1u << 30); }

LSTM_KERNEL(32) deep(Params p) {
  volatile char room[300 << 10];  // more than a thread has
  for (unsigned i = sizeof room; i > 0; --i) room[i - 1] = 1;
  p.out[ptx::thread_index()] = std::uint32_t(room[0]);
}

LSTM_KERNEL(32) launches(Params p) {
  if (ptx::thread_index() > 0) return;
  const Status status = launch<arrivals>({"arrivals", 1, 64}, p, Stream{});
  p.out[0] = std::strstr(status.message, "inside a kernel") != nullptr;
}

std::vector<std::uint32_t> order_of(Order order, std::uint64_t seed) {
  emulation::settings().order = order;
  emulation::settings().seed = seed;
  const DeviceBuffer<std::uint32_t> counter(std::vector<std::uint32_t>{0}), out(256);
  const Status status =
      launch<arrivals>({"arrivals", 4, 64}, Params{counter.data(), out.data()}, {});
  check(status.ok(), "arrivals runs");
  return out.values();
}

void orders_repeat() {
  std::vector<std::uint32_t> straight(256);
  for (unsigned i = 0; i < 256; ++i) straight[i] = i;
  // All but the last to reach a barrier go on behind it, which in forward order comes after them.
  const auto forward = order_of(Order::forward, 1);
  check(forward[0] == 1 && forward[63] == 0 && forward[64 + 63] == 64, "forward order");
  const auto reverse = order_of(Order::reverse, 1);
  check(reverse[3 * 64] < 64 && reverse[0] >= 192, "reverse order takes the last block first");
  std::set<std::vector<std::uint32_t>> seen{forward, reverse};
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    const auto first = order_of(Order::random, seed);
    check(first == order_of(Order::random, seed), "a seed repeats its order");
    seen.insert(first);
  }
  check(seen.size() == 14, "each seed has its own order");
  emulation::settings() = {};
}

unsigned mappings() {
  std::ifstream maps("/proc/self/maps");
  unsigned lines = 0;
  for (std::string line; std::getline(maps, line);) ++lines;
  return lines;
}

void launches_leave_nothing() {
  const DeviceBuffer<std::uint32_t> counter(std::vector<std::uint32_t>{0}), out(256);
  const Params p{counter.data(), out.data()};
  const unsigned rounds = emulation::sanitized() ? 20 : 3000;
  unsigned before = 0;
  for (unsigned i = 0; i < rounds; ++i) {
    if (i == 10) before = mappings();
    check(launch<arrivals>({"arrivals", 4, 64}, p, {}).ok(), "one launch of many");
  }
  check(counter.values()[0] == rounds * 256, "every launch ran");
  check(mappings() <= before + 8 || emulation::sanitized(), "launches map no memory for good");
  struct sigaction handler;
  sigaction(SIGSEGV, nullptr, &handler);
  check(emulation::sanitized() || handler.sa_handler == SIG_DFL, "no signal handler is left");
}

// As many threads as the largest kernel has; more guarded stacks would be more mappings than a
// process may have. ThreadSanitizer knows 8000 threads at most.
void launches_may_be_large() {
  if (emulation::sanitized()) return;
  constexpr unsigned kBlocks = 512;
  const DeviceBuffer<std::uint32_t> counter(std::vector<std::uint32_t>{0}), out(kBlocks * 64);
  LaunchShape shape{"arrivals", kBlocks, 64};
  shape.cooperative = true;
  emulation::settings().resident_blocks = kBlocks;
  for (const Order order : {Order::forward, Order::reverse, Order::random}) {
    emulation::settings().order = order;
    check(launch<arrivals>(shape, Params{counter.data(), out.data()}, {}).ok(), "a large launch");
  }
  check(counter.values()[0] == 3 * kBlocks * 64, "all threads of large launches ran");
  emulation::settings() = {};
}

void failures_are_over() {
  const DeviceBuffer<std::uint32_t> counter(std::vector<std::uint32_t>{0}), out(256);
  const Params p{counter.data(), out.data()};
  for (int i = 0; i < 3; ++i) {
    const Status status = launch<stuck>({"stuck", 3, 32}, p, {});
    check(std::strstr(status.message, "deadlock") && std::strstr(status.message, "stuck"),
          "a deadlock is a failed launch, with its kernel's name");
    check(launch<arrivals>({"arrivals", 4, 64}, p, {}).ok(), "the next launch is none the worse");
  }
  if (emulation::sanitized()) return;            // it would end the process
  emulation::settings().order = Order::reverse;  // the last thread first, beside others' stacks
  LaunchShape larger{"arrivals", 2, 64};         // needs more stacks than any launch so far
  larger.cooperative = true;
  for (; larger.blocks <= 64; larger.blocks *= 4) {
    const DeviceBuffer<std::uint32_t> more(64 * larger.blocks);
    check(launch<arrivals>(larger, Params{counter.data(), more.data()}, {}).ok(),
          "a larger launch");
    const Status status = launch<deep>({"deep", 1, 32}, p, {});
    check(std::strstr(status.message, "invalid access to 0x"),
          "a stack that overflows is reported");
    check(std::strstr(status.message, "thread 31"), "and spoils no other");
  }
  check(launch<arrivals>({"arrivals", 4, 64}, p, {}).ok(), "and no more");
}

void tests_can_set_and_see() {
  const DeviceBuffer<std::uint32_t> counter(std::vector<std::uint32_t>{0}), out(256);
  const Params p{counter.data(), out.data()};
  auto& settings = emulation::settings();
  auto& list = emulation::launches();
  list.clear();
  check(launch<ranks>({"ranks", 0, 32}, p, {}).ok() && list.empty(), "no blocks, no launch");
  LaunchShape shape{"ranks", 16, 32, 0, 16};
  settings.cluster_limit = 8;
  check(!launch<ranks>(shape, p, {}).ok(), "a device may refuse clusters of 16 blocks");
  settings = {};
  check(launch<ranks>(shape, p, {}).ok() && out.values()[15] == 15, "or run them");
  settings.shared_limit = 99 * 1024;
  shape = {"arrivals", 1, 64, 100 * 1024};
  check(!launch<arrivals>(shape, p, {}).ok(), "the device's shared memory can be set");
  settings = {};
  shape = {"arrivals", 4, 64};
  shape.cooperative = true;
  settings.resident_blocks = 3;
  check(!launch<arrivals>(shape, p, {}).ok(), "and how many blocks are resident");
  settings = {};
  settings.refused = "arr";
  check(!launch<arrivals>(shape, p, {}).ok() && launch<ranks>({"ranks", 1, 32}, p, {}).ok(),
        "launches of some kernels can be refused");
  settings.spared = 1;
  check(launch<arrivals>({"arrivals", 1, 64}, p, {}).ok() &&
            !launch<arrivals>({"arrivals", 1, 64}, p, {}).ok() &&
            !launch<arrivals>({"arrivals", 1, 64}, p, {}).ok(),
        "from one of them on");
  settings = {};
  check(list.size() == 9 && list[1].cluster == 16 && !std::strcmp(list[5].kernel, "ranks"),
        "launches are listed");
  check(!launch<arrivals>({"arrivals", 1, 48}, p, {}).ok(), "blocks are whole warps");
  check(!launch<arrivals>({"arrivals", 3, 64, 0, 2}, p, {}).ok(), "grids are whole clusters");
  check(launch<launches>({"launches", 1, 32}, p, {}).ok() && out.values()[0] == 1,
        "a kernel cannot launch");
}

}  // namespace

int main() {
  orders_repeat();
  launches_leave_nothing();
  failures_are_over();
  tests_can_set_and_see();
  launches_may_be_large();
  std::printf(failures ? "%d failed\n" : "all hold\n", failures);
  return failures != 0;
}
