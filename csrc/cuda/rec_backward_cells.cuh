// What comes to the backward recurrence with resident weights (rec_backward.cuh), how it comes to a
// warp, and a thread's cells.
#pragma once

#include "part.cuh"
#include "rec_backward_product.cuh"

namespace lstm_cuda::resident {

struct BackwardParams {
  RecurrenceBackward problem;  // its lists of weights are in host memory
  PackedWeights weights;
  uint32_t* words;    // of the exchange, if that is through global memory
  unsigned first;     // the launch's first part
  int64_t time_step;  // elements of [T, B, D, H] from time to time
  bool aligned;       // inputs of four units at a time are aligned to their size
  Variant variant;    // of other cells: what problem.variant points at is in host memory
};

// A warp's ring of inputs for its quads. A slot has for each turn and quad [4 gates][8 columns][4 units] of
// gates, then c, then dy: a warp reads 32 consecutive values at a time, in one order or another.
template <class F, int kSlots>
class InputRing {
  using Element = typename F::Element;
  static constexpr int kCAt = 4 * 32 * sizeof(Element), kDyAt = kCAt + 32 * sizeof(float);
  static constexpr int kQuadBytes = kDyAt + 32 * sizeof(Element);

 public:
  static constexpr int kSlotBytes =
      F::kCellWarps * F::kTurns * F::kCells * kQuadBytes;  // of all warps

  // unit: of this lane's first cell.
  LSTM_DEVICE InputRing(ptx::Shared& shared, const BackwardParams& params, int unit)
      : bytes_(shared.take<std::byte>(kSlots * kSlotBytes, 16)),
        params_(params),
        p_(params.problem),
        H_(unsigned(p_.shape.H)),
        first_(unsigned(unit - unit_of_quad())) {}

  // Begins to copy this lane's share of its column: a gate, c or dy of each quad's units. row: in
  // [T, B, D, H]. To be waited for like cp.async; rows that are not aligned are copied at once.
  LSTM_DEVICE void fetch(int step, int turn, int64_t row) const {
    const int share = unit_of_quad(), at = 4 * column_of_quad();
    LSTM_UNROLL
    for (int j = 0; j < F::kCells; ++j) {
      const unsigned unit = first_ + 4 * j;
      if (unit >= H_) return;
      std::byte* const to = slot(step, turn, j);
      copy(reinterpret_cast<Element*>(to) + 32 * share + at,
           static_cast<const Element*>(p_.gates) + 4 * row + (share * H_ + unit), unit);
      if (share == 0)
        copy(reinterpret_cast<float*>(to + kCAt) + at, static_cast<const float*>(p_.c) + row + unit,
             unit);
      if (share == 1 && p_.dy)
        copy(reinterpret_cast<Element*>(to + kDyAt) + at,
             static_cast<const Element*>(p_.dy) + row + unit, unit);
    }
  }

  LSTM_DEVICE float gate(int step, int turn, int j, int k) const {
    return to_compute(reinterpret_cast<const Element*>(slot(step, turn, j))[32 * k + mine()]);
  }
  LSTM_DEVICE float c(int step, int turn, int j) const {
    return reinterpret_cast<const float*>(slot(step, turn, j) + kCAt)[mine()];
  }
  LSTM_DEVICE float dy(int step, int turn, int j) const {
    return to_compute(reinterpret_cast<const Element*>(slot(step, turn, j) + kDyAt)[mine()]);
  }

 private:
  static LSTM_DEVICE int mine() { return 4 * column_of_quad() + unit_of_quad(); }

  LSTM_DEVICE std::byte* slot(int step, int turn, int j) const {
    const int quad = (warp() * F::kTurns + turn) * F::kCells + j;
    return bytes_ + step % kSlots * kSlotBytes + quad * kQuadBytes;
  }

  template <class Value>
  LSTM_DEVICE void copy(Value* to, const Value* from, unsigned unit) const {
    if (!params_.aligned) {
      LSTM_NO_UNROLL
      for (unsigned e = 0; e < 4 && unit + e < H_; ++e) to[e] = from[e];
    } else if constexpr (sizeof(Value) == 4) {
      ptx::cp_async16(to, from);
    } else {
      ptx::cp_async8(to, from);
    }
  }

  std::byte* bytes_;
  const BackwardParams& params_;
  const RecurrenceBackward& p_;
  unsigned H_, first_;
};

// A thread's cells of one turn, if it has any: units of one batch row, and what goes from step to step.
template <class F>
struct CellsOfTurn {
  bool in_batch;
  int64_t b;
  unsigned length;
  Schedule own;  // of this row
  // No state crosses into this step; the step processed before left a gradient of its h.
  static constexpr unsigned kFresh = 1, kCrossed = 2;
  unsigned flags;
  float dh[F::kCells], dc[F::kCells], c[F::kCells];

  LSTM_DEVICE void begin(const RecurrenceBackward& p, const Part& part, int column, bool any,
                         int time) {
    in_batch = any && column < part.rows;
    b = part.b(column);
    length = any ? unsigned(part.length(column)) : 0;
    own = {length, p.shape.B, part.schedule.reversed, nullptr, p.reset};
    flags = starts_fresh(time) ? kFresh : 0;
  }
  LSTM_DEVICE bool has(int time) const { return unsigned(time) < length; }
  LSTM_DEVICE uint8_t starts_fresh(int time) const {  // a load that nothing waits for yet
    const uint8_t* const boundary = has(time) ? own.boundary_before(time, b) : nullptr;
    return boundary ? *boundary : 0;
  }
};

}  // namespace lstm_cuda::resident
