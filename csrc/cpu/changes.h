// The linear recurrence that derivatives of a layer obey, forwards or transposed (the formulas are
// in lstm_cuda/recurrence.py), on packed weights. Batch rows need nothing of each other: each
// worker takes some of one recurrence through all steps.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

// The cells of a run of a layer, vector by vector. Rows are numbered through T, D and B.
template <class T>
struct CellRows {
  const Cells& p;
  const T* zeros;  // 4H of them

  int64_t at(int64_t t, int64_t d, int64_t b) const { return (t * p.D + d) * p.B + b; }
  bool fresh(int64_t row) const { return p.fresh && p.fresh[row]; }

  // Whether a state passes from t-1 to t.
  bool passes(int64_t t, int64_t d, int64_t b) const {
    return t > 0 && t < p.T && !fresh(at(t, d, b));
  }
  // The cell states that enter step t.
  const T* entering(int64_t t, int64_t d, int64_t b) const {
    if (passes(t, d, b)) return static_cast<const T*>(p.c) + at(t - 1, d, b) * p.H;
    if (t > 0 || !p.c0 || fresh(at(t, d, b))) return zeros;
    return static_cast<const T*>(p.c0) + (d * p.B + b) * p.H;
  }

  LSTM_INLINE Vec<T> forget(int64_t row, int64_t j, int left) const {
    return load<T>(static_cast<const T*>(p.gates) + row * 4 * p.H + p.H + j, left);
  }
  LSTM_INLINE Cell<Vec<T>> cell(int64_t row, int64_t j, int left) const {
    Cell<Vec<T>> cell = four(p.gates, row, j, left);
    cell.c = one(p.c, row, j, left);
    return cell;
  }

  // Units from j on of one of [rows, H] or of the four of [rows, 4H]; zeros from nothing.
  LSTM_INLINE Vec<T> one(const void* of, int64_t row, int64_t j, int left) const {
    return of ? load<T>(static_cast<const T*>(of) + row * p.H + j, left) : Vec<T>{};
  }
  LSTM_INLINE Cell<Vec<T>> four(const void* of, int64_t row, int64_t j, int left) const {
    if (!of) return Cell<Vec<T>>{};
    const T* const unit = static_cast<const T*>(of) + row * 4 * p.H + j;
    return {load<T>(unit, left),
            load<T>(unit + p.H, left),
            load<T>(unit + 2 * p.H, left),
            load<T>(unit + 3 * p.H, left),
            Vec<T>{},
            Vec<T>{}};
  }
  LSTM_INLINE void put_one(void* to, int64_t row, int64_t j, const Vec<T>& v, int left) const {
    store<T>(static_cast<T*>(to) + row * p.H + j, v, left);
  }
  LSTM_INLINE void put_four(void* to, int64_t row, int64_t j, const Cell<Vec<T>>& v,
                            int left) const {
    T* const unit = static_cast<T*>(to) + row * 4 * p.H + j;
    store<T>(unit, v.i, left);
    store<T>(unit + p.H, v.f, left);
    store<T>(unit + 2 * p.H, v.g, left);
    store<T>(unit + 3 * p.H, v.o, left);
  }
};

// a and b, gate by gate.
template <class V>
LSTM_INLINE Cell<V> times(const Cell<V>& a, const Cell<V>& b) {
  return {a.i * b.i, a.f * b.f, a.g * b.g, a.o * b.o, V{}, V{}};
}
template <class V>
LSTM_INLINE Cell<V> plus(const Cell<V>& a, const Cell<V>& b) {
  return {a.i + b.i, a.f + b.f, a.g + b.g, a.o + b.o, V{}, V{}};
}

template <class T>
class Changes {
  using M = Plain<T>;
  static constexpr int lanes = kLanes<T>;

 public:
  // With a null block nothing is run; the return value is the room that is needed, in bytes.
  static int64_t run(const LinearRecurrence& p, const Parallel& parallel, void* block) {
    const auto& [steps, D, B, H, gates, c, c0, fresh] = p.cells;
    const int64_t G = 4 * H, work = steps * B * D * H * G;  // waking a worker costs as much as 10^6
    const int64_t parts = std::min<int64_t>(B, work < 2'000'000 ? 1 : parallel.threads);
    const int64_t most_rows = (B + parts - 1) / parts;
    const int64_t chunk = std::clamp<int64_t>(chunk_rows / most_rows, 1, steps);
    const bool with_x = p.transposed ? p.x : p.source_x.data;
    Arena arena(block);
    const auto panels_of = [&](int64_t features) {
      const int64_t depth = p.transposed ? G : features, columns = p.transposed ? features : G;
      return Panels<M>{arena.take<T>(Panels<M>::size(depth, columns)), depth, columns};
    };
    std::vector<Weights> weights;
    weights.reserve(D);
    for (int64_t d = 0; d < D; ++d) weights.push_back({panels_of(H), panels_of(with_x ? p.I : 0)});
    T* const zeros = arena.take<T>(G);
    T* const chunk_z = arena.take<T>(p.z ? 0 : D * parts * chunk * most_rows * G);
    if (!block) return arena.used();
    std::memset(static_cast<void*>(zeros), 0, sizeof(T) * G);

    Team team(int(std::min<int64_t>(parallel.threads, D * parts)));
    parallel.for_each(team.workers(), [&](int64_t id) {
      const FlushDenormals guard;
      Team::Worker worker(team, int(id));
      const int64_t of_W = weights[0].W.count(),
                    panels = of_W + (with_x ? weights[0].V.count() : 0);
      worker.each(D * panels, [&](int64_t item) {
        const int64_t d = item / panels, n = item % panels;
        n < of_W ? pack(p, weights[d].W, n, static_cast<const T*>(p.W) + d * G * H, H)
                 : pack(p, weights[d].V, n - of_W, static_cast<const T*>(p.V) + d * G * p.I, p.I);
      });
      worker.each(D * parts, [&](int64_t item) {
        const int64_t d = item % D, part = item / D, first = part * B / parts;
        Changes(p, weights[d], with_x, zeros, chunk_z + item * chunk * most_rows * G, d, first,
                (part + 1) * B / parts - first)
            .run(chunk);
      });
    });
    return arena.used();
  }

