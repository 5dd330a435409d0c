// Products of whole sequences with a matrix, and sums of outer products of two sequences: the large
// products of double backward and of forward mode. The arithmetic of a result does not depend on
// the number of threads.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

template <class T>
class SequenceProducts {
  using M = Plain<T>;
  static constexpr int lanes = kLanes<T>;
  static constexpr int64_t rows_of_item = 16 * kRows;
  static constexpr int64_t columns_of_item = 32;  // of a: whole vectors and cache lines
  static constexpr int64_t depth = kBlock;        // rows that are multiplied together
  static constexpr int64_t worth_waking = 2'000'000;

 public:
  // With a null block nothing is run; the return value is the room that is needed, in bytes.
  static int64_t product(const Product& p, const Parallel& parallel, void* block) {
    Arena arena(block);
    std::vector<Panels<M>> weights;
    weights.reserve(p.D);
    for (int64_t d = 0; d < p.D; ++d)
      weights.push_back({arena.take<T>(Panels<M>::size(p.m, p.n)), p.m, p.n});
    if (!block) return arena.used();

    const int64_t rows = p.T * p.B, items = (rows + rows_of_item - 1) / rows_of_item;
    Team team(workers(parallel, p.D * items, rows * p.D * p.m * p.n));
    parallel.for_each(team.workers(), [&](int64_t id) {
      const FlushDenormals guard;
      Team::Worker worker(team, int(id));
      const int64_t panels = weights[0].count();
      worker.each(p.D * panels, [&](int64_t item) {
        const int64_t d = item / panels;
        const T* const w = static_cast<const T*>(p.w) + d * p.w_stride_d;
        pack_matrix<T>(weights[d], item % panels, w, p.w_stride_row, p.w_stride_column);
      });
      worker.each(p.D * items, [&](int64_t item) {
        const int64_t d = item / items, first = item % items * rows_of_item;
        multiply(p, weights[d], d, first, std::min(rows_of_item, rows - first));
      });
    });
    return arena.used();
  }

  static int64_t outer_products(const OuterProducts& p, const Parallel& parallel, void* block) {
    const int64_t items = (p.m + columns_of_item - 1) / columns_of_item;
    Arena arena(block);
    std::vector<Panels<M>> packed;
    packed.reserve(p.D);
    for (int64_t d = 0; d < p.D; ++d)
      packed.push_back({arena.take<T>(Panels<M>::size(depth, p.n)), depth, p.n});
    Team team(workers(parallel, p.D * items, p.T * p.B * p.D * p.m * p.n));
    T* const transposed = arena.take<T>(team.workers() * columns_of_item * depth);
    if (!block) return arena.used();

    parallel.for_each(team.workers(), [&](int64_t id) {
      const FlushDenormals guard;
      Team::Worker worker(team, int(id));
      const int64_t panels = packed[0].count();
      for (int64_t first = 0; first < p.T * p.B; first += depth) {
        const int64_t count = std::min(depth, p.T * p.B - first);
        worker.each(p.D * panels, [&](int64_t item) {
          const int64_t d = item / panels, n = item % panels;
          pack_panel<M>(packed[d].panel(n), n, count, p.n,
                        [&](int64_t k) { return row(p.b, p.B, d, first + k); });
        });
        worker.each(p.D * items, [&](int64_t item) {
          T* const mine = transposed + id * columns_of_item * depth;
          add_products(p, packed[item / items], item / items, item % items * columns_of_item, first,
                       count, mine);
        });
      }
    });
    return arena.used();
  }

 private:
  static int workers(const Parallel& parallel, int64_t items, int64_t work) {
    return int(work < worth_waking ? 1 : std::min<int64_t>(parallel.threads, items));
  }

  static const T* row(const Sequence& s, int64_t B, int64_t d, int64_t q) {
    return static_cast<const T*>(s.data) + q / B * s.stride_t + d * s.stride_d + q % B * s.stride_b;
  }

  static void multiply(const Product& p, const Panels<M>& weights, int64_t d, int64_t start,
                       int64_t count) {
    for (int64_t n = 0; n < weights.count(); ++n) {
      call_with_vectors(weights.vectors(n), [&]<int N>() {
        for_row_tiles(count, [&]<int R>(int64_t first) {
          Vec<T> acc[R][N] = {};
          const T* a[R];
          for (int r = 0; r < R; ++r) a[r] = row(p.a, p.B, d, start + first + r);
          accumulate<M, R, N>(acc, a, weights.panel(n), weights.K);
          for (int r = 0; r < R; ++r) {
            const int64_t q = start + first + r;
            T* const out = static_cast<T*>(p.out) + ((q / p.B * p.D + d) * p.B + q % p.B) * p.n;
            for (int v = 0; v < N; ++v) {
              const int64_t j = n * weights.width + v * lanes;
              store<T>(out + j, acc[r][v], lanes_left(j, p.n, lanes));
            }
          }
        });
      });
    }
  }

  // What rows `first` to first + count add to some rows of the result, those of columns of a.
  static void add_products(const OuterProducts& p, const Panels<M>& packed, int64_t d,
                           int64_t column, int64_t first, int64_t count, T* transposed) {
    const int64_t columns = std::min(columns_of_item, p.m - column);
    transpose_columns(p, d, column, columns, first, count, transposed);
    T* const out = static_cast<T*>(p.out) + (d * p.m + column) * p.n;
    for (int64_t n = 0; n < packed.count(); ++n) {
      call_with_vectors(packed.vectors(n), [&]<int N>() {
        for_row_tiles(columns, [&]<int R>(int64_t top) {
          Vec<T> acc[R][N] = {};
          const T* a[R];
          for (int r = 0; r < R; ++r) a[r] = transposed + (top + r) * depth;
          accumulate<M, R, N>(acc, a, packed.panel(n), count);
          for (int r = 0; r < R; ++r) {
            for (int v = 0; v < N; ++v) {
              const int64_t j = n * packed.width + v * lanes;
              const int left = lanes_left(j, p.n, lanes);
              T* const sum = out + (top + r) * p.n + j;
              store<T>(sum, first > 0 ? load<T>(sum, left) + acc[r][v] : acc[r][v], left);
            }
          }
        });
      });
    }
  }

  // out[column][row]
  static void transpose_columns(const OuterProducts& p, int64_t d, int64_t column, int64_t columns,
                                int64_t first, int64_t count, T* out) {
    for (int64_t k = 0; k < count; k += lanes) {
      const T* rows[lanes];
      for (int l = 0; l < lanes; ++l)
        rows[l] = k + l < count ? row(p.a, p.B, d, first + k + l) + column : nullptr;
      for (int64_t j = 0; j < columns; j += lanes) {
        const int left = lanes_left(j, columns, lanes);
        Vec<T> square[lanes];
        for (int l = 0; l < lanes; ++l) square[l] = rows[l] ? load<T>(rows[l] + j, left) : Vec<T>{};
        transpose<1>(square);
        for (int l = 0; l < left; ++l) store<T>(out + (j + l) * depth + k, square[l]);
      }
    }
  }
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
