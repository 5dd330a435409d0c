// Copies and stores that land later than they are issued, and words that other blocks poll.
#include <cstring>

#include "state.hpp"

namespace lstm_cuda::emulation {

namespace {

void issue(const Transfer& transfer) {
  const Quiet quiet;
  auto owned = std::make_unique<Transfer>(transfer);
  if (transfer.bar) release(&owned->clock);
  launched->transfers.push(std::move(owned));
}

std::uintptr_t line_of(const void* p) { return reinterpret_cast<std::uintptr_t>(p) / 16; }

void wake_pollers(const void* p) {
  const auto found = launched->pollers.find(line_of(p));
  if (found != launched->pollers.end()) found->second.wake_all();
}

// An engine of the device does it, not a thread: it knows what its issuer did before the issue, and
// who waits for the barrier knows what it did. Each transfer has its own: one that carried out several
// would order their issuers.
void carry_out(Transfer& t) {
  void* engine = new_thread();
  impersonate(engine);
  acquire(&t.clock);
  if (t.src) touch(t.src, t.bytes, Access::read, t.caller, t.name, t.site);
  touch(t.dst, t.bytes, Access::write, t.caller, t.name, t.site);
  release(&t.bar->clock[t.bar->phase & 1]);
  impersonate(current ? self()->tsan : launched->launcher.tsan);
  if (engine) __tsan_destroy_fiber(engine);
  copy_parameters(t.dst, t.src ? t.src : t.data.data(), t.bytes);
  count_bytes(*t.bar, t.bytes);
}

void deliver(const Transfer& one) {
  std::unique_ptr<Transfer> t;
  {
    const Quiet quiet;
    t = launched->transfers.take(one);
  }
  if (t->bar) {
    carry_out(*t);
  } else {
    copy_parameters(t->dst, t->data.data(), t->bytes);
    wake_pollers(t->dst);
  }
  const Quiet quiet;
  t.reset();
}

}  // namespace

void Transfers::push(std::unique_ptr<Transfer> transfer) {
  Transfer* t = transfer.get();
  t->slot = slots_.size();
  const auto [place, fresh] = places_.try_emplace(t->dst, Place{t, t});
  if (!fresh) place->second.last = place->second.last->later = t;
  slots_.push_back(std::move(transfer));
  ++under_way_;
}

std::unique_ptr<Transfer> Transfers::take(const Transfer& transfer) {
  const auto place = places_.find(transfer.dst);
  std::unique_ptr<Transfer> first = std::move(slots_[place->second.first->slot]);
  if (first->later)
    place->second.first = first->later;
  else
    places_.erase(place);
  if (2 * --under_way_ + 64 < slots_.size()) {  // mostly empty
    std::erase(slots_, nullptr);
    for (std::size_t i = 0; i < slots_.size(); ++i) slots_[i]->slot = i;
    oldest_ = 0;
  }
  return first;
}

const Transfer& Transfers::oldest() {
  while (!slots_[oldest_]) ++oldest_;
  return *slots_[oldest_];
}

const Transfer& Transfers::newest() {
  while (!slots_.back()) slots_.pop_back();
  return *slots_.back();
}

const Transfer& Transfers::any(Random& random) const {
  for (;;)
    if (const auto& t = slots_[random.below(slots_.size())]) return *t;
}

void deliver_next() {
  Transfers& transfers = launched->transfers;
  const Order order = launched->settings.order;
  deliver(order == Order::forward   ? transfers.oldest()
          : order == Order::reverse ? transfers.newest()
                                    : transfers.any(launched->random));
}

void deliver_words() {
  const auto own = [](const Transfer& t) { return !t.bar && t.block == current->block; };
  while (const Transfer* t = launched->transfers.find(own)) deliver(*t);
}

// ---- cp.async ----

namespace {

void land(const Copy& c, const Site& at) {
  touch(c.dst, c.bytes, Access::write, c.caller, c.name, at);
  const Quiet quiet;
  std::memcpy(c.dst, c.src, c.source_bytes);
  std::memset(static_cast<char*>(c.dst) + c.source_bytes, 0, c.bytes - c.source_bytes);
}

}  // namespace

void cp_async(const char* name, void* dst, unsigned bytes, const void* src, unsigned source_bytes,
              Site at) {
  const auto both = reinterpret_cast<std::uintptr_t>(dst) | reinterpret_cast<std::uintptr_t>(src);
  if (both % bytes) fail(at, "%s: an address is not aligned to %u bytes", name, bytes);
  if (source_bytes > bytes) fail(at, "%s: %u source bytes", name, source_bytes);
  if (!self()->home->holds(dst, bytes)) fail(at, "%s: not to this block's shared memory", name);
  self()->site = at;
  touch(src, source_bytes, Access::read, LSTM_CALLER, name, at);
  touch(dst, bytes, Access::write, LSTM_CALLER, name, at);
  const Copy copy{name, self()->open_group, dst, bytes, src, source_bytes, LSTM_CALLER};
  if (launched->settings.order == Order::random && launched->random.below(2))
    return land(copy, at);  // as early as it may
  poison(dst, bytes);       // as late as it may
  const Quiet quiet;
  self()->copies.push_back(copy);
}

void cp_async_commit(Site at) {
  self()->site = at;
  ++self()->open_group;
}

void cp_async_wait(unsigned groups_left, Site at) {
  Fiber& me = *self();
  std::size_t landed = 0;
  for (; landed < me.copies.size() && me.copies[landed].group + groups_left < me.open_group;
       ++landed)
    land(me.copies[landed], at);
  const Quiet quiet;
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

// ---- copies that an mbarrier counts ----

void bulk_copy(void* dst, const void* src, unsigned bytes, std::uint64_t* bar, Site at) {
  const auto both = reinterpret_cast<std::uintptr_t>(dst) | reinterpret_cast<std::uintptr_t>(src);
  if (!bytes || bytes % 16 || both % 16) fail(at, "bulk_copy: not in units of 16 aligned bytes");
  const Block& block = *self()->home;
  if (!block.holds(dst, bytes)) fail(at, "bulk_copy: not to this block's shared memory");
  MBarrier& found = find_mbarrier(bar, "bulk_copy", at);
  if (!block.holds(bar)) fail(at, "bulk_copy: not this block's barrier");
  touch(src, bytes, Access::read, LSTM_CALLER, "bulk_copy from", at);
  touch(dst, bytes, Access::write, LSTM_CALLER, "bulk_copy to", at);
  poison(dst, bytes);
  issue({"bulk_copy", dst, src, bytes, {}, &found, current->block, LSTM_CALLER, at, {}});
}

void store_async(void* dst, const void* data, unsigned bytes, std::uint64_t* bar, unsigned rank,
                 Site at) {
  void* target = peer_shared(dst, rank, at);
  if (reinterpret_cast<std::uintptr_t>(dst) % bytes) fail(at, "store_async: misaligned");
  MBarrier& found = find_mbarrier(peer_shared(bar, rank, at), "store_async", at);
  Transfer transfer{"store_async", target,         nullptr,     bytes, {},
                    &found,        current->block, LSTM_CALLER, at,    {}};
  copy_parameters(transfer.data.data(), data, bytes);
  poison(target, bytes);  // from now on it may change at any moment
  issue(transfer);
  yield("store_async", at);
}

// ---- words and flags ----

void word_store(std::uint32_t* p, std::uint32_t value, Site at) {
  if (reinterpret_cast<std::uintptr_t>(p) % 4) fail(at, "word_store: misaligned");
  touch(p, 4, Access::relaxed, nullptr, "word_store", at);
  Transfer transfer{"word_store", p, nullptr, 4, {}, nullptr, current->block, nullptr, at, {}};
  std::memcpy(transfer.data.data(), &value, 4);
  issue(transfer);
}

void word_load4(std::uint32_t* to, const std::uint32_t* p, Site at) {
  if (reinterpret_cast<std::uintptr_t>(p) % 16) fail(at, "word_poll4: misaligned");
  touch(p, 16, Access::relaxed, nullptr, "word_poll4", at);
  self()->site = at;
  copy_parameters(to, p, 16);
}

void word_wait(const std::uint32_t* p, Site at) {
  Queue* queue;
  {
    const Quiet quiet;
    queue = &launched->pollers[line_of(p)];
  }
  queue->push(self());
  suspend("word_poll4 or flag_wait_acquire", at);
}

std::uint32_t flag_add_release(std::uint32_t* flag, std::uint32_t value, Site at) {
  touch(flag, 4, Access::relaxed, nullptr, "flag_add_release", at);
  self()->site = at;
  deliver_words();
  release(flag);
  const std::uint32_t old = *flag;
  *flag = old + value;
  wake_pollers(flag);
  yield("flag_add_release", at);
  return old;
}

void flag_wait_acquire(const std::uint32_t* flag, std::uint32_t at_least, Site at) {
  touch(flag, 4, Access::relaxed, nullptr, "flag_wait_acquire", at);
  self()->site = at;
  while (static_cast<std::int32_t>(*flag - at_least) < 0) word_wait(flag, at);
  acquire(flag);
}

}  // namespace lstm_cuda::emulation
