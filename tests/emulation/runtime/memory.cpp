// Shared memory of blocks, buffers that stand for global memory, and checks of accesses.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "state.hpp"

namespace lstm_cuda::emulation {

namespace {

constexpr int kCanary = 0xA5;
constexpr std::size_t kPeriod = 128;       // of what alignments an instruction may need
constexpr std::size_t kDeviceAlign = 256;  // cudaMalloc's

std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

bool intact(const std::byte* p, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; ++i)
    if (p[i] != std::byte{kCanary}) return false;
  return true;
}

}  // namespace

void copy_parameters(void* to, const void* from, std::size_t bytes) {
  const Quiet quiet;
  std::memcpy(to, from, bytes);
}

void touch(const void* p, std::size_t bytes, Access access, void* caller, const char* name,
           const Site& at) {
  if (!bytes) return;
  auto* first = static_cast<char*>(const_cast<void*>(p));
  if (__asan_region_is_poisoned && __asan_region_is_poisoned(first, bytes))
    fail(at, "%s: out of bounds", name);
  if (access == Access::relaxed) return;
  auto* note = access == Access::write ? __tsan_write4_pc : __tsan_read4_pc;
  for (std::size_t i = 0; note && i < bytes; i += 4) note(first + i, caller);
}

void poison(void* p, std::size_t bytes) {
  const Quiet quiet;
  std::memset(p, kPoison, bytes);
}

void readable(const void* p, Site at) {
  touch(p, 1, Access::relaxed, nullptr, "prefetch", at);
  [[maybe_unused]] const char c = *static_cast<const volatile char*>(p);  // or it faults
}

void misaligned(const void* p, std::size_t bytes, Site at) {
  fail(at, "an access of %zu bytes to %p is misaligned", bytes, p);
}

bool Block::holds(const void* p, std::size_t bytes) const {
  const auto* b = static_cast<const std::byte*>(p);
  return b >= shared && b + bytes <= shared + launched->capacity;
}

// A block's shared memory exists while the block runs. To ThreadSanitizer its start and its end are
// writes to all of it: another block's access that no barrier keeps in between is a race. Without
// it, memory of blocks of a cluster is accessible only in between.
void start_block(Block& block) {
  block.started = true;
  if (launched->launch.cluster > 1)
    protect(block.shared, launched->capacity, PROT_READ | PROT_WRITE);
  if (__tsan_write_range) __tsan_write_range(block.shared, launched->capacity);
  poison(block.shared, launched->capacity);
  release(&block.start);
}

void end_block(Block& block) {
  acquire(&block.end);
  if (__tsan_write_range) __tsan_write_range(block.shared, launched->capacity);
  const Quiet quiet;
  for (const Piece& piece : block.pieces) {
    std::byte* end = block.shared + piece.place + piece.bytes;
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(end, kGap);
    if (!intact(end, kGap))
      fail({}, "shared memory was written behind the piece of %zu bytes at offset %zu", piece.bytes,
           piece.start);
  }
  if (const Transfer* t =
          launched->transfers.find([&](const Transfer& other) { return block.holds(other.dst); }))
    fail(t->site, "block %u has left before a %s arrived", block.index, t->name);
  if (launched->launch.cluster > 1) protect(block.shared, launched->capacity, PROT_NONE);
}

// The first thread that takes a piece makes it; the others must take the same.
void* shared_take(SharedCursor& cursor, std::size_t bytes, std::size_t align, Site at) {
  Block& block = *self()->home;
  const std::size_t start = round_up(cursor.used, align), number = cursor.pieces++;
  cursor.used = start + bytes;
  if (cursor.used > launched->launch.shared_bytes)
    fail(at, "the kernel takes %zu bytes of shared memory, the launch gives %zu", cursor.used,
         launched->launch.shared_bytes);
  const Quiet quiet;
  if (number == block.pieces.size()) {
    const Piece* before = number ? &block.pieces[number - 1] : nullptr;
    const std::size_t free = before ? before->place + before->bytes + kGap : 0;
    // As well aligned as on a GPU and no better.
    const std::size_t period = align > kPeriod ? align : kPeriod;
    const Piece piece{start, bytes, free + (start + period - free % period) % period};
    std::byte* end = block.shared + piece.place + bytes;
    if (!block.holds(end, kGap)) fail(at, "shared memory in too many pieces");
    block.pieces.push_back(piece);
    std::memset(end, kCanary, kGap);
    if (__asan_poison_memory_region) __asan_poison_memory_region(end, kGap);
  }
  const Piece& piece = block.pieces[number];
  if (piece.start != start || piece.bytes != bytes)
    fail(at, "threads take shared memory differently: %zu bytes at %zu, others %zu at %zu", bytes,
         start, piece.bytes, piece.start);
  return block.shared + piece.place;
}

void* peer_shared(const void* p, unsigned rank, Site at) {
  const Block& block = *self()->home;
  if (!block.holds(p)) fail(at, "peer_shared: not this block's shared memory");
  if (rank >= block.cluster->blocks.size())
    fail(at, "peer_shared: the cluster has no block %u", rank);
  const auto offset = static_cast<const std::byte*>(p) - block.shared;
  return block.cluster->blocks[rank]->shared + offset;
}

// The end lies at a page that faults, up to the alignment; canaries fill what that leaves.
void* device_alloc(std::size_t bytes) {
  if (under_asan()) {
    void* p = nullptr;
    if (posix_memalign(&p, kDeviceAlign, bytes ? bytes : 1)) throw std::bad_alloc();
    return std::memset(p, kPoison, bytes);
  }
  const std::size_t room = round_up(bytes, kDeviceAlign), pages = round_up(room, kPage);
  void* base =
      mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  char* end = static_cast<char*>(base) + pages;
  protect(end, kPage, PROT_NONE);
  std::memset(end - room, kPoison, bytes);
  std::memset(end - room + bytes, kCanary, room - bytes);
  return end - room;
}

bool sanitized() { return under_asan() || under_tsan(); }

bool device_free(void* p, std::size_t bytes) {
  if (under_asan()) {
    std::free(p);
    return true;
  }
  const std::size_t room = round_up(bytes, kDeviceAlign), pages = round_up(room, kPage);
  const bool clean = intact(static_cast<std::byte*>(p) + bytes, room - bytes);
  munmap(static_cast<char*>(p) + room - pages, pages + kPage);
  return clean;
}

}  // namespace lstm_cuda::emulation
