// The linear recurrence that derivatives of a layer obey, forwards or transposed (the formulas are
// in lstm_cuda/recurrence.py), on packed weights. Batch rows need nothing of each other: each
// worker takes some of one recurrence through all steps.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

template <class T>
class Changes {
  using M = Plain<T>;
  static constexpr int lanes = kLanes<T>;

 public:
  // With a null block nothing is run; the return value is the room that is needed, in bytes.
  static int64_t run(const LinearRecurrence& p, const Parallel& parallel, void* block) {
    const int64_t G = 4 * p.H, depth = p.transposed ? G : p.H, columns = p.transposed ? p.H : G;
    Arena arena(block);
    std::vector<Panels<M>> weights;
    weights.reserve(p.D);
    for (int64_t d = 0; d < p.D; ++d)
      weights.push_back({arena.take<T>(Panels<M>::size(depth, columns)), depth, columns});
    T* const zeros = arena.take<T>(G);
    if (!block) return arena.used();
    std::memset(static_cast<void*>(zeros), 0, sizeof(T) * G);

    const int64_t work = p.T * p.B * p.D * p.H * G;  // waking a worker costs as much as 10^6
    const int64_t parts = std::min<int64_t>(p.B, work < 2'000'000 ? 1 : parallel.threads);
    Team team(int(std::min<int64_t>(parallel.threads, p.D * parts)));
    parallel.for_each(team.workers(), [&](int64_t id) {
      const FlushDenormals guard;
      Team::Worker worker(team, int(id));
      const int64_t panels = weights[0].count();
      worker.each(p.D * panels, [&](int64_t item) {
        pack(p, weights[item / panels], item / panels, item % panels);
      });
      worker.each(p.D * parts, [&](int64_t item) {
        const int64_t part = item / p.D, first = part * p.B / parts;
        Changes(p, weights[item % p.D], zeros, item % p.D, first, (part + 1) * p.B / parts - first)
            .steps();
      });
    });
    return arena.used();
  }

 private:
  Changes(const LinearRecurrence& p, const Panels<M>& weights, const T* zeros, int64_t d,
          int64_t first, int64_t rows)
      : p_(p), weights_(weights), zeros_(zeros), d_(d), first_(first), rows_(rows) {}

