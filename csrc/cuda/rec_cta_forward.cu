// rec_cta forward: all steps of one tile of 8 batch rows and one recurrence in one block.
//
//   each step:  gates = gates_x[t] + w_hh h[t-1];  cell (cell.h);  h[t], c[t]
//
// Grid: D * ceil(B / 8) blocks that know nothing of each other. Block: one warp for 8 hidden units.
//   Warp w, atom 0: rows 0-7 gate i, rows 8-15 gate f of units 8w..8w+7; atom 1: gates g and o. So
//   lane (g, q) gets all four gates of unit 8w + g for columns 2q and 2q + 1 and has their h and c
//   in registers for all steps.
// Weights: w_hh stays in registers. Units past H are zeros there and never become active.
// Shared memory:
//   h        [2 steps][padded H] x 8 columns   what the product reads and what this step writes
//   gates_x  [4 steps][8 columns][4H]          ring, filled three steps ahead by cp.async
//   Before the first step the ring is where w_hh passes through.
// Protocol: one block_sync a step. Step s reads h[s % 2] and slot s % 4, writes h[(s + 1) % 2] and
// begins to fill slot (s + 3) % 4, which step s - 1 read. The barrier at the end of step s
// therefore ends four hazards: h[(s + 1) % 2] is complete before step s + 1 reads it, and h[s % 2]
// is read before step s + 1 writes it; slot (s + 1) % 4 is complete (every thread has waited for
// its own copies), and slot s % 4 is read before step s + 1 fills it.
#include "rec_cta.cuh"

