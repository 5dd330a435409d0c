// The large products of the backward pass, for a chunk of steps of one direction while its dgates
// are in the cache:
//   dx += dgates w_ih          dw_ih += dgates^T x      dw_hh += dgates^T h_prev
//   db += sum of dgates        dw_hr += dh^T m
// Only rows that are active take part, so what stands past a row's length reaches nothing. Each is
// cut into items that write apart from each other.
//
// Sums of weight gradients go from the last step to the first, each span of steps summed by itself
// and then added. Spans are those of the whole sequence: one that a call has begun and not finished
// is handed on to the next.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

// Where the gradients of the weights of one direction are summed; null where they are not wanted.
template <class T>
struct WeightGradients {
  T* w_ih;  // [4H, I]
  T* w_hh;  // [4H, P]
  T* b;     // [4H]
  T* w_hr;  // [P, H], with projection
  T* more;  // [sums of VariantRows, H]

  struct Sizes {
    int64_t w_ih, w_hh, b, w_hr, more;
    explicit Sizes(const LayerBackward& p)
        : w_ih(p.w_ih ? 4 * p.shape.H * p.shape.I : 0),
          w_hh(4 * p.shape.H * p.shape.P),
          b(p.w_ih ? 4 * p.shape.H : 0),
          w_hr(p.shape.projected ? p.shape.P * p.shape.H : 0),
          more(p.variant ? VariantRows<T>::sums(*p.variant) * p.shape.H : 0) {}
    int64_t all() const { return w_ih + w_hh + b + w_hr + more; }
  };
  static WeightGradients at(T* first, const Sizes& size) {
    T* const w_hh = first + size.w_ih;
    T* const b = w_hh + size.w_hh;
    return {first, w_hh, b, b + size.b, b + size.b + size.w_hr};
  }
};

// The sums of one direction and part of the batch.
template <class T>
struct WeightSums {
  WeightGradients<T> all;    // of the spans that are finished
  WeightGradients<T> begun;  // of the one that another call finishes; null if all steps are here
};

template <class S, class M>
class GradientJob {
  using T = typename M::Compute;
  using Unit = typename M::Unit;
  using Element = typename M::Element;
  static constexpr int lanes = kLanes<T>;
  static constexpr int64_t block = 48;  // gate columns of an item: whole row tiles, whole vectors

  struct Product {
    const Element *dgates, *dh, *m;
    const S *x, *h_prev;
    T* dx;
    const T* more;
  };

 public:
  // What each worker makes for itself: the chunk's active rows, and a panel of the other operand.
  struct Walk {
    Product* product;
    int64_t count;
    int64_t* start;  // of each span, a product; after the last, count
    int64_t spans;
    bool begun_before, goes_on;  // the first span, and the last
    Unit* panel;
  };

  GradientJob(const LayerBackward& p, const BackwardWeights<M>& w,
              const ChunkGradients<S, M>& chunk, const WeightSums<T>& dw, int64_t span,
              Arena& arena)
      : p_(p),
        s_(p.shape),
        w_(w),
        chunk_(chunk),
        dw_(dw),
        span_(span),
        d_(chunk.d),
        G_(4 * s_.H),
        most_(chunk.steps * chunk.rows),
        depth_(round_up(units<M>(most_), kLanes<Unit>)),
        schedule_(schedule_of(s_, d_, p.lengths, p.reset)) {
    zeros_ = arena.take<S>(s_.P);
    if (p.sums_weights()) transposed_ = arena.take<Unit>((G_ + dh_columns()) * depth_);
  }

  Walk walk(Arena& arena) const {
    const int64_t panel = std::max(p_.sums_weights() ? units<M>(most_) : 0,
                                   p_.dx && w_.w_ih_on_the_way ? units<M>(G_) : 0);
    Walk walk{};
    walk.product = arena.take<Product>(most_);
    walk.start = arena.take<int64_t>(chunk_.steps / span_ + 3);
    walk.panel = arena.take<Unit>(panel * Panels<M>::width);
    return walk;
  }

