// Copies and stores that land later than they are issued, and words that other blocks poll.
#include <cstring>

#include "state.hpp"

namespace lstm_cuda::emulation {

namespace {

void issue(const Transfer& transfer) {
  const Quiet quiet;
  auto owned = std::make_unique<Transfer>(transfer);
  if (transfer.bar) release(&owned->clock);
  launched->transfers.push_back(std::move(owned));
}

std::uintptr_t line_of(const void* p) { return reinterpret_cast<std::uintptr_t>(p) / 16; }

void wake_pollers(const void* p) {
  const auto found = launched->pollers.find(line_of(p));
  if (found != launched->pollers.end()) found->second.wake_all();
}

// An engine of the device does it, not a thread: it knows what its issuer did before the issue, and
// who waits for the barrier knows what it did.
void carry_out(Transfer& t) {
  void* engine = launched->engines[launched->engine++ % launched->engines.size()];
  impersonate(engine);
  acquire(&t.clock);
  if (t.src) touch(t.src, t.bytes, Access::read, t.caller, t.name, t.site);
  touch(t.dst, t.bytes, Access::write, t.caller, t.name, t.site);
  release(&t.bar->clock[t.bar->phase & 1]);
  impersonate(current ? self()->tsan : launched->launcher.tsan);
  copy_parameters(t.dst, t.src ? t.src : t.data.data(), t.bytes);
  count_bytes(*t.bar, t.bytes);
}

}  // namespace

// In any order, but stores to one place keep theirs.
void deliver(std::size_t i) {
  auto& transfers = launched->transfers;
  for (std::size_t j = 0; j < i; ++j)
    if (transfers[j]->dst == transfers[i]->dst) i = j;
  Transfer& t = *transfers[i];
  if (t.bar) {
    carry_out(t);
  } else {
    copy_parameters(t.dst, t.data.data(), t.bytes);
    wake_pollers(t.dst);
  }
  const Quiet quiet;
  transfers.erase(transfers.begin() + static_cast<std::ptrdiff_t>(i));
}

void deliver_words() {
  for (std::size_t i = 0; i < launched->transfers.size();) {
    const Transfer& t = *launched->transfers[i];
    if (!t.bar && t.block == current->block)
      deliver(i);
    else
      ++i;
  }
}

// ---- cp.async ----

namespace {

void land(const Copy& c, const Site& at) {
  touch(c.dst, 16, Access::write, c.caller, "cp_async16", at);
  const Quiet quiet;
  std::memcpy(c.dst, c.src, c.source_bytes);
  std::memset(static_cast<char*>(c.dst) + c.source_bytes, 0, 16 - c.source_bytes);
}

}  // namespace

void cp_async(void* dst, const void* src, unsigned source_bytes, Site at) {
  const auto both = reinterpret_cast<std::uintptr_t>(dst) | reinterpret_cast<std::uintptr_t>(src);
  if (both % 16) fail(at, "cp_async16: an address is not aligned to 16 bytes");
  if (source_bytes > 16) fail(at, "cp_async16: %u source bytes", source_bytes);
  if (!self()->home->holds(dst, 16)) fail(at, "cp_async16: not to this block's shared memory");
  self()->site = at;
  touch(src, source_bytes, Access::read, LSTM_CALLER, "cp_async16 from", at);
  touch(dst, 16, Access::write, LSTM_CALLER, "cp_async16 to", at);
  const Copy copy{self()->open_group, dst, src, source_bytes, LSTM_CALLER};
  if (launched->settings.order == Order::random && launched->random.below(2))
    return land(copy, at);  // as early as it may
  poison(dst, 16);          // as late as it may
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
