// The launch under way: what the files of the runtime share.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "fibers.hpp"
#include "runtime.hpp"
#include "sanitizers.hpp"

namespace lstm_cuda::emulation {

inline constexpr unsigned kLanes = 32, kNamedBarriers = 16;
inline constexpr int kPoison = 0xFF;     // NaN in every floating-point type; -1 in integers
inline constexpr std::size_t kGap = 64;  // canaries behind a piece of shared memory

struct Fiber;

// First in, first out; intrusive, so that nothing is allocated while threads run.
struct Queue {
  Fiber *first = nullptr, *last = nullptr;
  void push(Fiber* fiber);
  void wake_all();
};

// Barriers have two clocks, by the parity of their phase: with one, a thread that arrives early for
// the next phase would order what it did with threads that have yet to leave this one, and hide
// races.
struct Barrier {
  const char* name = "";
  unsigned expected = 0, arrived = 0, phase = 0;
  Site first{};  // where this phase's first thread arrived
  Queue waiting{};
  Clock clock[2]{};
};

struct MBarrier {
  unsigned arrivals = 0, pending = 0, phase = 0;
  std::int64_t bytes = 0;  // still expected; negative where some came before they were announced
  Queue waiting{};
  Clock clock[2]{};
};

// One warp-wide operation that some lanes have reached.
struct Collective {
  using Run = void (*)(void* const* arguments, unsigned mask);
  unsigned mask = 0;  // 0: free
  unsigned arrived = 0, generation = 0;
  Run run = nullptr;
  const char* name = "";
  Site site{};
  std::array<void*, kLanes> arguments{};
  Clock clock[2]{};
};

struct Warp {
  std::vector<std::unique_ptr<Collective>> pending;  // under way, and free ones
  unsigned exited = 0;
  Fiber* lanes = nullptr;
};

// One cp.async that has not landed.
struct Copy {
  const char* name;
  unsigned group;
  void* dst;
  unsigned bytes;
  const void* src;
  unsigned source_bytes;
  void* caller;
};

class Random {  // xorshift64*: small, and the same everywhere
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ULL | 1) {}
  std::uint64_t below(std::uint64_t n) {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return (state_ * 0x2545F4914F6CDD1DULL >> 33) % n;
  }

 private:
  std::uint64_t state_;
};

// Under way between threads: a bulk copy, a remote store or a relaxed word.
struct Transfer {
  const char* name;
  void* dst;
  const void* src;  // null: `data`
  unsigned bytes;
  std::array<std::byte, 16> data;
  MBarrier* bar;   // that counts the bytes; null for a word
  unsigned block;  // that issued it
  void* caller;
  Site site;
  Clock clock;
  Transfer* later = nullptr;  // the next one to the same place
  std::size_t slot = 0;
};

// Transfers under way. Those to one place stay in order.
class Transfers {
 public:
  bool empty() const { return under_way_ == 0; }
  void push(std::unique_ptr<Transfer> transfer);
  // The oldest, the newest or any one.
  const Transfer& oldest();
  const Transfer& newest();
  const Transfer& any(Random& random) const;
  // The first of which it holds, or null.
  template <class Predicate>
  const Transfer* find(Predicate predicate) const {
    for (const auto& t : slots_)
      if (t && predicate(*t)) return t.get();
    return nullptr;
  }
  // The first to where this one goes.
  std::unique_ptr<Transfer> take(const Transfer& transfer);

 private:
  struct Place {
    Transfer *first, *last;
  };
  std::vector<std::unique_ptr<Transfer>> slots_;  // oldest first; null: taken
  std::size_t under_way_ = 0, oldest_ = 0;        // none is under way before `oldest_`
  std::unordered_map<const void*, Place> places_;
};

struct Piece {               // of shared memory
  std::size_t start, bytes;  // as on a GPU
  std::size_t place;         // here, with gaps
};

struct Block;