  void start() const {
    std::memset(static_cast<void*>(zeros_), 0, sizeof(S) * s_.P);
    if (p_.sums_weights() && p_.others.after == 0) {
      std::memset(static_cast<void*>(dw_.all.w_ih), 0, sizeof(T) * G_ * inputs());
      std::memset(static_cast<void*>(dw_.all.w_hh), 0, sizeof(T) * G_ * s_.P);
      if (p_.w_ih) std::memset(static_cast<void*>(dw_.all.b), 0, sizeof(T) * G_);
      if (s_.projected) std::memset(static_cast<void*>(dw_.all.w_hr), 0, sizeof(T) * s_.P * s_.H);
      if (chunk_.extra) std::memset(static_cast<void*>(dw_.all.more), 0, sizeof(T) * chunk_.extra);
    }
    for (int64_t t = 0; p_.dx && d_ == 0 && t < s_.T; ++t) {
      const int64_t width = s_.inputs * s_.I;
      T* const dx = static_cast<T*>(p_.dx) + (t * s_.B + chunk_.b0) * width;
      std::memset(static_cast<void*>(dx), 0, sizeof(T) * chunk_.rows * width);
    }
  }

  // The active rows of steps last-1 .. first, all in the order opposite to memory's: caches follow
  // that.
  void plan_chunk(Walk& walk, int64_t first, int64_t last) const {
    const int64_t before = p_.others.before, input = s_.input_of(d_);
    walk.count = walk.spans = 0;
    walk.begun_before = last == s_.T && p_.others.after > 0 && (before + last) % span_ != 0;
    walk.goes_on = first == 0 && before % span_ != 0;
    for (int64_t index = last - 1; index >= first; --index) {
      const int64_t t = schedule_.time(index);
      if (index == last - 1 || (before + index + 1) % span_ == 0)
        walk.start[walk.spans++] = walk.count;
      for (int64_t row = chunk_.rows - 1; row >= 0; --row) {
        const int64_t b = chunk_.b0 + row;
        if (!schedule_.active(t, b)) continue;
        const int64_t slot = chunk_.slot(index, row), previous = schedule_.previous(t, b);
        const S* h_prev = zeros_;
        if (!schedule_.fresh(t, b)) {
          if (previous >= 0)
            h_prev = static_cast<const S*>(p_.y) + ((previous * s_.B + b) * s_.D + d_) * s_.P;
          if (previous < 0 && p_.h0) h_prev = static_cast<const S*>(p_.h0) + (d_ * s_.B + b) * s_.P;
        }
        if (chunk_.h) h_prev = chunk_.h_at(slot);
        walk.product[walk.count++] = {
            chunk_.dgates_at(slot),
            chunk_.dh_at(slot),
            chunk_.m_at(slot),
            static_cast<const S*>(p_.x) + t * p_.x_stride_t + b * p_.x_stride_b + input * s_.I,
            h_prev,
            p_.dx ? static_cast<T*>(p_.dx) + ((t * s_.B + b) * s_.inputs + input) * s_.I : nullptr,
            chunk_.sums_at(slot)};
      }
    }
    walk.start[walk.spans] = walk.count;
  }

  int64_t input_items() const { return p_.dx && p_.w_ih ? w_.w_ih.count() : 0; }

  // Panel n of dx += dgates w_ih.
  void input_gradient(const Walk& walk, int64_t n) const {
    const Unit* const panel = w_.template input_panel<S>(p_, d_, n, walk.panel);
    call_with_vectors(w_.w_ih.vectors(n), [&]<int N>() {
      for_row_tiles(walk.count, [&]<int R>(int64_t first) {
        Vec<T> acc[R][N] = {};
        const Unit* a[R];
        for (int r = 0; r < R; ++r)
          a[r] = reinterpret_cast<const Unit*>(walk.product[first + r].dgates);
        accumulate<M, R, N, chains_of(kRows, N)>(acc, a, panel, w_.w_ih.K);
        for (int r = 0; r < R; ++r) {
          for (int v = 0; v < N; ++v) {
            const int64_t j = n * w_.w_ih.width + v * lanes;
            const int left = lanes_left(j, s_.I, lanes);
            T* dx = walk.product[first + r].dx + j;
            store<T>(dx, load<T>(dx, left) + acc[r][v], left);
          }
        }
      });
    });
  }

