// What a step of the forward recurrence (rec_forward.cuh) makes of a pair's pre-activations, by the kind of
// cell: torch.nn.LSTM's, others, and others whose rows are normalised.
//
// Rows are normalised from the mean and the sum of squared differences from it, which each octet of units
// puts to the totals of unit_totals.cuh: of what w_hh h came to, and of c. So a step waits twice more.
// Protocol, beside that of the totals: a slot's values of a step are overwritten in the next one, after the
// product of that, for which h of all units had come. Each unit's h was sent after its warp had read both
// slots. (In one block a block_sync stands between reading a slot and writing it again: the other slot's.)
#pragma once

#include <type_traits>

#include "forward_config.cuh"
#include "part.cuh"
#include "unit_totals.cuh"
#include "variant.cuh"

namespace lstm_cuda::resident {

// A pair in one step: lane (g, q) has unit `unit` + g and columns 2q and 2q + 1 of the tile.
struct PairPlace {
  int step, t, d, tile;
  int unit;                // lane 0's
  int64_t b;               // of column 2q
  bool exists[2];          // the unit, and the column's batch row
  bool live[2], first[2];  // within the row's length; its first step
  unsigned fresh;          // bit j: no state of column 2q + j crosses into this step
};

// What comes out of a step: of `both` columns at once, or of one `column` after the other, which keeps less
// in registers and is all that torch.nn.LSTM's cell needs.
template <class Compute>
struct PairResult {
  Cell<Compute> cells[2];  // activated
  Compute h[2], c[2];      // state, where the column is live
};

template <class F, class Team>
struct PlainForward {
  using Compute = typename F::Compute;
  static constexpr std::size_t kSharedBytes = 0;

  LSTM_DEVICE PlainForward(ptx::Shared&, const RecurrenceForward&, const Nothing&) {}
  LSTM_DEVICE void begin() const {}

  LSTM_DEVICE void both(const PairPlace&, const Compute (&)[2][4], const Compute (&)[4][2],
                        const Compute (&)[2], const Compute (&)[2], PairResult<Compute>&) const {}

  LSTM_DEVICE void column(const PairPlace&, int j, const Compute (&product)[2][4],
                          const Compute (&gates_x)[4][2], Compute c_before, Compute,
                          PairResult<Compute>& result) const {
    Cell<Compute>& cell = result.cells[j];
    const auto gate = [&](int k) { return product[k / 2][k % 2 * 2 + j] + gates_x[k][j]; };
    cell.i = gate(0), cell.f = gate(1), cell.g = gate(2), cell.o = gate(3);
    cell_forward<DeviceMath<F::arithmetic>>(cell, c_before);
    result.h[j] = cell.m, result.c[j] = cell.c;
  }

  // h as the next product reads it.
  LSTM_DEVICE Compute read(const PairPlace&, int, Compute h) const { return h; }
};

template <class F, class Team>
class VariantForward {
  using Compute = typename F::Compute;
  using Element = typename F::Element;
  using Math = DeviceMath<F::arithmetic>;
  static constexpr bool kNorm = F::kCell == CellKind::norm;
  static constexpr int kSources = F::shape.hidden / 8;
  enum Slot { of_product, of_c, kTotals };
  using Totals = std::conditional_t<
      !kNorm, NoTotals,
      std::conditional_t<Team::kFamily == Family::rec_cta,
                         BlockTotals<Compute, kSources, F::kTiles, kTotals>,
                         ClusterTotals<F::shape.blocks, kSources, F::kTiles, kTotals>>>;
  static_assert(!kNorm || F::kAll == 1, "a warp puts its values once before all wait");

 public:
  static constexpr std::size_t kSharedBytes = Totals::kSharedBytes;

  LSTM_DEVICE VariantForward(ptx::Shared& shared, const RecurrenceForward& p, const Variant& v)
      : p_(p), v_(v), H_(int(p.shape.H)), totals_(shared) {}
  // After the team has begun.
  LSTM_DEVICE void begin() const { totals_.begin(); }