namespace lstm_cuda {
namespace rec_cta {

// Which gate and which unit of the warp a row of its product is; k is the unit whose h it
// multiplies.
template <int kPadded_>
struct ForwardRows {
  static constexpr int kPadded = kPadded_;
  static constexpr int kThreads = kPadded / 8 * 32;
  static constexpr bool kTransposed = false;
  static LSTM_DEVICE int first_unit() { return int(ptx::thread_index()) / 32 * 8; }
  static LSTM_DEVICE int gate(int atom, int half, int) { return 2 * atom + half; }
  static LSTM_DEVICE int unit(int) { return 0; }
};

template <Arithmetic arithmetic_, int kPadded_>
struct ForwardTraits {
  static constexpr Arithmetic arithmetic = arithmetic_;
  using Element = typename Types<arithmetic>::Element;
  using Compute = typename Types<arithmetic>::Compute;
  static constexpr int kPadded = kPadded_;
  using Rows = ForwardRows<kPadded>;
  static constexpr int kThreads = Rows::kThreads;
  using Tile = OperandTile<Element, kPadded>;
  // 16 warps hide each other's latencies, and have no registers for more sums.
  using Product = rec_cta::Product<arithmetic, 2, kPadded, kPadded == 128 ? 1 : 2>;
  using Gates = RowRing<Element, 4 * kPadded, kThreads>;
  static constexpr std::size_t kSharedBytes =
      (2 * Tile::kValues + Gates::kValues) * sizeof(Element);
  static_assert(WeightPanel<Element, kPadded>::kValues <= Gates::kValues);
  static_assert(kPadded % 32 == 0 && kThreads <= 1024);
  static_assert(kSharedBytes <= 99 * 1024, "what a block of every architecture may have");
};

struct ForwardParams {
  RecurrenceForward problem;          // its lists of weights are in host memory
  const void* w_hh[kMaxRecurrences];  // [4H, H] each
  int row_step;                       // elements of [T, B, D, H] from row to row
  int64_t time_step;                  // and from time to time
};

template <class F>
LSTM_KERNEL(F::kThreads, 1)
forward_kernel(LSTM_PARAMETER ForwardParams params) {
  using Element = typename F::Element;
  using Compute = typename F::Compute;
  using Tile = typename F::Tile;
  const RecurrenceForward& p = params.problem;
  const int H = int(p.shape.H);
  const Part part = part_of_block(p.shape, p.lengths, p.reset);
  const Schedule& schedule = part.schedule;
  const int steps = int(schedule.T);
  const int q = lane() % 4;
  const int unit = int(ptx::thread_index()) / 32 * 8 + lane() / 4;
  Element* const gates = static_cast<Element*>(p.gates);
  Element* const y = static_cast<Element*>(p.y);
  Compute* const c_out = static_cast<Compute*>(p.c);

  ptx::Shared shared;
  const typename F::Gates gates_x(shared, gates, 4 * H);
  Element* const h_tiles = shared.take<Element>(2 * Tile::kValues, 16);

  typename F::Product product;
  load_weights<typename F::Rows>(product, gates_x.values, params.w_hh[part.d], H);

  // Fetch gates_x of the first steps.
  const int64_t time_step = schedule.reversed ? -params.time_step : params.time_step;
  int64_t tile_at = part.row(p.shape, schedule.time(0), part.b(0)) * H;  // in [T, B, D, H]
  const int fetched_length = part.length(F::Gates::column_to_fetch());
  const auto fetch = [&](int step, int64_t at) {
    if (step < steps && schedule.time(step) < fetched_length)
      gates_x.fetch(step, gates + 4 * (at + F::Gates::column_to_fetch() * params.row_step));
    ptx::cp_async_commit();  // one group a step, even an empty one: the wait counts groups
  };
  LSTM_UNROLL
  for (int step = 0; step < kSlots - 1; ++step) fetch(step, tile_at + step * time_step);

  // This thread's two cells, and h for the first step.
  int length[2];
  Element h[2];
  Compute c[2];
  const auto exists = [&](int j) { return 2 * q + j < part.rows && unit < H; };
  LSTM_UNROLL
  for (int j = 0; j < 2; ++j) {
    const int64_t at = (part.d * p.shape.B + part.b(2 * q + j)) * H + unit;
    length[j] = unit < H ? part.length(2 * q + j) : 0;
    h[j] =
        exists(j) && p.h0 ? static_cast<const Element*>(p.h0)[at] : to_element<Element>(Compute(0));
    c[j] = exists(j) && p.c0 ? to_compute(static_cast<const Element*>(p.c0)[at]) : Compute(0);
  }
  // Bits 0 and 1: no state of columns 2q and 2q + 1 crosses into this step. Bits 2 and 3: into the
  // next one. (As flags each would take a register.)
  const auto starts_fresh = [&](int step) {
    return part.fresh(step, schedule.time(step), 2 * q, length);
  };
  unsigned fresh = starts_fresh(0) | starts_fresh(1) << 2;
  LSTM_UNROLL
  for (int j = 0; j < 2; ++j)
    Tile{h_tiles}.at(unit, 2 * q + j) =
        fresh >> j & 1 ? to_element<Element>(Compute(0)) : operand<F::arithmetic>(h[j]);
  ptx::cp_async_wait<kSlots - 2>();
  ptx::block_sync();  // h and gates_x of the first step are complete before it reads them

  for (int step = 0; step < steps; ++step, tile_at += time_step) {
    const int t = int(schedule.time(step));
    fetch(step + kSlots - 1, tile_at + (kSlots - 1) * time_step);
    const unsigned fresh_later = starts_fresh(step + 2) << 2;
    Compute sums[2][4];
    product.multiply(Tile{h_tiles + step % 2 * Tile::kValues}, sums);

    // The cells; h first of all to where the next step reads it.
    Cell<Compute> cells[2];
    bool active[2];
    LSTM_UNROLL
    for (int j = 0; j < 2; ++j) {
      Cell<Compute>& cell = cells[j];
      const auto gate_x = [&](int gate) {
        return to_compute(gates_x.at(step, 2 * q + j, gate * H + unit));
      };
      cell.i = sums[0][j] + gate_x(0);
      cell.f = sums[0][2 + j] + gate_x(1);
      cell.g = sums[1][j] + gate_x(2);
      cell.o = sums[1][2 + j] + gate_x(3);
      cell_forward<DeviceMath<F::arithmetic>>(cell, fresh >> j & 1 ? Compute(0) : c[j]);
      active[j] = t < length[j];
      h[j] = active[j] ? to_element<Element>(cell.m) : h[j];
      c[j] = active[j] ? cell.c : c[j];
      Tile{h_tiles + (step + 1) % 2 * Tile::kValues}.at(unit, 2 * q + j) =
          fresh >> (2 + j) & 1 ? to_element<Element>(Compute(0)) : operand<F::arithmetic>(h[j]);
    }
    fresh = fresh >> 2 | fresh_later;

    LSTM_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (!exists(j)) continue;
      const int64_t row_at = tile_at + (2 * q + j) * params.row_step;
      y[row_at + unit] = active[j] ? h[j] : to_element<Element>(Compute(0));
      if (c_out) c_out[row_at + unit] = active[j] ? c[j] : Compute(0);
      if (p.save && active[j]) {
        Element* const out = gates + 4 * row_at + unit;
        out[0] = to_element<Element>(cells[j].i);
        out[H] = to_element<Element>(cells[j].f);
        out[2 * H] = to_element<Element>(cells[j].g);
        out[3 * H] = to_element<Element>(cells[j].o);
      }
    }
    ptx::cp_async_wait<kSlots - 2>();
    ptx::block_sync();  // the four hazards of the protocol above
  }