  // First the transposes, with the bias on the way; then the products, which need all of them.
  int64_t transpose_items() const {
    return p_.sums_weights() ? blocks(G_) + blocks(dh_columns()) + blocks(chunk_.extra) : 0;
  }
  void transpose_item(const Walk& walk, int64_t item) const {
    if (item < blocks(G_)) {
      const int64_t first = item * block, last = std::min(first + block, G_);
      transpose_rows(walk, &Product::dgates, first, last, transposed_);
      if (p_.w_ih) add_rows(walk, &Product::dgates, &WeightGradients<T>::b, first, last);
    } else if (item >= blocks(G_) + blocks(dh_columns())) {
      const int64_t first = (item - blocks(G_) - blocks(dh_columns())) * block;
      add_rows(walk, &Product::more, &WeightGradients<T>::more, first,
               std::min(first + block, chunk_.extra));
    } else {
      const int64_t first = (item - blocks(G_)) * block;
      transpose_rows(walk, &Product::dh, first, std::min(first + block, dh_columns()),
                     transposed_ + G_ * depth_);
    }
  }

  // An item is a panel of columns, times some part of the rows of dw where there are more workers
  // than panels.
  int64_t weight_items(int workers) const {
    return p_.sums_weights()
               ? row_parts(workers) * (Panels<M>::count(inputs()) + Panels<M>::count(s_.P) +
                                       Panels<M>::count(dh_columns() ? s_.H : 0))
               : 0;
  }
  void weight_item(const Walk& walk, int64_t item, int workers) const {
    const int64_t parts = row_parts(workers), part = item % parts;
    int64_t n = item / parts;
    if (n < Panels<M>::count(inputs())) {
      return add_product(walk, transposed_, G_, part, parts, &Product::x, inputs(), n,
                         &WeightGradients<T>::w_ih);
    }
    n -= Panels<M>::count(inputs());
    if (n < Panels<M>::count(s_.P)) {
      return add_product(walk, transposed_, G_, part, parts, &Product::h_prev, s_.P, n,
                         &WeightGradients<T>::w_hh);
    }
    n -= Panels<M>::count(s_.P);
    add_product(walk, transposed_ + G_ * depth_, s_.P, part, parts, &Product::m, s_.H, n,
                &WeightGradients<T>::w_hr);
  }

 private:
  int64_t inputs() const { return p_.w_ih ? s_.I : 0; }  // columns of dw_ih
  int64_t dh_columns() const { return s_.projected ? s_.P : 0; }
  static int64_t blocks(int64_t columns) { return (columns + block - 1) / block; }
  int64_t row_parts(int workers) const {
    return workers > Panels<M>::count(inputs()) + Panels<M>::count(s_.P) ? 4 : 1;
  }

  // The chunk's rows that `member` points to.
  template <class R>
  static auto rows_of(const Walk& walk, const R* Product::* member) {
    return [&walk, member](int64_t q) -> const R* {
      return q < walk.count ? walk.product[q].*member : nullptr;
    };
  }

  // out[column][unit of rows]
  void transpose_rows(const Walk& walk, const Element* Product::* member, int64_t first,
                      int64_t last, Unit* out) const {
    constexpr int width = kLanes<Unit>;
    const auto row = rows_of(walk, member);
    const int64_t K = units<M>(walk.count);
    for (int64_t column = first; column < last; column += width) {
      const int left = lanes_left(column, last, width);
      for (int64_t k = 0; k < K; k += width) {
        Vec<Unit> square[width];
        for (int l = 0; l < width; ++l)
          square[l] = k + l < K ? M::across(row, k + l, column, left) : Vec<Unit>{};
        transpose<1>(square);
        for (int l = 0; l < left; ++l)
          store_lanes(out + (column + l) * depth_ + k, square[l], width);
      }
    }
  }