  LSTM_DEVICE void both(const PairPlace& at, const Compute (&product)[2][4],
                        const Compute (&gates_x)[4][2], const Compute (&c)[2],
                        const Compute (&h)[2], PairResult<Compute>& result) const {
    if constexpr (kNorm) {
      Compute gates[2][4], shown[2] = {};
      LSTM_UNROLL
      for (int j = 0; j < 2; ++j) complete_product(at, j, product, gates[j]);
      normalise(at, gates);
      LSTM_UNROLL
      for (int j = 0; j < 2; ++j) {
        if (!at.live[j]) continue;
        activate_gates(at, j, gates[j], gates_x, before(at, j, c[j]), result.cells[j]);
        shown[j] = result.cells[j].c;
      }
      normalise_state(at, shown);
      LSTM_UNROLL
      for (int j = 0; j < 2; ++j)
        if (at.live[j]) finish(at, j, shown[j], before(at, j, c[j]), before(at, j, h[j]), result);
    }
  }

  LSTM_DEVICE void column(const PairPlace& at, int j, const Compute (&product)[2][4],
                          const Compute (&gates_x)[4][2], Compute c_before, Compute h_before,
                          PairResult<Compute>& result) const {
    if constexpr (!kNorm) {
      if (!at.live[j]) return;
      const Compute gates[4] = {product[0][j], product[0][2 + j], product[1][j], product[1][2 + j]};
      activate_gates(at, j, gates, gates_x, c_before, result.cells[j]);
      finish(at, j, result.cells[j].c, c_before, h_before, result);
    }
  }

  // h as the next product reads it.
  LSTM_DEVICE Compute read(const PairPlace& at, int j, Compute h) const {
    if (!v_.h_scale || !at.exists[j]) return h;
    return to_compute(as_read<F::arithmetic>(v_, state_at(at, j), to_element<Element>(h)));
  }

 private:
  LSTM_DEVICE UnitOfStep unit_of(const PairPlace& at, int j) const {
    return {at.t, at.d, at.b + j, at.unit + lane() / 4};
  }
  LSTM_DEVICE int64_t state_at(const PairPlace& at, int j) const {  // in [D, B, H]
    return (at.d * p_.shape.B + at.b + j) * H_ + at.unit + lane() / 4;
  }
  static LSTM_DEVICE Compute before(const PairPlace& at, int j, Compute state) {
    return at.fresh >> j & 1 ? Compute(0) : state;
  }

  LSTM_DEVICE void activate_gates(const PairPlace& at, int j, const Compute (&gates)[4],
                                  const Compute (&gates_x)[4][2], Compute c_before,
                                  Cell<Compute>& cell) const {
    cell.i = gates[0] + gates_x[0][j], cell.f = gates[1] + gates_x[1][j];
    cell.g = gates[2] + gates_x[2][j], cell.o = gates[3] + gates_x[3][j];
    variant_cell<Math>(v_.cell, peephole_of<Compute>(v_, H_, unit_of(at, j)), cell, c_before);
  }

  // c as the output sees it.
  LSTM_DEVICE void finish(const PairPlace& at, int j, Compute shown, Compute c_before,
                          Compute h_before, PairResult<Compute>& result) const {
    const Cell<Compute>& cell = result.cells[j];
    const UnitOfStep unit = unit_of(at, j);
    const Compute m = cell.o * activate<Math>(v_.cell.output, shown);
    result.h[j] = zoned_out(v_, Choice::h, unit, h_before, m);
    result.c[j] = zoned_out(v_, Choice::c, unit, c_before, cell.c);
  }

  // Where the state comes from outside, its product does, too; where none crosses, there is none.
  LSTM_DEVICE void complete_product(const PairPlace& at, int j, const Compute (&product)[2][4],
                                    Compute (&gates)[4]) const {
    const bool fresh = at.fresh >> j & 1;
    LSTM_UNROLL
    for (int k = 0; k < 4; ++k) gates[k] = fresh ? Compute(0) : product[k / 2][k % 2 * 2 + j];
    if (Team::kTakesState || !p_.h0_product || fresh || !at.live[j] || !at.first[j]) return;
    const Element* const from = static_cast<const Element*>(p_.h0_product) +
                                (at.d * p_.shape.B + at.b + j) * 4 * H_ + at.unit + lane() / 4;
    LSTM_UNROLL
    for (int k = 0; k < 4; ++k) gates[k] = to_compute(from[k * H_]);
  }

