// What the forward recurrence (rec_forward.cuh) reads of each step from global memory, and what it writes
// there.
#pragma once

#include <cstring>

#include "forward_config.cuh"

namespace lstm_cuda::resident {

// A warp's ring of gates_x for its pairs.
template <class F>
class GateRing {
  using Given = typename F::Given;
  using Compute = typename F::Compute;
  static constexpr bool kHalf = sizeof(Given) == 2;
  static constexpr int kOfWarp = F::kSlots * F::kAll * F::kSlotValues;

 public:
  static constexpr int kValues = kOfWarp * F::kGroups * F::kOwners;

  LSTM_DEVICE GateRing(ptx::Shared& shared, const void* gates, int H, const WarpRole<F>& role)
      : values_(shared.take<Given>(kValues, 16) + (role.group * F::kOwners + role.own) * kOfWarp),
        H_(H),
        aligned_((reinterpret_cast<uintptr_t>(gates) | unsigned(H) * sizeof(Given)) % 16 == 0) {}

  static LSTM_DEVICE int column() { return lane() % 8; }  // of a tile, which this lane fetches

  // Begins to copy a gate's 8 units from `unit` on, of this lane's column. To be waited for like
  // cp.async; rows that are not aligned are copied at once.
  LSTM_DEVICE void fetch(int step, int pair, const Given* row, int unit) const {
    constexpr int kPerCopy = 16 / sizeof(Given);
    Given* const to = slot(step, pair) + lane() * F::kPitch;
    const Given* const from = row + lane() / 8 * H_ + unit;
    if (aligned_) {
      LSTM_UNROLL
      for (int e = 0; e < 8; e += kPerCopy)
        if (unit + e < H_) ptx::cp_async16(to + e, from + e);
    } else {
      for (int e = 0; e < 8; ++e)
        if (unit + e < H_) to[e] = from[e];
    }
  }

  // Gate k of unit g and columns 2q and 2q + 1.
  LSTM_DEVICE void read(int step, int pair, Compute (&gates)[4][2]) const {
    if constexpr (kHalf) {
      uint32_t r[4];
      ptx::ldmatrix_x4_trans(r, slot(step, pair) + lane() * F::kPitch);
      LSTM_UNROLL
      for (int k = 0; k < 4; ++k) {
        Given both[2];
        halves(r[k], both);
        gates[k][0] = to_compute(both[0]), gates[k][1] = to_compute(both[1]);
      }
    } else {
      LSTM_UNROLL
      for (int i = 0; i < 8; ++i)
        gates[i / 2][i % 2] =
            slot(step, pair)[(i / 2 * 8 + lane() % 4 * 2 + i % 2) * F::kPitch + lane() / 4];
    }
  }

 private:
  LSTM_DEVICE Given* slot(int step, int pair) const {
    return values_ + (step % F::kSlots * F::kAll + pair) * F::kSlotValues;
  }

  Given* values_;
  int H_;
  bool aligned_;
};

// Where a step's results of a pair go. Two neighbouring units of 16 bits go out as one word: movmatrix
// gives lane (g, q) units 2q and 2q + 1 of column g.
template <class F>
struct Outputs {
  using Element = typename F::Element;
  using Compute = typename F::Compute;

  Element* y;
  Element* gates;
  Compute* c;  // null: is not wanted
  int H, row_step;
  bool save;   // gates are kept
  bool words;  // rows begin at even elements, of 16 bits

  LSTM_DEVICE Outputs(const RecurrenceForward& p, int elements_of_row)
      : y(static_cast<Element*>(p.y)),
        gates(static_cast<Element*>(p.gates)),
        c(static_cast<Compute*>(p.c)),
        H(int(p.shape.H)),
        row_step(elements_of_row),
        save(p.save),
        words(sizeof(Element) == 2 && H % 2 == 0 &&
              (reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(gates)) % 4 == 0) {}

  // at: of unit `unit` (lane 0's) and the tile's column 0, in [T, B, D, H]. Bit j of in_batch and active
  // is for columns 2q + j, bit 2 for column g. m and c_value are 0 where not active.
  LSTM_DEVICE void store(int64_t at, int unit, unsigned in_batch, unsigned active,
                         const Compute (&m)[2], const Compute (&c_value)[2],
                         const Cell<Compute> (&cells)[2]) const {
    const int g = lane() / 4, q = lane() % 4;
    const auto value = [&](int k, int j) {
      const Cell<Compute>& cell = cells[j];
      return k == 0 ? cell.i : k == 1 ? cell.f : k == 2 ? cell.g : cell.o;
    };
    const int64_t gates_at = 4 * at - 3 * unit;
    if constexpr (sizeof(Element) == 2)
      if (words) {
        const int across = g * row_step + 2 * q;
        const bool exists = unit + 2 * q < H;
        const uint32_t y_word = ptx::movmatrix(packed<F::arithmetic>(m[0], m[1]));
        if (exists && in_batch & 4) ptx::store(y + at + across, y_word);
        if (save) {
          uint32_t word[4];
          LSTM_UNROLL
          for (int k = 0; k < 4; ++k)
            word[k] = ptx::movmatrix(packed<F::arithmetic>(value(k, 0), value(k, 1)));
          Element* const to = gates + gates_at + (across + 3 * g * row_step);
          if (exists && active & 4) {
            LSTM_UNROLL
            for (int k = 0; k < 4; ++k) ptx::store(to + k * H, word[k]);
          }
        }
      }
    if (unit + g >= H) return;
    LSTM_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (!(in_batch >> j & 1)) continue;
      const int column = (2 * q + j) * row_step;
      if (c) c[at + column + g] = c_value[j];
      if (words) continue;
      y[at + column + g] = to_element<Element>(m[j]);
      if (!save || !(active >> j & 1)) continue;
      Element* const to = gates + gates_at + (4 * column + g);
      LSTM_UNROLL
      for (int k = 0; k < 4; ++k) to[k * H] = to_element<Element>(value(k, j));
    }
  }
};

}  // namespace lstm_cuda::resident