struct Fiber : Thread, Context {
  Block* home = nullptr;
  Warp* warp = nullptr;
  const char* doing = "";
  Site site{};
  Fiber* next = nullptr;  // in a Queue
  bool done = false, in_cluster_barrier = false;
  unsigned cluster_phase = 0;
  std::vector<Copy> copies;  // in the order of issue
  unsigned open_group = 0;   // of the next cp.async
};

struct Cluster {
  Barrier barrier{.name = "cluster_sync"};
  std::vector<Block*> blocks;
};

struct Block {
  unsigned index = 0, live = 0;
  bool started = false, waited = false;  // waited: for the launch before
  std::byte* shared = nullptr;
  std::vector<Piece> pieces;
  Clock start, end;
  Cluster* cluster = nullptr;
  Barrier barrier{.name = "block_sync"};
  std::array<Barrier, kNamedBarriers> named{};
  std::vector<Warp> warps;
  std::map<const void*, MBarrier> mbarriers;

  bool holds(const void* p, std::size_t bytes = 1) const;
};

// The threads that could go on: a ring, oldest first.
class Ready {
 public:
  explicit Ready(std::size_t most);
  bool empty() const { return size_ == 0; }
  std::size_t size() const { return size_; }
  void push(Fiber* fiber);
  Fiber* take_newest();
  Fiber* take(std::size_t i);  // the i-th oldest

 private:
  std::vector<Fiber*> slots_;  // a power of two
  std::size_t head_ = 0, size_ = 0;
};

struct Run {
  Run(const Launch& launch, const Settings& settings, std::size_t threads)
      : launch(launch), settings(settings), random(settings.seed), ready(threads) {}

  const Launch& launch;
  const Settings settings;
  void (*entry)(const void*) = nullptr;
  const void* context = nullptr;

  Random random;
  // Order::random. All picks but one in newest_in take the newest thread, and one in deliver_in
  // delivers a transfer first.
  std::uint64_t newest_in = 1, deliver_in = 1;

  Context launcher;
  std::size_t capacity = 0;    // of a block's shared memory, gaps included
  std::vector<Fiber*> fibers;  // of the wave
  Ready ready;
  std::deque<Block> blocks;  // that are resident
  std::deque<Cluster> clusters;
  std::unique_ptr<Barrier> grid;
  unsigned live = 0;

  Transfers transfers;
  std::unordered_map<std::uintptr_t, Queue> pollers;  // by the 16 bytes that they watch

  Clock before, end;  // of the launch: what happened before it; what it did
  char report[4096] = "";
};
extern Run* launched;

inline Fiber* self() { return static_cast<Fiber*>(current); }

// ---- scheduler.cpp ----
void* new_thread();  // to ThreadSanitizer: one that knows what happened before the launch
void make_ready(Fiber* fiber);
void suspend(const char* doing, const Site& at);  // until something makes this thread ready
void yield(const char* doing, const Site& at);    // others may come first, except in forward order

// ---- reports.cpp ----
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const Site& at, const char* format,
                                                             ...);
[[noreturn]] void report_deadlock();
const char* file_of(const Site& at);
bool same(const Site& a, const Site& b);

class FaultHandler {  // while one lives, an invalid access of a kernel is reported as its failure
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;
};

// ---- memory.cpp ----
enum class Access { read, write, relaxed };  // relaxed: cannot race
// An access that the runtime makes in the name of a kernel: checked, and noted as `caller`'s.
void touch(const void* p, std::size_t bytes, Access access, void* caller, const char* name,
           const Site& at);
void poison(void* p, std::size_t bytes);
void start_block(Block& block);
void end_block(Block& block);

// ---- barriers.cpp ----
void count_bytes(MBarrier& bar, std::int64_t bytes);  // arrived
MBarrier& find_mbarrier(const void* bar, const char* name, const Site& at);

// ---- transfers.cpp ----
void deliver_next();   // as the order says
void deliver_words();  // of this thread's block: a release makes them visible

// Where the kernel calls an operation, for ThreadSanitizer's reports.
#define LSTM_CALLER __builtin_return_address(0)

}  // namespace lstm_cuda::emulation
