// The team of family rec_cta for rec_forward.cuh: one block, which knows nothing of any other.
//
// Weights: w_hh as it is, in registers for all steps. Units past H are zeros there and never active.
// Shared memory: h [2 steps][padded H] x 8 columns, what the product reads and what this step writes;
// before the first step w_hh passes through.
// Protocol: one block_sync a step. Step s reads h[s % 2] and writes h[(s + 1) % 2]. The barrier before
// the product of step s ends two hazards: h[s % 2] is complete, and h[(s + 1) % 2] is read by all (in
// step s - 1) before step s writes it.
#pragma once

#include "rec_cta.cuh"
#include "rec_forward.cuh"

namespace lstm_cuda::rec_cta {

// Which gate and which unit of the warp a row of its product is; k is the unit whose h it
// multiplies.
template <int kPadded_>
struct ForwardRows {
  static constexpr int kPadded = kPadded_;
  static constexpr int kThreads = kPadded / 8 * 32;
  static constexpr bool kTransposed = false;
  static LSTM_DEVICE int first_unit() { return warp() * 8; }
  static LSTM_DEVICE int gate(int atom, int half, int) { return 2 * atom + half; }
  static LSTM_DEVICE int unit(int) { return 0; }
};

template <class F>
class Team {
  using Element = typename F::Element;
  using Compute = typename F::Compute;
  static constexpr int kPadded = F::shape.hidden;
  using Rows = ForwardRows<kPadded>;
  using Tile = OperandTile<Element, kPadded>;
  using Panel = WeightPanel<Element, kPadded>;
  static_assert(Rows::kThreads == F::kThreads && F::kOwned == 1);

 public:
  static constexpr Family kFamily = Family::rec_cta;
  static constexpr bool kTakesState = true;
  static constexpr std::size_t kSharedBytes =
      std::max(2 * Tile::kValues, Panel::kValues) * sizeof(Element);
  struct Source {
    const void* w_hh[kMaxRecurrences];  // [4H, H] each
  };

  LSTM_DEVICE Team(ptx::Shared& shared, const Source& source, const resident::WarpRole<F>&, int d,
                   int H)
      : tiles_(shared.take<Element>(kSharedBytes / sizeof(Element), 16)) {
    load_weights<Rows>(product_, tiles_, source.w_hh[d], H);
  }

  LSTM_DEVICE void sums(int step, int, Compute (&own)[1][2][4]) const {
    ptx::block_sync();  // the two hazards of the protocol above
    product_.multiply(tile(step), own[0]);
  }

  LSTM_DEVICE void send(int step, int octet, int, Compute h0, Compute h1) const {
    const int unit = 8 * octet + lane() / 4, column = lane() % 4 * 2;
    tile(step).at(unit, column) = operand<F::arithmetic>(to_element<Element>(h0));
    tile(step).at(unit, column + 1) = operand<F::arithmetic>(to_element<Element>(h1));
  }

 private:
  LSTM_DEVICE Tile tile(int step) const { return {tiles_ + step % 2 * Tile::kValues}; }

  Element* tiles_;
  // 16 warps hide each other's latencies, and have no registers for more sums.
  Product<F::arithmetic, 2, kPadded, kPadded == 128 ? 1 : 2> product_;
};

template <CellKind cell>
Status forward(const char* kernel, const RecurrenceForward& p, const CudaPlan& plan,
               Stream stream) {
  const auto start = [&]<Arithmetic arithmetic, int padded>(unsigned parts) {
    constexpr ResidentShape shape{padded, 1, padded / 8, 1, 0, 0};
    using F = resident::ForwardConfig<arithmetic, shape, 1, 1, cell>;
    using Team = rec_cta::Team<F>;
    typename Team::Source source{};
    for (int64_t d = 0; d < p.shape.D; ++d) source.w_hh[d] = p.w_hh[d];
    return resident::start_forward<F, Team>(kernel, p, source, 0, parts, stream);
  };
  return launch_planned<cell, false>(kernel, p.shape, plan, start);
}

}  // namespace lstm_cuda::rec_cta
