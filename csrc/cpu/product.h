// Small matrix products in registers: R rows of A times a packed panel of up to four vectors of
// columns.
//
// A panel holds, for each unit of depth k, its columns side by side: [K][columns][lanes]. A unit is
// one element, or a pair of bfloat16 where the machine multiplies pairs. Rows of A are given by
// pointers, so any gather of rows (steps, batch rows that are still active, a row of zeros after a
// reset) costs nothing.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

// Operands are elements of the compute type.
template <class T>
struct Plain {
  using Compute = T;
  using Unit = T;
  using Element = T;
  static constexpr int depth = 1;

  static LSTM_INLINE void multiply_add(Vec<T>& acc, Unit a, const Vec<T>& b) { acc += a * b; }

  // Units k .. k+lanes of one row, of which n elements are real.
  template <class S>
  static LSTM_INLINE Vec<Unit> along(const S* row, int64_t n) {
    return load<T>(row, n < kLanes<T> ? int(n) : kLanes<T>);
  }
  // Unit k of each of n columns, from the rows under it: row(e) points to row e.
  template <class Rows>
  static LSTM_INLINE Vec<Unit> across(const Rows& row, int64_t k, int64_t column, int n) {
    return load<T>(row(k) + column, n);
  }
};

#ifdef LSTM_CPU_BFLOAT16_PAIRS
// Operands are pairs of bfloat16, products and sums in float (the machine's dot-product
// instruction).
struct Pairs {
  using Compute = float;
  using Unit = uint32_t;
  using Element = BFloat16;
  static constexpr int depth = 2;

  static LSTM_INLINE void multiply_add(Vec<float>& acc, Unit a, const Vec<Unit>& b) {
    acc = bit_cast<Vec<float>>(_mm512_dpbf16_ps(
        bit_cast<__m512>(acc), bit_cast<__m512bh>(broadcast<Unit>(a)), bit_cast<__m512bh>(b)));
  }

  static LSTM_INLINE Vec<Unit> along(const BFloat16* row, int64_t n) {
    constexpr int lanes = kLanes<Unit>;
    if (n >= 2 * lanes) return load_lanes<Vec<Unit>>(reinterpret_cast<const Unit*>(row), lanes);
    uint16_t element[2 * lanes] = {};
    for (int64_t e = 0; e < n; ++e) element[e] = row[e].bits;
    return bit_cast<Vec<Unit>>(element);
  }
  // An odd last row has no partner: row(e) is null there.
  template <class Rows>
  static LSTM_INLINE Vec<Unit> across(const Rows& row, int64_t k, int64_t column, int n) {
    const BFloat16* second = row(2 * k + 1);
    const Vec<Unit> low = bits(row(2 * k) + column, n);
    return second ? low | (bits(second + column, n) << 16) : low;
  }

 private:
  static LSTM_INLINE Vec<Unit> bits(const BFloat16* p, int n) {
    return widen_bits(load_lanes<Half16>(reinterpret_cast<const uint16_t*>(p), n));
  }
};
#endif

// Units that hold n elements.
template <class M>
constexpr int64_t units(int64_t n) {
  return (n + M::depth - 1) / M::depth;
}

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Vectors per panel and rows per tile: 24 accumulators of 32 registers, or 12 of 16.
constexpr int kColumns = 4;
constexpr int kRows = LSTM_VECTOR_REGISTERS >= 32 ? 6 : 3;

// A tile has so many sums that the latency of one is hidden, or independent chains over k for each, or
// greater height.
constexpr int kSums = LSTM_VECTOR_REGISTERS >= 32 ? 12 : 8;
constexpr int chains_of(int R, int N) { return R * N >= kSums ? 1 : (2 * R * N >= kSums ? 2 : 4); }
constexpr int rows_of_one_chain(int N) { return std::max(kRows, (kSums + N - 1) / N); }

