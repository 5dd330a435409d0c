// Operations of a whole warp: lanes leave their arguments, and the last to arrive runs it for all.
#include "collectives.hpp"

namespace lstm_cuda::emulation {

namespace {

// The operation that this lane takes part in: under way already, or new. Others may be under way:
// two halves of a warp that work by themselves need not reach a common operation together.
Collective& join(Warp& warp, const char* name, Collective::Run run, unsigned mask, unsigned lane,
                 const Site& at) {
  Collective* free = nullptr;
  for (const auto& pending : warp.pending) {
    Collective& c = *pending;
    if (!c.mask) free = &c;
    if (c.mask == mask) {
      if (c.run == run && same(c.site, at)) return c;
      fail(at, "divergent %s: other lanes wait at %s, %s:%u", name, c.name, file_of(c.site),
           c.site.line);
    }
    if (c.mask >> lane & 1 && c.arrived & mask)  // each would wait for the other
      fail(at, "%s: lanes wait with another mask at %s, %s:%u", name, c.name, file_of(c.site),
           c.site.line);
  }
  if (!free) {
    const Quiet quiet;
    free = warp.pending.emplace_back(std::make_unique<Collective>()).get();
  }
  free->mask = mask, free->arrived = 0;
  free->run = run, free->name = name, free->site = at;
  return *free;
}

}  // namespace

void collective(const char* name, Collective::Run run, void* argument, unsigned mask,
                const Site& at, bool orders_memory) {
  Fiber* me = self();
  Warp& warp = *me->warp;
  const unsigned lane = me->thread % kLanes;
  if (!(mask >> lane & 1)) fail(at, "%s: the calling lane is not in its mask", name);
  if (mask & warp.exited) fail(at, "%s: the mask names a lane that has exited", name);
  Collective& c = join(warp, name, run, mask, lane, at);
  c.arguments[lane] = argument;
  c.arrived |= 1u << lane;
  const Clock* clock = &c.clock[c.generation & 1];
  if (orders_memory) release(clock);
  if (c.arrived == mask) {
    if (run) run(c.arguments.data(), mask);
    c.mask = 0;
    ++c.generation;
    for (unsigned i = 0; i < kLanes; ++i)
      if (i != lane && mask >> i & 1) make_ready(warp.lanes + i);
    yield(name, at);
  } else {
    suspend(name, at);
  }
  if (orders_memory) acquire(clock);
}

void warp_sync(unsigned mask, Site at) {
  collective("warp_sync", nullptr, nullptr, mask, at, true);
}

namespace {

struct Exchange {
  std::uint64_t in, out;
  unsigned lane;  // whose `in` is wanted
};
Exchange& exchange(void* argument) { return *static_cast<Exchange*>(argument); }

void run_shuffle(void* const* arguments, unsigned mask) {
  for (unsigned i = 0; i < kLanes; ++i)
    if (mask >> i & 1)
      exchange(arguments[i]).out = exchange(arguments[exchange(arguments[i]).lane]).in;
}

void run_ballot(void* const* arguments, unsigned mask) {
  std::uint64_t votes = 0;
  for (unsigned i = 0; i < kLanes; ++i)
    if (mask >> i & 1) votes |= exchange(arguments[i]).in << i;
  for (unsigned i = 0; i < kLanes; ++i)
    if (mask >> i & 1) exchange(arguments[i]).out = votes;
}

// Lane 4r + q holds row r, columns 2q and 2q + 1 of the 8x8 matrix.
void run_movmatrix(void* const* arguments, unsigned) {
  const auto element = [&](unsigned row, unsigned column) {
    return exchange(arguments[4 * row + column / 2]).in >> 16 * (column % 2) & 0xFFFF;
  };
  for (unsigned i = 0; i < kLanes; ++i)
    exchange(arguments[i]).out = element(i % 4 * 2, i / 4) | element(i % 4 * 2 + 1, i / 4) << 16;
}

}  // namespace

std::uint64_t shuffle(std::uint64_t value, unsigned lane, unsigned mask, Site at) {
  Exchange e{value, 0, lane % kLanes};
  if (!(mask >> e.lane & 1)) fail(at, "shuffle: lane %u is not in the mask", e.lane);
  collective("shuffle", run_shuffle, &e, mask, at);
  return e.out;
}

unsigned ballot(bool predicate, unsigned mask, Site at) {
  Exchange e{predicate, 0, 0};
  collective("ballot", run_ballot, &e, mask, at);
  return static_cast<unsigned>(e.out);
}

std::uint32_t movmatrix(std::uint32_t v, Site at) {
  Exchange e{v, 0, 0};
  collective("movmatrix", run_movmatrix, &e, ~0u, at);
  return static_cast<std::uint32_t>(e.out);
}

}  // namespace lstm_cuda::emulation
