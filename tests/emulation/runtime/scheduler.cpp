// Launches: who runs when.
//
// The blocks of a cluster are resident together, those of a cooperative launch all of them; other
// clusters run one after another ("waves"), so that a kernel that secretly needs more blocks to be
// there deadlocks, here as on a full device. Nothing polls: whoever waits is in a queue, and when
// nobody is ready and no transfer is under way that is a deadlock.
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <utility>

#include "state.hpp"

namespace lstm_cuda::emulation {

Thread* current = nullptr;
Run* launched = nullptr;

Settings& settings() {
  static Settings s;
  return s;
}

void Queue::push(Fiber* fiber) {
  fiber->next = nullptr;
  (last ? last->next : first) = fiber;
  last = fiber;
}

void Queue::wake_all() {
  for (Fiber* f = first; f; f = f->next) make_ready(f);
  first = last = nullptr;
}

Ready::Ready(std::size_t most) : slots_(std::bit_ceil(most)) {}

void Ready::push(Fiber* fiber) { slots_[(head_ + size_++) & (slots_.size() - 1)] = fiber; }

Fiber* Ready::take_newest() { return slots_[(head_ + --size_) & (slots_.size() - 1)]; }

Fiber* Ready::take(std::size_t i) {
  const std::size_t wrap = slots_.size() - 1;
  Fiber* fiber = std::exchange(slots_[(head_ + i) & wrap], slots_[head_ & wrap]);
  head_ = (head_ + 1) & wrap;
  --size_;
  return fiber;
}

void make_ready(Fiber* fiber) { launched->ready.push(fiber); }

namespace {

Fiber* pick() {
  Run& run = *launched;
  const Order order = run.settings.order;
  const bool random = order == Order::random;
  while (!run.transfers.empty() &&
         (run.ready.empty() || (random && run.random.below(run.deliver_in) == 0)))
    deliver_next();
  if (run.ready.empty()) return nullptr;
  if (order == Order::reverse || (random && run.random.below(run.newest_in) != 0))
    return run.ready.take_newest();
  return run.ready.take(random ? run.random.below(run.ready.size()) : 0);
}

// What a fiber of a CUDA thread runs.
void thread_main() {
  Run& run = *launched;
  enter_context(run.launcher);
  Fiber& me = *self();
  Block& block = *me.home;
  me.doing = "its start";
  if (!block.started) start_block(block);
  acquire(&block.start);

  run.entry(run.context);

  if (!me.copies.empty()) fail(me.site, "a thread exits with %s in flight", me.copies.front().name);
  for (const Barrier* barrier : {&block.barrier, &block.cluster->barrier, run.grid.get()})
    if (barrier->arrived)
      fail(barrier->first, "a thread exits while others wait at %s", barrier->name);
  const unsigned lane = 1u << me.thread % kLanes;
  for (const auto& c : me.warp->pending)
    if (c->mask & lane) fail(c->site, "a lane exits while others wait for it at %s", c->name);
  me.warp->exited |= lane;
  me.done = true;
  release(&block.end);
  release(&run.end);
  if (--block.live == 0) {
    if (run.launch.overlap && !block.waited)
      fail({}, "the launch may overlap the one before, but block %u ends without dependency_wait",
           block.index);
    end_block(block);
  }
  if (--run.live == 0) {
    while (!run.transfers.empty()) deliver_next();
    switch_context(me, run.launcher, true);
  }
  Fiber* next = pick();
  if (!next) report_deadlock();
  current = next;
  switch_context(me, *next, true);
  std::abort();
}

}  // namespace

void suspend(const char* doing, const Site& at) {
  Fiber* me = self();
  me->doing = doing;
  me->site = at;
  Fiber* next = pick();
  if (!next) report_deadlock();
  if (next == me) return;
  current = next;
  switch_context(*me, *next);
}

void yield(const char* doing, const Site& at) {
  self()->doing = doing;
  self()->site = at;
  if (launched->settings.order == Order::forward) return;
  make_ready(self());
  suspend(doing, at);
}

namespace {

std::size_t resident_threads(const Launch& l) {
  return std::size_t{l.cooperative ? l.blocks : l.cluster} * l.threads;
}

// Memory of launches, kept from one to the next.
struct Pool {
  std::mutex mutex;  // of the launch under way: one at a time
  Region stacks, shared;
  std::size_t guarded = 0;              // stacks that have their guard pages
  std::array<std::size_t, 3> layout{};  // of `shared`: blocks, bytes of one, whether in clusters
  std::vector<Fiber> fibers;
  void* origin = nullptr;  // to ThreadSanitizer: knows what happened before a launch may start
  std::deque<void*> identities;  // ThreadSanitizer's fibers of threads, oldest first
};
Pool& pool() {
  static Pool& p = *new Pool;  // never destroyed: fibers may still stand on its stacks
  return p;
}

// A guard page is two mappings, of which a process has 65530. What a launch of more threads runs, its
// first threads run too.
constexpr std::size_t kMostGuarded = 16384;

}  // namespace

void* new_thread() {
  if (!under_tsan()) return nullptr;
  impersonate(pool().origin);
  void* thread = create_fiber();
  impersonate(current ? self()->tsan : launched->launcher.tsan);
  return thread;
}

namespace {

// To ThreadSanitizer a thread starts knowing what happened before the launch, or if launches may
// overlap, before the first of those. It must not know what other waves did; hence a new identity
// for each thread. Old ones are kept for a while, because reports name them.
constexpr std::size_t kIdentities = 512;

void* new_identity(std::size_t at_once) {
  if (!under_tsan()) return nullptr;
  auto& identities = pool().identities;
  while (identities.size() >= std::max(at_once, kIdentities)) {
    __tsan_destroy_fiber(identities.front());
    identities.pop_front();
  }
  void* identity = new_thread();
  identities.push_back(identity);
  return identity;
}

std::vector<unsigned> in_order(unsigned n) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (launched->settings.order == Order::random)
    for (unsigned i = n; i > 1; --i) std::swap(order[i - 1], order[launched->random.below(i)]);
  return order;
}

void start_thread(Fiber& fiber, Block& block, unsigned thread, char* stack) {
  const Launch& l = launched->launch;
  std::vector<Copy> copies = std::move(fiber.copies);
  copies.clear();
  fiber = Fiber{};
  fiber.copies = std::move(copies);
  static_cast<Thread&>(fiber) = {thread, block.index, block.index % l.cluster, l.threads, l.blocks};
  fiber.home = &block;
  fiber.warp = &block.warps[thread / kLanes];
  if (thread % kLanes == 0) fiber.warp->lanes = &fiber;
  fiber.stack = stack;
  if (under_tsan()) {
    const bool own = thread == 0 || launched->settings.watched;
    fiber.tsan = own ? new_identity(resident_threads(l)) : (&fiber - 1)->tsan;
    char name[64];
    std::snprintf(name, sizeof name, "block %u thread %u", block.index, thread);
    __tsan_set_fiber_name(fiber.tsan, name);
  }
  prepare(fiber, thread_main);
}

// Runs `blocks` blocks from `first` on to their end.
void run_wave(unsigned first, unsigned blocks, char* shared) {
  Run& run = *launched;
  const Launch& l = run.launch;
  const std::size_t stack_unit = kPage + kStackBytes, threads = std::size_t{blocks} * l.threads;
  char* stacks = pool().stacks.take(threads * stack_unit, PROT_READ | PROT_WRITE);
  if (pool().stacks.fresh()) pool().guarded = 0;
  for (; pool().guarded < std::min(threads, kMostGuarded); ++pool().guarded)
    protect(stacks + pool().guarded * stack_unit, kPage, PROT_NONE);

  // New for each wave, clocks and all.
  run.blocks.clear();
  run.clusters.clear();
  run.clusters.resize(blocks / l.cluster);
  run.grid = std::make_unique<Barrier>(Barrier{.name = "grid_sync"});
  run.grid->expected = l.cooperative ? l.blocks * l.threads : 0;
  run.fibers.clear();
  for (unsigned i = 0; i < blocks; ++i) {
    Block& block = run.blocks.emplace_back();
    block.index = first + i;
    block.live = block.barrier.expected = l.threads;
    block.shared = reinterpret_cast<std::byte*>(shared + i * (run.capacity + kPage));
    block.cluster = &run.clusters[i / l.cluster];
    block.cluster->blocks.push_back(&block);
    block.cluster->barrier.expected = l.cluster * l.threads;
    block.warps.resize(l.threads / kLanes);
    for (unsigned thread = 0; thread < l.threads; ++thread) {
      const std::size_t number = run.fibers.size();
      Fiber& fiber = pool().fibers[number];
      run.fibers.push_back(&fiber);
      start_thread(fiber, block, thread, stacks + number * stack_unit + kPage);
    }
  }
  for (const unsigned block : in_order(blocks))
    for (const unsigned warp : in_order(l.threads / kLanes))
      for (unsigned lane = 0; lane < kLanes; ++lane)
        make_ready(run.fibers[block * l.threads + warp * kLanes + lane]);
  run.live = blocks * l.threads;
  Fiber* next = pick();
  current = next;
  switch_context(run.launcher, *next);
  current = nullptr;
  // A launch that failed left threads where they stood.
  for (Fiber* fiber : run.fibers)
    if (under_tsan() && !fiber->done) {
      impersonate(fiber->tsan);
      release(&run.end);
      impersonate(run.launcher.tsan);
    }
}

// As the driver would refuse it.
const char* refusal(const Launch& l, const Settings& device) {
  if (!l.blocks || !l.threads || l.threads > 1024 || !l.cluster || l.blocks % l.cluster)
    return "invalid configuration argument";
  if (l.threads % kLanes) return "blocks must be whole warps";
  if (l.shared_bytes > device.shared_limit)
    return "a block asks for more shared memory than the device has";
  if (l.cluster > device.cluster_limit || l.cluster > 16)
    return "the cluster is larger than the device allows";
  if (l.cooperative && l.blocks > device.resident_blocks)
    return "too many blocks in cooperative launch";
  return nullptr;
}

void run_waves(Run& run) {
  const Launch& l = run.launch;
  const unsigned wave = l.cooperative ? l.blocks : l.cluster;
  // Without ThreadSanitizer waves use the same memory; to it that would look like a race.
  const std::size_t slots = under_tsan() ? l.blocks : wave, slot = run.capacity + kPage;
  char* shared = pool().shared.take(slots * slot, PROT_READ | PROT_WRITE);
  const std::array<std::size_t, 3> layout{slots, run.capacity, l.cluster > 1};
  if (layout != pool().layout || pool().shared.fresh()) {
    protect(shared, pool().shared.bytes(), PROT_NONE);
    for (std::size_t i = 0; i < slots && l.cluster == 1; ++i)  // in clusters: while the block runs
      protect(shared + i * slot, run.capacity, PROT_READ | PROT_WRITE);
  }
  pool().layout = layout;
  const unsigned waves = l.blocks / wave;
  for (const unsigned i : in_order(waves)) {
    const unsigned w = run.settings.order == Order::reverse ? waves - 1 - i : i;
    run_wave(w * wave, wave, shared + (under_tsan() ? w * wave * slot : 0));
    if (run.report[0]) {
      pool().layout = {};  // blocks did not reach their end
      break;
    }
  }
}

}  // namespace