// acc[r][v] += sum over k of a[r][k] panel[k][v].
template <class M, int R, int N, int chains>
LSTM_INLINE void accumulate_block(Vec<typename M::Compute> (&acc)[R][N],
                                  const typename M::Unit* const (&a)[R],
                                  const typename M::Unit* panel, int64_t K) {
  using T = typename M::Compute;
  using Unit = typename M::Unit;
  constexpr int lanes = kLanes<Unit>;
  int64_t k = 0;
  if constexpr (chains > 1) {
    Vec<T> part[chains - 1][R][N] = {};
    for (; k + chains <= K; k += chains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < chains; ++chain) {
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
          const Vec<Unit> b = load_lanes<Vec<Unit>>(panel + ((k + chain) * N + v) * lanes, lanes);
#pragma GCC unroll 12
          for (int r = 0; r < R; ++r) {
            M::multiply_add(chain == 0 ? acc[r][v] : part[chain - 1][r][v], a[r][k + chain], b);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int chain = 0; chain < chains - 1; ++chain)
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) acc[r][v] += part[chain][r][v];
  }
  for (; k < K; ++k) {
    Vec<Unit> b[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) b[v] = load_lanes<Vec<Unit>>(panel + (k * N + v) * lanes, lanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Unit value = a[r][k];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) M::multiply_add(acc[r][v], value, b[v]);
    }
  }
}

constexpr int64_t kBlock = 512;

// What is left of a long sum after its first block. Apart, so that the accumulators of the caller
// stay in registers.
template <class M, int R, int N, int chains>
__attribute__((noinline)) void accumulate_rest(Vec<typename M::Compute> (&sum)[R][N],
                                               const typename M::Unit* const (&a)[R],
                                               const typename M::Unit* panel, int64_t K) {
  for (int64_t k = kBlock; k < K; k += kBlock) {
    Vec<typename M::Compute> part[R][N] = {};
    const typename M::Unit* here[R];
    for (int r = 0; r < R; ++r) here[r] = a[r] + k;
    accumulate_block<M, R, N, chains>(part, here, panel + k * N * kLanes<typename M::Unit>,
                                      std::min(kBlock, K - k));
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < N; ++v) sum[r][v] += part[r][v];
  }
}

// The same for any depth: long sums go in blocks, so that rounding errors grow with the number of
// blocks, not of terms. Where tiles are cut from rows of several steps, a sum must not depend on the
// height of its tile: then the number of chains is given.
template <class M, int R, int N, int chains = chains_of(R, N)>
LSTM_INLINE void accumulate(Vec<typename M::Compute> (&acc)[R][N],
                            const typename M::Unit* const (&a)[R], const typename M::Unit* panel,
                            int64_t K) {
  accumulate_block<M, R, N, chains>(acc, a, panel, std::min(kBlock, K));
  if (K <= kBlock) return;
  Vec<typename M::Compute> rest[R][N] = {};
  accumulate_rest<M, R, N, chains>(rest, a, panel, K);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) acc[r][v] += rest[r][v];
}

// The loops of the forward pass that fill accumulators carry an unroll pragma: without it GCC 12 keeps
// some of them in memory. With it, those of the backward pass were seen to lose 4 %.

// Calls body.template operator()<R>(first) for tiles that cover rows 0..count, all of nearly equal
// height.
template <int R, class Body>
LSTM_INLINE void call_with_rows(int rows, int64_t first, Body&& body) {
  if constexpr (R >= 1) {
    if (rows == R) {
      body.template operator()<R>(first);
    } else {
      call_with_rows<R - 1>(rows, first, body);
    }
  }
}

template <int most = kRows, class Body>
LSTM_INLINE void for_row_tiles(int64_t count, Body&& body) {
  const int64_t tiles = (count + most - 1) / most;
  int64_t first = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t rows = (count - first) / (tiles - tile);
    call_with_rows<most>(int(rows), first, body);
    first += rows;
  }
}

// A matrix packed as panels of consecutive columns; the last panel may be narrower than kColumns
// vectors.
template <class M>
struct Panels {
  using Unit = typename M::Unit;
  static constexpr int lanes = kLanes<Unit>;
  static constexpr int64_t width = int64_t(kColumns) * lanes;

