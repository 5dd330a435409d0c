// The kernel behind cell_norms.h: a warp for each row, which reads it twice. With the mean known
// before, squares of what is left have all their bits.
#include "cell_norms.h"

#include "../schedule.h"
#include "variant.cuh"

namespace lstm_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / 32;  // of a block at once
constexpr int64_t kMaxBlocks = 4096;

struct CellNorms {
  LayerShape shape;
  CellOptions cell;
  const void *gates, *c, *c0;
  bool wide_c;
  const int64_t* lengths;
  const uint8_t* reset;
  void* to;
};

template <Arithmetic a>
LSTM_KERNEL(kThreads)
cell_norms_kernel(LSTM_PARAMETER CellNorms p) {
  using Element = typename Types<a>::Element;
  using Compute = typename Types<a>::Compute;
  const int64_t T = p.shape.T, B = p.shape.B, D = p.shape.D, H = p.shape.H;
  const Element* const gates = static_cast<const Element*>(p.gates);
  const Compute* const c = static_cast<const Compute*>(p.c);
  for (int64_t row = int64_t(ptx::block_index()) * kRows + warp(); row < T * B * D;
       row += int64_t(ptx::grid_blocks()) * kRows) {
    const int64_t d = row % D, b = row / D % B, t = row / (D * B);
    const Schedule schedule = schedule_of(p.shape, d, p.lengths, p.reset);
    if (!schedule.active(t, b)) continue;
    const bool fresh = schedule.fresh(t, b);
    const int64_t before = schedule.previous(t, b);
    const auto state = [&](int64_t unit) -> Compute {
      if (p.cell.zoneout_c <= 0) return c[row * H + unit];
      const auto gate = [&](int k) { return to_compute(gates[(4 * row + k) * H + unit]); };
      Compute c_prev = 0;
      if (!fresh)
        c_prev = before < 0 ? load_either<a>(p.c0, p.wide_c, (d * B + b) * H + unit)
                            : c[((before * B + b) * D + d) * H + unit];
      return variant_state(p.cell, Cell<Compute>{gate(0), gate(1), gate(2), gate(3), 0, 0}, c_prev);
    };
    const auto mean_of = [&](auto value) {
      Compute sum = 0;
      for (int64_t unit = lane(); unit < H; unit += 32) sum += value(state(unit));
      LSTM_UNROLL
      for (unsigned lanes = 16; lanes > 0; lanes /= 2) sum += ptx::shuffle_xor(sum, lanes);
      return sum / Compute(H);
    };
    const Compute mean = mean_of([](Compute v) { return v; });
    const Compute variance = mean_of([&](Compute v) { return (v - mean) * (v - mean); });
    if (lane() == 0) {
      Compute* const to = static_cast<Compute*>(p.to) + 2 * row;
      const Normed<Compute> normed(mean, variance);
      to[0] = normed.mean;
      to[1] = normed.rstd;
    }
  }
}

}  // namespace

Status cell_norms(const LayerShape& shape, const Variant& variant, const void* gates, const void* c,
                  const void* c0, bool wide_c, const int64_t* lengths, const uint8_t* reset,
                  void* to, Stream stream) {
  const CellNorms p{shape, variant.cell, gates, c, c0, wide_c, lengths, reset, to};
  const int64_t blocks = (shape.T * shape.B * shape.D + kRows - 1) / kRows;
  const LaunchShape grid{"cell_norms", unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks),
                         kThreads};
  return by_dtype(shape.dtype,
                  [&]<Arithmetic a>() { return launch<cell_norms_kernel<a>>(grid, p, stream); });
}

}  // namespace lstm_cuda