  // State after each row's last step, and zeros where no row of the tile has steps.
  LSTM_UNROLL
  for (int j = 0; j < 2; ++j) {
    if (!exists(j)) continue;
    const int64_t at = (part.d * p.shape.B + part.b(2 * q + j)) * H + unit;
    static_cast<Element*>(p.h_n)[at] = h[j];
    static_cast<Element*>(p.c_n)[at] = to_element<Element>(c[j]);
    for (int64_t t = steps; t < p.shape.T; ++t) {
      const int64_t row = part.row(p.shape, t, part.b(2 * q + j));
      y[row * H + unit] = to_element<Element>(Compute(0));
      if (c_out) c_out[row * H + unit] = Compute(0);
    }
  }
}

template <Arithmetic arithmetic, int kPadded>
Status start_forward(const ForwardParams& params, Stream stream) {
  using F = ForwardTraits<arithmetic, kPadded>;
  const LaunchShape shape{.kernel = "rec_cta_forward",
                          .blocks = blocks_of(params.problem.shape),
                          .threads = F::kThreads,
                          .shared_bytes = F::kSharedBytes};
  return launch<forward_kernel<F>>(shape, params, stream);
}

}  // namespace rec_cta

Status rec_cta_forward(const RecurrenceForward& p, const CudaPlan& plan, Stream stream) {
  using rec_cta::start_forward;
  const Status status = rec_cta::check("rec_cta_forward", p.shape, plan);
  if (!status.ok()) return status;
  rec_cta::ForwardParams params{
      p, {}, int(p.shape.D * p.shape.H), p.shape.B * p.shape.D * p.shape.H};
  for (int64_t d = 0; d < p.shape.D; ++d) params.w_hh[d] = p.w_hh[d];
  switch (plan.arithmetic) {
    case Arithmetic::float64:
      if (plan.padded_hidden == 32) return start_forward<Arithmetic::float64, 32>(params, stream);
      break;
    case Arithmetic::float32:
      if (plan.padded_hidden == 32) return start_forward<Arithmetic::float32, 32>(params, stream);
      if (plan.padded_hidden == 64) return start_forward<Arithmetic::float32, 64>(params, stream);
      break;
    case Arithmetic::tf32:
      if (plan.padded_hidden == 32) return start_forward<Arithmetic::tf32, 32>(params, stream);
      if (plan.padded_hidden == 64) return start_forward<Arithmetic::tf32, 64>(params, stream);
      break;
    case Arithmetic::float16:
      if (plan.padded_hidden == 32) return start_forward<Arithmetic::float16, 32>(params, stream);
      if (plan.padded_hidden == 64) return start_forward<Arithmetic::float16, 64>(params, stream);
      if (plan.padded_hidden == 128) return start_forward<Arithmetic::float16, 128>(params, stream);
      break;
    case Arithmetic::bfloat16:
      if (plan.padded_hidden == 32) return start_forward<Arithmetic::bfloat16, 32>(params, stream);
      if (plan.padded_hidden == 64) return start_forward<Arithmetic::bfloat16, 64>(params, stream);
      if (plan.padded_hidden == 128)
        return start_forward<Arithmetic::bfloat16, 128>(params, stream);
      break;
  }
  return rec_cta::unsupported("rec_cta_forward", plan);
}

}  // namespace lstm_cuda
