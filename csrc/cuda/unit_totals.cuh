// Totals over all hidden units of a recurrence, of two values for each batch row, in kernels that keep a
// recurrence in one block or one cluster: what layer norm needs of whole rows.
//
// Rows come in column tiles of 8. Of a warp's 32 lanes four have each column (Quarter). A source is a
// warp's part of the units of a column tile: it puts its own two values, everybody waits for those of all
// sources, and the four lanes of a column share out the sources when they add them up, always in the same
// order. Which sources there are, and what the values mean, is the kernel's.
//
// Slots: totals of one step that do not wait for each other, or come one after the other.
#pragma once

#include "element.cuh"

namespace lstm_cuda {

// A column of a tile, and which of the four lanes that have it. Lanes of a column differ in two bits.
template <unsigned first_bit, unsigned second_bit>
struct Quarter {
  int column, part;

  template <class Value>
  static LSTM_DEVICE Value sum(Value v) {
    v += ptx::shuffle_xor(v, first_bit);
    return v + ptx::shuffle_xor(v, second_bit);
  }
};

// Where lane (g = lane / 4, q = lane % 4) has columns 2q and 2q + 1, as mma leaves them: of these, the one
// that it takes care of here.
struct QuarterOfPair : Quarter<8, 16> {
  LSTM_DEVICE QuarterOfPair() : Quarter{lane() % 4 * 2 + lane() / 4 % 2, lane() / 8} {}

  // Of values for both columns, the one for this lane's; and back.
  template <class Value>
  static LSTM_DEVICE Value own(const Value (&both)[2]) {
    return lane() / 4 % 2 ? both[1] : both[0];
  }
  template <class Value>
  static LSTM_DEVICE void spread(Value v, Value (&both)[2]) {
    const Value other = ptx::shuffle_xor(v, 4);
    both[0] = lane() / 4 % 2 ? other : v;
    both[1] = lane() / 4 % 2 ? v : other;
  }
};

template <class Compute>
struct alignas(2 * sizeof(Compute)) TwoValues {
  Compute a, b;
};

// Of a recurrence in one block. Protocol: put, block_sync (wait), read. A slot is written again only after
// another block_sync: that of another slot, or of the kernel's step.
template <class Compute, int kSources, int kTiles, int kSlots>
class BlockTotals {
  using Two = TwoValues<Compute>;

 public:
  static constexpr std::size_t kSharedBytes = kSlots * kTiles * kSources * 8 * sizeof(Two);

  LSTM_DEVICE explicit BlockTotals(ptx::Shared& shared)
      : values_(shared.take<Two>(kSharedBytes / sizeof(Two), 16)) {}

  LSTM_DEVICE void begin() const {}

  template <class Lanes>
  LSTM_DEVICE void put(int slot, int tile, int source, const Lanes& at, Compute a,
                       Compute b) const {
    if (at.part == 0) *place(slot, tile, source, at.column) = {a, b};
  }
  LSTM_DEVICE void wait(int, int) const { ptx::block_sync(); }

  // Calls visit(source, a, b) for this lane's share of the sources of its column.
  template <class Lanes, class Visit>
  LSTM_DEVICE void each(int slot, int tile, const Lanes& at, Visit visit) const {
    for (int source = at.part; source < kSources; source += 4) {
      const Two v = *place(slot, tile, source, at.column);
      visit(source, v.a, v.b);
    }
  }

 private:
  LSTM_DEVICE Two* place(int slot, int tile, int source, int column) const {
    return values_ + ((slot * kTiles + tile) * kSources + source) * 8 + column;
  }

  Two* values_;
};

// Of a recurrence in a cluster of kBlocks blocks: each source sends its values to all blocks by st.async,
// which an mbarrier of the slot counts.
// Protocol: one phase of a slot is one step. Who waits for a phase also sends to the next one, and does so
// only after it has read this one: so nobody misses a phase. Who may overwrite what others still read is
// the kernel's to see to: between two steps everybody has to wait for something that all others send
// after they have read.
template <int kBlocks, int kSources, int kTiles, int kSlots>
class ClusterTotals {
  using Two = TwoValues<float>;
  static constexpr unsigned kBytes = kTiles * kSources * 8 * sizeof(Two);  // of a slot
  static_assert(kBlocks % 4 == 0);

 public:
  // The piece with the barriers ends where any other may begin.
  static constexpr int kPieceOfBars = 128 / sizeof(uint64_t);
  static constexpr std::size_t kSharedBytes = kSlots * kBytes + 128;
  static_assert(kSlots <= kPieceOfBars);

  LSTM_DEVICE explicit ClusterTotals(ptx::Shared& shared)
      : values_(shared.take<Two>(kSlots * kBytes / sizeof(Two), 16)),
        bars_(shared.take<uint64_t>(kPieceOfBars)) {
    if (ptx::thread_index() == 0)
      for (int slot = 0; slot < kSlots; ++slot) ptx::mbarrier_init(bars_ + slot, 1);
  }

  // After the first cluster_sync that follows construction.
  LSTM_DEVICE void begin() const {
    if (ptx::thread_index() == 0)
      for (int slot = 0; slot < kSlots; ++slot) ptx::mbarrier_expect(bars_ + slot, kBytes);
  }

  template <class Lanes>
  LSTM_DEVICE void put(int slot, int tile, int source, const Lanes& at, float a, float b) const {
    const Two v{a, b};
    uint2 bits;
    std::memcpy(&bits, &v, sizeof bits);
    uint2* const to = reinterpret_cast<uint2*>(place(slot, tile, source, at.column));
    LSTM_UNROLL
    for (int i = 0; i < kBlocks / 4; ++i)
      ptx::store_async(to, bits, bars_ + slot, unsigned(at.part * (kBlocks / 4) + i));
  }
  // For the values of a step, counted from 0; thread 0 has to be among those that wait.
  LSTM_DEVICE void wait(int slot, int step) const {
    ptx::mbarrier_wait(bars_ + slot, unsigned(step) % 2);
    if (ptx::thread_index() == 0) ptx::mbarrier_expect(bars_ + slot, kBytes);
  }

  template <class Lanes, class Visit>
  LSTM_DEVICE void each(int slot, int tile, const Lanes& at, Visit visit) const {
    LSTM_UNROLL
    for (int i = 0; i < (kSources + 3) / 4; ++i) {
      const int source = 4 * i + at.part;
      if (kSources % 4 != 0 && source >= kSources) break;
      const Two v = *place(slot, tile, source, at.column);
      visit(source, v.a, v.b);
    }
  }

 private:
  LSTM_DEVICE Two* place(int slot, int tile, int source, int column) const {
    return values_ + ((slot * kTiles + tile) * kSources + source) * 8 + column;
  }

  Two* values_;
  uint64_t* bars_;
};

// Where no totals are wanted.
struct NoTotals {
  static constexpr std::size_t kSharedBytes = 0;
  LSTM_DEVICE explicit NoTotals(ptx::Shared&) {}
  LSTM_DEVICE void begin() const {}
};

}  // namespace lstm_cuda