  // Span k of the chunk, for a member of the sums.
  struct Span {
    int64_t first, last;  // products
    const T* from;        // what a call before began; null: zeros
    T* to;
    bool adds;  // to what is there, or the next call goes on from here
  };
  Span span(const Walk& walk, int64_t k, T* WeightGradients<T>::* member) const {
    const bool goes_on = walk.goes_on && k == walk.spans - 1;
    return {walk.start[k], walk.start[k + 1],
            k == 0 && walk.begun_before ? dw_.begun.*member : nullptr,
            (goes_on ? dw_.begun : dw_.all).*member, !goes_on};
  }

  // The member `sum_of`, in columns first .. last, += the sum over the chunk of the rows that
  // `member` points to.
  template <class R>
  void add_rows(const Walk& walk, const R* Product::* member, T* WeightGradients<T>::* sum_of,
                int64_t first, int64_t last) const {
    for (int64_t g = first; g < last; g += lanes) {
      const int left = lanes_left(g, last, lanes);
      for (int64_t k = 0; k < walk.spans; ++k) {
        const Span here = span(walk, k, sum_of);
        Vec<T> sum = here.from ? load<T>(here.from + g, left) : Vec<T>{};
        for (int64_t q = here.first; q < here.last; ++q)
          sum += load<T>(walk.product[q].*member + g, left);
        store<T>(here.to + g, here.adds ? load<T>(here.to + g, left) + sum : sum, left);
      }
    }
  }

  // The member `sum`, at [row][column], += the sum over the chunk of left[row] times the rows that
  // `member` points to, for panel n of the columns and one part of the rows.
  template <class R>
  void add_product(const Walk& walk, const Unit* left_operand, int64_t height, int64_t part,
                   int64_t parts, const R* Product::* member, int64_t columns, int64_t n,
                   T* WeightGradients<T>::* sum) const {
    const int64_t K = units<M>(walk.count);
    pack_panel<M>(walk.panel, n, K, columns, rows_of(walk, member));
    const int64_t start = part * height / parts, end = (part + 1) * height / parts;
    call_with_vectors(Panels<M>::vectors(n, columns), [&]<int N>() {
      for_row_tiles<rows_of_one_chain(N)>(end - start, [&]<int Rows>(int64_t first) {
        const int64_t column = n * Panels<M>::width, at = (start + first) * columns + column;
        for (int64_t k = 0; k < walk.spans; ++k) {
          const Span here = span(walk, k, sum);
          // Where a unit is a pair, one that two spans share counts to the second.
          const int64_t k0 = here.first / M::depth,
                        k1 = k + 1 < walk.spans ? here.last / M::depth : K;
          Vec<T> acc[Rows][N] = {};
          const Unit* a[Rows];
          for (int r = 0; r < Rows; ++r) a[r] = left_operand + (start + first + r) * depth_ + k0;
          if (here.from) {
#pragma GCC unroll 12
            for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
              for (int v = 0; v < N; ++v) {
                acc[r][v] = load<T>(here.from + at + r * columns + v * lanes,
                                    lanes_left(column + v * lanes, columns, lanes));
              }
            }
          }
          accumulate<M, Rows, N, 1>(acc, a, walk.panel + k0 * N * lanes, k1 - k0);
          for (int r = 0; r < Rows; ++r) {
            for (int v = 0; v < N; ++v) {
              const int left = lanes_left(column + v * lanes, columns, lanes);
              T* const to = here.to + at + r * columns + v * lanes;
              store<T>(to, here.adds ? load<T>(to, left) + acc[r][v] : acc[r][v], left);
            }
          }
        }
      });
    });
  }

  const LayerBackward& p_;
  const LayerShape& s_;
  const BackwardWeights<M>& w_;
  const ChunkGradients<S, M>& chunk_;
  const WeightSums<T> dw_;
  const int64_t span_, d_, G_, most_, depth_;
  const Schedule schedule_;
  S* zeros_;                    // h of no step
  Unit* transposed_ = nullptr;  // [4H (+ P)][depth]
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