 private:
  static constexpr int64_t chunk_rows = 128;  // whose z stay in the cache

  struct Weights {
    Panels<M> W, V;
  };

  Changes(const LinearRecurrence& p, const Weights& weights, bool with_x, const T* zeros,
          T* chunk_z, int64_t d, int64_t first, int64_t rows)
      : p_(p),
        cells_{p.cells, zeros},
        weights_(weights),
        with_x_(with_x),
        chunk_z_(chunk_z),
        d_(d),
        first_(first),
        rows_(rows) {}

  // Panel n of w [4H, features], as the direction of the recurrence needs it.
  static void pack(const LinearRecurrence& p, const Panels<M>& panels, int64_t n, const T* w,
                   int64_t features) {
    pack_matrix<T>(panels, n, w, p.transposed ? features : 1, p.transposed ? 1 : features);
  }

  // All steps, `chunk` at a time.
  void run(int64_t chunk) const {
    const int64_t steps = p_.cells.T;
    for (int64_t done = 0; done < steps; done += chunk) {
      const int64_t count = std::min(chunk, steps - done);
      if (p_.transposed) {
        const int64_t first = steps - done - count;
        for (int64_t k = count - 1; k >= 0; --k) backwards(first + k);
        if (with_x_) to_inputs(first, count);
      } else {
        if (with_x_) from_inputs(done, count);
        for (int64_t k = 0; k < count; ++k) forwards(done + k, k);
      }
    }
  }

  // z = source_z + V source_x, for `count` steps.
  void from_inputs(int64_t start, int64_t count) const {
    const Sequence& x = p_.source_x;
    const T* const rows = static_cast<const T*>(x.data) + d_ * x.stride_d + first_ * x.stride_b;
    multiply(
        weights_.V, count * rows_, true,
        [&](int64_t q) { return source_z(start + q / rows_, q % rows_); },
        [&](int64_t q) { return rows + (start + q / rows_) * x.stride_t + q % rows_ * x.stride_b; },
        [&](int64_t q) { return z_at(start + q / rows_, q / rows_, q % rows_); });
  }

  // dx = V^T dz, likewise.
  void to_inputs(int64_t start, int64_t count) const {
    const auto row = [&](int64_t q) { return at(start + q / rows_, q % rows_); };
    multiply(
        weights_.V, count * rows_, true, [](int64_t) -> const T* { return nullptr; },
        [&](int64_t q) { return static_cast<const T*>(p_.z) + row(q) * 4 * p_.cells.H; },
        [&](int64_t q) { return static_cast<T*>(p_.x) + row(q) * p_.I; });
  }

  // Of batch row `b` of this worker's, at step t.
  int64_t at(int64_t t, int64_t b) const { return cells_.at(t, d_, first_ + b); }
  bool passes(int64_t t, int64_t b) const { return cells_.passes(t, d_, first_ + b); }

  const T* source_z(int64_t t, int64_t b) const {
    return p_.source_z ? static_cast<const T*>(p_.source_z) + at(t, b) * 4 * p_.cells.H : nullptr;
  }
  // z of step t, number k of its chunk: kept for the chunk alone where nobody wants it.
  T* z_at(int64_t t, int64_t k, int64_t b) const {
    return p_.z ? static_cast<T*>(p_.z) + at(t, b) * 4 * p_.cells.H
                : chunk_z_ + (k * rows_ + b) * 4 * p_.cells.H;
  }

