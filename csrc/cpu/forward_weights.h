// The weights of the forward pass: packed so that the gates of a group of hidden units lie side by
// side, or read straight from the parameter where packing costs more than it gains.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

// Packed weights of one direction, shared by all threads.
template <class M>
struct ForwardWeights {
  using T = typename M::Compute;
  using Unit = typename M::Unit;
  Unit* w_ih;      // [groups][units(I)][4][lanes] or null
  Unit* w_hh;      // [groups][units(P)][4][lanes] or null
  T* bias;         // [groups][4][lanes], b_ih + b_hh
  Panels<M> w_hr;  // columns P, depth units(H)

  static int64_t groups(int64_t H) { return (H + kLanes<T> - 1) / kLanes<T>; }

  void reserve(Arena& arena, const LayerForward& p, const CpuPlan& plan) {
    const LayerShape& s = p.shape;
    const int64_t padded = groups(s.H) * 4 * kLanes<T>;
    bias = arena.take<T>(padded);
    w_ih = plan.input == Weights::packed && p.w_ih ? arena.take<Unit>(padded * units<M>(s.I))
                                                   : nullptr;
    w_hh = plan.recurrent == Weights::packed && (s.T > 1 || p.h0)
               ? arena.take<Unit>(padded * units<M>(s.P))
               : nullptr;
    w_hr = {s.projected ? arena.take<Unit>(Panels<M>::size(units<M>(s.H), s.P)) : nullptr,
            units<M>(s.H), s.P};
  }

  // Packs group n of direction d.
  template <class S>
  void pack(const LayerForward& p, int64_t d, int64_t n) const {
    const LayerShape& s = p.shape;
    constexpr int lanes = kLanes<T>;
    const int64_t j0 = n * lanes;
    const int left = lanes_left(j0, s.H, lanes);
    for (int gate = 0; gate < 4; ++gate) {
      Vec<T> b{};
      if (p.b_ih) {
        b = load<T>(static_cast<const S*>(p.b_ih[d]) + gate * s.H + j0, left) +
            load<T>(static_cast<const S*>(p.b_hh[d]) + gate * s.H + j0, left);
      }
      store<T>(bias + (n * 4 + gate) * lanes, b);
    }
    if (w_ih) pack_group(static_cast<const S*>(p.w_ih[d]), s.H, s.I, n, group_of(w_ih, s.I, n));
    if (w_hh) pack_group(static_cast<const S*>(p.w_hh[d]), s.H, s.P, n, group_of(w_hh, s.P, n));
  }

  static Unit* group_of(Unit* w, int64_t K, int64_t n) {
    return w + n * units<M>(K) * 4 * kLanes<T>;
  }

  // Packs the four gates of group n of a [4H, K] parameter.
  template <class S>
  static void pack_group(const S* w, int64_t H, int64_t K, int64_t n, Unit* out) {
    constexpr int lanes = kLanes<T>;
    for (int gate = 0; gate < 4; ++gate) {
      const S* row[lanes];
      for (int l = 0; l < lanes; ++l)
        row[l] = n * lanes + l < H ? w + (gate * H + n * lanes + l) * K : nullptr;
      pack_transposed<M>(row, K, out + gate * lanes, 4 * lanes);
    }
  }

  // Packs panel n of w_hr, whose columns are the P rows of the parameter.
  template <class S>
  void pack_projection(const LayerForward& p, int64_t d, int64_t n) const {
    constexpr int lanes = kLanes<T>;
    const int vectors = w_hr.vectors(n);
    for (int v = 0; v < vectors; ++v) {
      const S* row[lanes];
      for (int l = 0; l < lanes; ++l) {
        const int64_t column = n * w_hr.width + v * lanes + l;
        row[l] =
            column < w_hr.columns ? static_cast<const S*>(p.w_hr[d]) + column * p.shape.H : nullptr;
      }
      pack_transposed<M>(row, p.shape.H, w_hr.panel(n) + v * lanes, vectors * lanes);
    }
  }
};

// Straight from the parameter, for groups n0 .. n1: out(q)[gate * H + j] += sum over k of w[gate *
// H + j][k] a(q)[k], q below count. A vector of outputs is the sums over the lanes of as many
// accumulators: transposing and adding in turns halves them to one. Each weight is read once from
// memory, whatever the count.
template <class T, class S, class Operand, class Output>
LSTM_INLINE void multiply_unpacked(const S* w, int64_t H, int64_t K, int64_t n0, int64_t n1,
                                   int64_t count, Operand a, Output out) {
  constexpr int lanes = kLanes<T>;
  for (int gate = 0; gate < 4; ++gate) {
    for (int64_t j = n0 * lanes; j < std::min(n1 * lanes, H); j += lanes) {
      const int left = lanes_left(j, H, lanes);
      const S* row[lanes];
      for (int l = 0; l < lanes; ++l) row[l] = w + (gate * H + j + (l < left ? l : 0)) * K;
      for (int64_t q = 0; q < count; ++q) {
        Vec<T> acc[lanes] = {};
        int64_t k = 0;
        for (; k + lanes <= K; k += lanes) {
          const Vec<T> value = load<T>(a(q) + k);
#pragma GCC unroll 16
          for (int l = 0; l < lanes; ++l) acc[l] += load<T>(row[l] + k) * value;
        }
        if (k < K) {
          const Vec<T> value = load<T>(a(q) + k, int(K - k));
#pragma GCC unroll 16
          for (int l = 0; l < lanes; ++l) acc[l] += load<T>(row[l] + k, int(K - k)) * value;
        }
        add_across<1>(acc);
        T* target = out(q) + gate * H + j;
        store<T>(target, load<T>(target, left) + acc[0], left);
      }
    }
  }
}

}  // namespace lstm_cuda::LSTM_CPU_ISA
