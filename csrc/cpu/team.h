// Workers that go through the same stages together: the items of a stage are shared out among them,
// and none goes on before all items are done.
//
// Nobody waits for a worker that has not come: each has a range of items that is its own at every
// stage (what it reads is still in its cache), and takes from the others' ranges when its own is
// empty. So one worker alone finishes everything, in whatever number and order a thread pool runs
// them, and a core that is lost to another program holds up the rest only for the item in its
// hands. A worker that waits spins for a while, then yields.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

namespace lstm_cuda {

class Team {
 public:
  static constexpr int most_workers = 64;

  explicit Team(int workers) : workers_(workers < most_workers ? workers : most_workers) {}
  int workers() const { return workers_; }

  // One worker's way through the stages. All workers must come to the same stages with the same
  // numbers of items.
  class Worker {
   public:
    Worker(Team& team, int id) : team_(team), id_(id) {}
    int id() const { return id_; }
    int workers() const { return team_.workers_; }

    // body(item) for the items that fall to this worker; returns when those of all workers are
    // done.
    template <class Body>
    void each(int64_t items, Body&& body) {
      const int workers = team_.workers_;
      if (workers == 1) {
        for (int64_t item = 0; item < items; ++item) body(item);
        return;
      }
      ++stage_;
      int64_t count = 0;
      for (int k = 0; k < workers; ++k) {
        const int owner = (id_ + k) % workers;
        for (int64_t item; (item = team_.claim(owner, stage_, items)) >= 0; ++count) body(item);
      }
      expected_ += items;
      team_.finish(count, expected_);
    }

   private:
    Team& team_;
    const int id_;
    int64_t stage_ = 0, expected_ = 0;
  };

 private:
  static constexpr int bits = 24;  // of an item's number within its owner's range

  // The next unclaimed item of a worker's range, or -1. A cursor holds the stage and how many items
  // of it are claimed; one that is still at an earlier stage has none claimed, one at a later stage
  // has nothing left here.
  int64_t claim(int owner, int64_t stage, int64_t items) {
    const int64_t first = owner * items / workers_, count = (owner + 1) * items / workers_ - first;
    const int64_t base = stage << bits;
    std::atomic<int64_t>& cursor = cursors_[owner].value;
    int64_t seen = cursor.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t claimed = seen > base ? seen - base : 0;
      if (claimed >= count) return -1;
      if (cursor.compare_exchange_weak(seen, base + claimed + 1, std::memory_order_relaxed))
        return first + claimed;
    }
  }

  // What the items wrote is seen by everyone who has passed here.
  void finish(int64_t count, int64_t expected) {
    if (count > 0) done_.value.fetch_add(count, std::memory_order_acq_rel);
    for (int spins = 0; done_.value.load(std::memory_order_acquire) < expected; ++spins) {
      if (spins < 4096) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
      } else {
        sched_yield();
      }
    }
  }

  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  const int workers_;
  Counter done_;
  Counter cursors_[most_workers];
};

}  // namespace lstm_cuda