  // out(q) = given(q) + operand(q) times the weights, for rows q below count; given null: zeros.
  template <class Given, class Operand, class Out>
  LSTM_INLINE void multiply(const Panels<M>& weights, int64_t count, bool product, Given given,
                            Operand operand, Out out) const {
    const int64_t columns = weights.columns;
    for (int64_t n = 0; n < weights.count(); ++n) {
      call_with_vectors(weights.vectors(n), [&]<int N>() {
        for_row_tiles(count, [&]<int R>(int64_t first) {
          Vec<T> acc[R][N];
          const T* a[R];
          for (int r = 0; r < R; ++r) {
            a[r] = operand(first + r);
            const T* const sum = given(first + r);
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) {
              const int64_t j = n * weights.width + v * lanes;
              acc[r][v] = sum ? load<T>(sum + j, lanes_left(j, columns, lanes)) : Vec<T>{};
            }
          }
          if (product) accumulate<M, R, N>(acc, a, weights.panel(n), weights.K);
          for (int r = 0; r < R; ++r) {
            T* const result = out(first + r);
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) {
              const int64_t j = n * weights.width + v * lanes;
              store<T>(result + j, acc[r][v], lanes_left(j, columns, lanes));
            }
          }
        });
      });
    }
  }

  // Step t, number k of its chunk.
  void forwards(int64_t t, int64_t k) const {
    const int64_t H = p_.cells.H;
    multiply(
        weights_.W, rows_, t > 0,
        [&](int64_t b) -> const T* { return with_x_ ? z_at(t, k, b) : source_z(t, b); },
        [&](int64_t b) {
          return passes(t, b) ? static_cast<const T*>(p_.m) + at(t - 1, b) * H : cells_.zeros;
        },
        [&](int64_t b) { return z_at(t, k, b); });
    for (int64_t b = 0; b < rows_; ++b) {
      const int64_t row = at(t, b), before = passes(t, b) ? at(t - 1, b) : -1;
      const T* const c_prev = cells_.entering(t, d_, first_ + b);
      for (int64_t j = 0; j < H; j += lanes) {
        const int left = lanes_left(j, H, lanes);
        const Cell<Vec<T>> cell = cells_.cell(row, j, left),
                           z_here = cells_.four(z_at(t, k, b), 0, j, left);
        const Vec<T> entering = load<T>(c_prev + j, left),
                     change_entering = before >= 0 ? cells_.one(p_.c, before, j, left) : Vec<T>{};
        Cell<Vec<T>> change = times(cell_slopes(cell), z_here);
        change.c = cells_.one(p_.source_c, row, j, left) + cell.f * change_entering;
        change.m = cells_.one(p_.source_m, row, j, left);
        cell_tangent<Math<T>>(cell, entering, change);
        cells_.put_one(p_.c, row, j, change.c, left);
        cells_.put_one(p_.m, row, j, change.m, left);
        if (p_.gradients) {
          const CellGradients& g = *p_.gradients;
          Cell<Vec<T>> d = cells_.four(g.source_gates, row, j, left);
          d.c = cells_.one(g.dc, row, j, left);
          d.m = cells_.one(g.dm, row, j, left);
          const Cell<Vec<T>> found =
              cell_gradients<Math<T>>(cell, entering, z_here, change.c, change_entering, d);
          cells_.put_four(g.dgates, row, j, found, left);
          cells_.put_one(g.dcells, row, j, found.c, left);
          const Vec<T> by_entering = d.c * change.f;
          if (before >= 0)
            cells_.put_one(g.dcells, before, j, cells_.one(g.dcells, before, j, left) + by_entering,
                           left);
          else if (t == 0 && g.dc0)
            cells_.put_one(g.dc0, row, j, cells_.fresh(row) ? Vec<T>{} : by_entering, left);
        }
      }
    }
  }

  void backwards(int64_t t) const {
    const int64_t H = p_.cells.H;
    const T* const source_m = static_cast<const T*>(p_.source_m);
    multiply(
        weights_.W, rows_, t + 1 < p_.cells.T,
        [&](int64_t b) { return source_m ? source_m + at(t, b) * H : nullptr; },
        [&](int64_t b) {
          return passes(t + 1, b) ? static_cast<const T*>(p_.z) + at(t + 1, b) * 4 * H
                                  : cells_.zeros;
        },
        [&](int64_t b) { return static_cast<T*>(p_.m) + at(t, b) * H; });
    for (int64_t b = 0; b < rows_; ++b) {
      const int64_t row = at(t, b), after = passes(t + 1, b) ? at(t + 1, b) : -1;
      const T* const c_prev = cells_.entering(t, d_, first_ + b);
      for (int64_t j = 0; j < H; j += lanes) {
        const int left = lanes_left(j, H, lanes);
        const Cell<Vec<T>> cell = cells_.cell(row, j, left);
        Cell<Vec<T>> d = cells_.four(p_.source_gates, row, j, left);
        d.c = cells_.one(p_.source_c, row, j, left);
        d.m = cells_.one(p_.m, row, j, left);
        if (after >= 0) d.c += cells_.forget(after, j, left) * cells_.one(p_.c, after, j, left);
        cell_adjoint<Math<T>>(cell, load<T>(c_prev + j, left), d);
        cells_.put_one(p_.c, row, j, d.c, left);
        cells_.put_four(p_.z, row, j,
                        plus(cells_.four(p_.source_z, row, j, left), times(cell_slopes(cell), d)),
                        left);
      }
    }
  }

  const LinearRecurrence& p_;
  const CellRows<T> cells_;
  const Weights& weights_;
  const bool with_x_;  // there is a product with V
  T* const chunk_z_;   // [chunk][rows][4H]
  const int64_t d_, first_, rows_;
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