  Unit* data;
  int64_t K;        // depth, in units
  int64_t columns;  // real columns

  static int64_t size(int64_t K, int64_t columns) { return K * round_up(columns, lanes); }
  static int64_t count(int64_t columns) { return (columns + width - 1) / width; }
  static int vectors(int64_t n, int64_t columns) {
    return int(std::min<int64_t>((columns - n * width + lanes - 1) / lanes, kColumns));
  }
  int64_t count() const { return count(columns); }
  int vectors(int64_t n) const { return vectors(n, columns); }
  Unit* panel(int64_t index) const { return data + index * width * K; }
};

// Calls body.template operator()<N>() with N = vectors.
template <int N = kColumns, class Body>
LSTM_INLINE void call_with_vectors(int vectors, Body&& body) {
  if constexpr (N >= 1) {
    if (vectors == N) {
      body.template operator()<N>();
    } else {
      call_with_vectors<N - 1>(vectors, body);
    }
  }
}

// Real lanes of the vector that starts at `column`, out of `columns`.
LSTM_INLINE int lanes_left(int64_t column, int64_t columns, int lanes) {
  const int64_t left = columns - column;
  return left >= lanes ? lanes : (left > 0 ? int(left) : 0);
}

// ---- packing ------------------------------------------------------------------------------------

// Transposes `rows` x `elements` of a row-major matrix (given by row pointers, missing rows null)
// into out[k][lane], k over units, consecutive k `stride` units apart.
template <class M, class S>
LSTM_INLINE void pack_transposed(const S* const (&row)[kLanes<typename M::Unit>], int64_t elements,
                                 typename M::Unit* out, int64_t stride) {
  using Unit = typename M::Unit;
  constexpr int lanes = kLanes<Unit>;
  for (int64_t k = 0; k < units<M>(elements); k += lanes) {
    Vec<Unit> block[lanes];
    for (int l = 0; l < lanes; ++l) {
      block[l] = row[l] ? M::along(row[l] + k * M::depth, elements - k * M::depth) : Vec<Unit>{};
    }
    transpose<1>(block);
    const int64_t left = units<M>(elements) - k;
    for (int l = 0; l < lanes && l < left; ++l)
      store_lanes(out + (k + l) * stride, block[l], lanes);
  }
}

// Packs panel n of a matrix of `columns` that lies row by row, K units deep: no transpose. row(k)
// points to row k.
template <class M, class Rows>
LSTM_INLINE void pack_panel(typename M::Unit* out, int64_t n, int64_t K, int64_t columns,
                            const Rows& row) {
  constexpr int lanes = kLanes<typename M::Unit>;
  const int vectors = Panels<M>::vectors(n, columns);
  for (int64_t k = 0; k < K; ++k) {
    for (int v = 0; v < vectors; ++v, out += lanes) {
      const int64_t column = n * Panels<M>::width + v * lanes;
      store_lanes(out, M::across(row, k, column, lanes_left(column, columns, lanes)), lanes);
    }
  }
}

// Packs panel n of a matrix with these strides between rows and between columns, one of which is 1.
template <class T>
LSTM_INLINE void pack_matrix(const Panels<Plain<T>>& panels, int64_t n, const T* w,
                             int64_t stride_row, int64_t stride_column) {
  constexpr int lanes = kLanes<T>;
  if (stride_column == 1) {
    return pack_panel<Plain<T>>(panels.panel(n), n, panels.K, panels.columns,
                                [=](int64_t k) { return w + k * stride_row; });
  }
  const int vectors = panels.vectors(n);
  for (int v = 0; v < vectors; ++v) {
    const T* row[lanes];
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t j = n * panels.width + v * lanes + l;
      row[l] = j < panels.columns ? w + j * stride_column : nullptr;
    }
    pack_transposed<Plain<T>>(row, panels.K, panels.panel(n) + v * lanes, vectors * lanes);
  }
}

}  // namespace lstm_cuda::LSTM_CPU_ISA