  static void pack(const LinearRecurrence& p, const Panels<M>& panels, int64_t d, int64_t n) {
    const int64_t H = p.H;
    const T* const w = static_cast<const T*>(p.W) + d * 4 * H * H;
    if (p.transposed)
      return pack_panel<M>(panels.panel(n), n, panels.K, H,
                           [=](int64_t k) -> const T* { return w + k * H; });
    const int vectors = panels.vectors(n);
    for (int v = 0; v < vectors; ++v) {
      const T* row[lanes];
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t j = n * panels.width + v * lanes + l;
        row[l] = j < panels.columns ? w + j * H : nullptr;
      }
      pack_transposed<M>(row, H, panels.panel(n) + v * lanes, vectors * lanes);
    }
  }

  void steps() const {
    for (int64_t k = 0; k < p_.T; ++k) p_.transposed ? backwards(p_.T - 1 - k) : forwards(k);
  }

  // Of batch row `b` of this worker's, at step t: the row of all tensors, and whether a state
  // passes from t-1 to t.
  int64_t at(int64_t t, int64_t b) const { return (t * p_.D + d_) * p_.B + first_ + b; }
  bool passes(int64_t t, int64_t b) const {
    return t > 0 && t < p_.T && !(p_.fresh && p_.fresh[at(t, b)]);
  }

  // out = source + operand(b) W, over the columns of W.
  template <class Operand>
  LSTM_INLINE void multiply(int64_t t, const void* source, void* out, bool product,
                            Operand operand) const {
    const int64_t columns = weights_.columns;
    for (int64_t n = 0; n < weights_.count(); ++n) {
      call_with_vectors(weights_.vectors(n), [&]<int N>() {
        for_row_tiles(rows_, [&]<int R>(int64_t first) {
          Vec<T> acc[R][N];
          const T* a[R];
          for (int r = 0; r < R; ++r) {
            a[r] = operand(first + r);
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) {
              const int64_t j = n * weights_.width + v * lanes;
              acc[r][v] =
                  add(source, at(t, first + r) * columns + j, lanes_left(j, columns, lanes));
            }
          }
          if (product) accumulate<M, R, N>(acc, a, weights_.panel(n), weights_.K);
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) {
              const int64_t j = n * weights_.width + v * lanes;
              store<T>(static_cast<T*>(out) + at(t, first + r) * columns + j, acc[r][v],
                       lanes_left(j, columns, lanes));
            }
          }
        });
      });
    }
  }

  // The source there, or zero if there is none.
  static LSTM_INLINE Vec<T> add(const void* source, int64_t offset, int left) {
    return source ? get(source, offset, left) : Vec<T>{};
  }
  static LSTM_INLINE Vec<T> get(const void* p, int64_t offset, int left) {
    return load<T>(static_cast<const T*>(p) + offset, left);
  }
  static LSTM_INLINE void put(void* p, int64_t offset, const Vec<T>& v, int left) {
    store<T>(static_cast<T*>(p) + offset, v, left);
  }

  void forwards(int64_t t) const {
    const int64_t H = p_.H;
    multiply(t, p_.source_z, p_.z, t > 0, [&](int64_t b) {
      return passes(t, b) ? static_cast<const T*>(p_.m) + at(t - 1, b) * H : zeros_;
    });
    for (int64_t b = 0; b < rows_; ++b) {
      const int64_t row = at(t, b) * H, before = passes(t, b) ? at(t - 1, b) * H : -1;
      for (int64_t j = 0; j < H; j += lanes) {
        const int left = lanes_left(j, H, lanes);
        const auto scaled = [&](int64_t gate) {
          const int64_t offset = 4 * row + gate * H + j;
          return get(p_.K, offset, left) * get(p_.z, offset, left);
        };
        Vec<T> c = add(p_.source_c, row + j, left) + scaled(0) + scaled(1) + scaled(2);
        if (before >= 0) c += get(p_.F, row + j, left) * get(p_.c, before + j, left);
        const Vec<T> m = add(p_.source_m, row + j, left) + get(p_.R, row + j, left) * c + scaled(3);
        put(p_.c, row + j, c, left);
        put(p_.m, row + j, m, left);
      }
    }
  }

  void backwards(int64_t t) const {
    const int64_t H = p_.H;
    multiply(t, p_.source_m, p_.m, t + 1 < p_.T, [&](int64_t b) {
      return passes(t + 1, b) ? static_cast<const T*>(p_.z) + at(t + 1, b) * 4 * H : zeros_;
    });
    for (int64_t b = 0; b < rows_; ++b) {
      const int64_t row = at(t, b) * H, after = passes(t + 1, b) ? at(t + 1, b) * H : -1;
      for (int64_t j = 0; j < H; j += lanes) {
        const int left = lanes_left(j, H, lanes);
        const Vec<T> dm = get(p_.m, row + j, left);
        Vec<T> dc = add(p_.source_c, row + j, left) + get(p_.R, row + j, left) * dm;
        if (after >= 0) dc += get(p_.F, after + j, left) * get(p_.c, after + j, left);
        put(p_.c, row + j, dc, left);
        for (int64_t gate = 0; gate < 4; ++gate) {
          const int64_t offset = 4 * row + gate * H + j;
          put(p_.z, offset,
              add(p_.source_z, offset, left) + get(p_.K, offset, left) * (gate < 3 ? dc : dm),
              left);
        }
      }
    }
  }

  const LinearRecurrence& p_;
  const Panels<M>& weights_;
  const T* const zeros_;
  const int64_t d_, first_, rows_;
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