  // Turns w_hh h into what it adds to the pre-activations, and keeps what backward needs.
  LSTM_DEVICE void normalise(const PairPlace& at, Compute (&gates)[2][4]) const {
    put(of_product, at, gates);
    Compute mean[2], variance[2];
    get<4>(of_product, at, mean, variance);
    const int unit = at.unit + lane() / 4;
    const Compute* const gain = static_cast<const Compute*>(v_.norm) + at.d * 6 * H_ + unit;
    LSTM_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (!at.live[j]) continue;
      const Normed<Compute> normed{mean[j], variance[j]};
      const int64_t row = (int64_t(at.t) * p_.shape.B + at.b + j) * p_.shape.D + at.d;
      Compute* const kept = static_cast<Compute*>(v_.normed);
      if (kept && unit == 0) static_cast<Compute*>(v_.rstd)[row] = normed.rstd;
      LSTM_UNROLL
      for (int k = 0; k < 4; ++k) {
        const Compute value = normed(gates[j][k]);
        if (kept) kept[(row * 4 + k) * H_ + unit] = value;
        gates[j][k] = value * gain[k * H_];
      }
    }
  }

  LSTM_DEVICE void normalise_state(const PairPlace& at, Compute (&c)[2]) const {
    const Compute values[2][1] = {{c[0]}, {c[1]}};
    put(of_c, at, values);
    Compute mean[2], variance[2];
    get<1>(of_c, at, mean, variance);
    const Compute* const gain =
        static_cast<const Compute*>(v_.norm) + (at.d * 6 + 4) * H_ + at.unit + lane() / 4;
    LSTM_UNROLL
    for (int j = 0; j < 2; ++j)
      if (at.live[j]) c[j] = Normed<Compute>{mean[j], variance[j]}(c[j]) * gain[0] + gain[H_];
  }

  // Units of an octet that there are.
  LSTM_DEVICE int units_from(int first) const {
    const int left = H_ - first;
    return left < 0 ? 0 : left < 8 ? left : 8;
  }
  static LSTM_DEVICE Compute over_units(Compute v) {
    LSTM_UNROLL
    for (unsigned lanes = 4; lanes < 32; lanes *= 2) v += ptx::shuffle_xor(v, lanes);
    return v;
  }

  // Mean and squares of the octet's values, n of each unit.
  template <int n>
  LSTM_DEVICE void put(int slot, const PairPlace& at, const Compute (&values)[2][n]) const {
    const QuarterOfPair lanes;
    const int units = units_from(at.unit);
    const bool exists = lane() / 4 < units;
    Compute mean[2], squares[2];
    LSTM_UNROLL
    for (int j = 0; j < 2; ++j) {
      Compute sum = 0, rest = 0;
      LSTM_UNROLL
      for (int k = 0; k < n; ++k) sum += exists ? values[j][k] : Compute(0);
      mean[j] = over_units(sum) / Compute(n * (units > 0 ? units : 1));
      LSTM_UNROLL
      for (int k = 0; k < n; ++k) {
        const Compute difference = exists ? values[j][k] - mean[j] : Compute(0);
        rest += difference * difference;
      }
      squares[j] = over_units(rest);
    }
    totals_.put(slot, at.tile, at.unit / 8, lanes, lanes.own(mean), lanes.own(squares));
  }

  // Mean and variance of whole rows, from those of all octets.
  template <int n>
  LSTM_DEVICE void get(int slot, const PairPlace& at, Compute (&mean)[2],
                       Compute (&variance)[2]) const {
    const QuarterOfPair lanes;
    const Compute all = Compute(n * H_);
    totals_.wait(slot, at.step);
    Compute sum = 0, squares = 0;
    totals_.each(slot, at.tile, lanes, [&](int octet, Compute of_octet, Compute) {
      sum += Compute(n * units_from(8 * octet)) * of_octet;
    });
    const Compute of_row = lanes.sum(sum) / all;
    totals_.each(slot, at.tile, lanes, [&](int octet, Compute of_octet, Compute rest) {
      const Compute difference = of_octet - of_row;
      squares += rest + Compute(n * units_from(8 * octet)) * difference * difference;
    });
    lanes.spread(of_row, mean);
    lanes.spread(lanes.sum(squares) / all, variance);
  }

  const RecurrenceForward& p_;
  const Variant& v_;
  int H_;
  Totals totals_;
};

template <class F, class Team>
using ForwardCells =
    std::conditional_t<F::kCell == CellKind::plain, PlainForward<F, Team>, VariantForward<F, Team>>;

}  // namespace lstm_cuda::resident
