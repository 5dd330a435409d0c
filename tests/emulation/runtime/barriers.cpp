// Barriers of blocks, clusters and grids, and barriers in shared memory.
#include "state.hpp"

namespace lstm_cuda::emulation {

namespace {

// Counts this thread; the phase to wait for.
unsigned arrive(Barrier& barrier, const Site& at) {
  if (barrier.arrived == 0) barrier.first = at;
  const unsigned phase = barrier.phase;
  release(&barrier.clock[phase & 1]);
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.phase;
    barrier.waiting.wake_all();
  }
  return phase;
}

void await(Barrier& barrier, unsigned phase, const Site& at) {
  if (barrier.phase == phase) {
    barrier.waiting.push(self());
    suspend(barrier.name, at);
  } else {
    yield(barrier.name, at);
  }
  acquire(&barrier.clock[phase & 1]);
}

// A barrier that all threads reach together: at one line, and none has left.
void check_together(const Barrier& barrier, unsigned live, const Site& at) {
  if (barrier.expected != live) fail(at, "%s after a thread has exited", barrier.name);
  if (barrier.arrived && !same(barrier.first, at))
    fail(at, "divergent %s: other threads wait at %s:%u", barrier.name, file_of(barrier.first),
         barrier.first.line);
}

Barrier& named(const char* name, unsigned id, unsigned threads, const Site& at) {
  if (id == 0 || id >= kNamedBarriers || threads == 0 || threads % kLanes ||
      threads > current->threads)
    fail(at, "%s: no barrier %u of %u threads", name, id, threads);
  Barrier& barrier = self()->home->named[id];
  if (barrier.arrived && barrier.expected != threads)
    fail(at, "%s: %u threads here, %u at %s:%u", name, threads, barrier.expected,
         file_of(barrier.first), barrier.first.line);
  barrier.name = "named_sync";
  barrier.expected = threads;
  return barrier;
}

}  // namespace

void block_sync(Site at) {
  Block& block = *self()->home;
  check_together(block.barrier, block.live, at);
  await(block.barrier, arrive(block.barrier, at), at);
}

void named_sync(unsigned id, unsigned threads, Site at) {
  Barrier& barrier = named("named_sync", id, threads, at);
  await(barrier, arrive(barrier, at), at);
}

void named_arrive(unsigned id, unsigned threads, Site at) {
  arrive(named("named_arrive", id, threads, at), at);
  yield("named_arrive", at);
}

void cluster_arrive(Site at) {
  Fiber* me = self();
  unsigned live = 0;
  for (const Block* block : me->home->cluster->blocks) live += block->live;
  Barrier& barrier = me->home->cluster->barrier;
  check_together(barrier, live, at);
  if (me->in_cluster_barrier) fail(at, "cluster_arrive twice without cluster_wait");
  me->in_cluster_barrier = true;
  me->cluster_phase = arrive(barrier, at);
}

void cluster_wait(Site at) {
  Fiber* me = self();
  if (!me->in_cluster_barrier) fail(at, "cluster_wait without cluster_arrive");
  me->in_cluster_barrier = false;
  await(me->home->cluster->barrier, me->cluster_phase, at);
}

void grid_sync(Site at) {
  if (!launched->launch.cooperative) fail(at, "grid_sync in a launch that is not cooperative");
  check_together(*launched->grid, launched->live, at);
  deliver_words();
  await(*launched->grid, arrive(*launched->grid, at), at);
}

// ---- barriers in shared memory ----

namespace {

void complete_phase(MBarrier& bar) {
  if (bar.pending || bar.bytes) return;
  bar.pending = bar.arrivals;
  ++bar.phase;
  bar.waiting.wake_all();
}

void count_arrival(MBarrier& bar, unsigned bytes, const char* name, const Site& at) {
  if (bar.pending == 0) fail(at, "%s: more arrivals in a phase than mbarrier_init announced", name);
  release(&bar.clock[bar.phase & 1]);
  bar.bytes += bytes;
  --bar.pending;
  complete_phase(bar);
  yield(name, at);
}

}  // namespace

void count_bytes(MBarrier& bar, std::int64_t bytes) {
  bar.bytes -= bytes;
  complete_phase(bar);
}

MBarrier& find_mbarrier(const void* bar, const char* name, const Site& at) {
  for (Block* block : self()->home->cluster->blocks) {
    if (!block->holds(bar)) continue;
    const auto found = block->mbarriers.find(bar);
    if (found == block->mbarriers.end()) break;
    if (block->live == 0) fail(at, "%s: block %u has left", name, block->index);
    return found->second;
  }
  fail(at, "%s: the mbarrier was not initialised", name);
}

void mbarrier_init(std::uint64_t* bar, unsigned arrivals, Site at) {
  Block& block = *self()->home;
  if (!block.holds(bar, 8) || reinterpret_cast<std::uintptr_t>(bar) % 8)
    fail(at, "mbarrier_init: not 8 aligned bytes of this block's shared memory");
  if (arrivals == 0) fail(at, "mbarrier_init: no arrivals");
  touch(bar, 8, Access::write, LSTM_CALLER, "mbarrier_init", at);
  const Quiet quiet;
  MBarrier fresh;
  fresh.arrivals = fresh.pending = arrivals;
  if (!block.mbarriers.emplace(bar, fresh).second) fail(at, "mbarrier_init twice");
}

void mbarrier_arrive(std::uint64_t* bar, unsigned rank, Site at) {
  const void* target = peer_shared(bar, rank, at);
  MBarrier& found = find_mbarrier(target, "mbarrier_arrive", at);
  touch(target, 8, Access::read, LSTM_CALLER, "mbarrier_arrive", at);
  count_arrival(found, 0, "mbarrier_arrive", at);
}

void mbarrier_expect(std::uint64_t* bar, unsigned bytes, Site at) {
  MBarrier& found = find_mbarrier(bar, "mbarrier_expect", at);
  if (!self()->home->holds(bar)) fail(at, "mbarrier_expect: not this block's barrier");
  touch(bar, 8, Access::read, LSTM_CALLER, "mbarrier_expect", at);
  count_arrival(found, bytes, "mbarrier_expect", at);
}

// To ThreadSanitizer a use only reads the barrier: what must come before it is mbarrier_init.
void mbarrier_wait(std::uint64_t* bar, unsigned parity, Site at) {
  MBarrier& found = find_mbarrier(bar, "mbarrier_wait", at);
  if (!self()->home->holds(bar)) fail(at, "mbarrier_wait: not this block's barrier");
  if (parity > 1) fail(at, "mbarrier_wait: parity %u", parity);
  touch(bar, 8, Access::read, LSTM_CALLER, "mbarrier_wait", at);
  while ((found.phase & 1) == parity) {
    found.waiting.push(self());
    suspend("mbarrier_wait", at);
  }
  acquire(&found.clock[parity]);
}

}  // namespace lstm_cuda::emulation