namespace {

thread_local bool launching = false;  // a kernel runs on the thread that launched it

struct Launching {
  Launching() { launching = true; }
  ~Launching() {
    launching = false;
    launched = nullptr;
  }
};

}  // namespace

std::string run(const Launch& launch, void (*entry)(const void*), const void* context) {
  if (launching) return "a launch inside a kernel";
  if (const char* why = refusal(launch, settings())) return why;
  const std::lock_guard lock(pool().mutex);
  const Launching scope;
  const QuietLaunch quiet;
  const std::size_t threads = resident_threads(launch);
  if (pool().fibers.size() < threads) pool().fibers.resize(threads);
  auto run = std::make_unique<Run>(launch, settings(), threads);
  run->entry = entry, run->context = context;
  run->capacity = (launch.shared_bytes + kPage * 5 - 1) / kPage * kPage;  // room for gaps
  run->fibers.reserve(threads);
  constexpr std::uint64_t kNewest[] = {1, 2, 8, 64}, kDeliver[] = {4, 64, ~std::uint64_t{0}};
  run->newest_in = kNewest[run->settings.seed % 4];
  run->deliver_in = kDeliver[run->settings.seed % 3];
  launched = run.get();

  if (under_tsan()) {
    run->launcher.tsan = __tsan_get_current_fiber();
    if (!pool().origin) pool().origin = __tsan_create_fiber(0);
    release(&run->before);
    impersonate(pool().origin);
    if (!launch.overlap) acquire(&run->before);
    impersonate(run->launcher.tsan);
  }
  {
    const FaultHandler handler;
    run_waves(*run);
  }
  acquire(&run->end);
  if (under_asan() && run->report[0]) {  // what the threads left standing had poisoned
    __asan_unpoison_memory_region(pool().stacks.base(), pool().stacks.bytes());
    __asan_unpoison_memory_region(pool().shared.base(), pool().shared.bytes());
  }
  return run->report;
}

void dependency_wait() {
  self()->home->waited = true;
  acquire(&launched->before);
}

}  // namespace lstm_cuda::emulation
