// Forward pass of one direction over a range of batch rows, by one worker or several in step.
//
// Time goes in chunks whose pre-activations stay in the cache: x w_ih^T + b for the whole chunk,
// then its steps one by one. A step is a tile of batch rows times a group of `lanes` hidden units:
// the four gates of the group are the four vectors of a packed panel, so i, f, g, o of a cell end
// in the same lane of four registers and the cell follows without a trip through memory. Weights
// are packed [group][K][gate][lane]: once a call, or, for the input of a layer that is one chunk,
// group by group on the way. Where packing costs more than it gains, the product runs along the
// rows of w (CpuPlan).
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

template <class S, class M>
class ForwardJob {
  using T = typename M::Compute;
  using Unit = typename M::Unit;
  using Element = typename M::Element;
  static constexpr int lanes = kLanes<T>;
  static constexpr int64_t k_block = 1024;

  struct Row {
    const Unit* x;  // input, where it is multiplied within the step
    const Unit* h;  // h of the step before
    Element* h_next;
    Element* m;
    T* gates;  // pre-activations in; activated gates out when they are kept
    const T* c_prev;
    T* c;
    T* c_out;  // where c of this step is kept, or null
    S* y;
  };
  // The rest of a row, for other cells. Apart, so that rows of the plain cell stay small.
  struct VariantRow {
    int64_t b, at;  // of the part, and of [T, B, D]
    T* z;
    T* h_state;          // h without h_scale; or null
    const T* h_prev;     // the same of the step before
    T *keep_h, *keep_c;  // null without zoneout
    const T* h_scale;    // or null
  };
  struct Product {
    const Unit* x;
    T* gates;
    const T* given;  // pre-activations, where x holds those
  };

 public:
  // What each worker makes for itself on the way: the same for all that run a job in step.
  struct Walk {
    Row* row;  // active rows of the step
    VariantRow* variant;
    int64_t* idle;  // rows of the step that are past their length
    int64_t rows, idles;
    Product* product;  // active rows of the chunk
    int64_t products;
    Unit* x;         // [products][units(I)] when x must be converted
    Unit* panel;     // one group of w_ih, packed on the way
    uint8_t* which;  // [rows], which half of h_ holds a row's current h
  };

  ForwardJob(const LayerForward& p, const CpuPlan& plan, const ForwardWeights<M>& w, int64_t d,
             int64_t part, Arena& arena)
      : p_(p),
        s_(p.shape),
        plan_(plan),
        w_(w),
        d_(d),
        b0_(plan.first_row(part, s_.B)),
        rows_(plan.first_row(part + 1, s_.B) - b0_),
        groups_(w.groups(s_.H)),
        padded_(groups_ * lanes),
        stride_h_(round_up(s_.P, 64)),
        stride_m_(round_up(s_.H, 64)),
        chunk_(plan.input_within_step ? 1 : std::min(s_.T, plan.chunk_steps(rows_))),
        schedule_(schedule_of(s_, d, p.lengths, p.reset)) {
    h_ = arena.take<Element>(2 * rows_ * stride_h_);
    c_ = arena.take<T>(rows_ * padded_);
    zeros_ = arena.take<T>(std::max(stride_h_, padded_));
    gates_ = p.gates || plan.input_within_step ? nullptr : arena.take<T>(chunk_ * rows_ * 4 * s_.H);
    m_ = s_.projected ? arena.take<Element>(rows_ * stride_m_) : nullptr;
    if (!p.variant) return;
    const Variant& v = *p.variant;
    z_ = arena.take<T>(rows_ * 4 * padded_);
    if (v.h_scale || v.cell.zoneout_h > 0) h_state_ = arena.take<T>(rows_ * stride_h_);
    if (v.cell.zoneout_h > 0) keep_h_ = arena.take<T>(rows_ * stride_h_);
    if (v.cell.zoneout_c > 0) keep_c_ = arena.take<T>(rows_ * stride_m_);
  }

  Walk walk(Arena& arena) const {
    Walk walk{};
    walk.row = arena.take<Row>(rows_);
    walk.variant = arena.take<VariantRow>(p_.variant ? rows_ : 0);
    walk.idle = arena.take<int64_t>(rows_);
    walk.which = arena.take<uint8_t>(rows_);
    if (!plan_.input_within_step) walk.product = arena.take<Product>(chunk_ * rows_);
    if (staged()) walk.x = arena.take<Unit>(chunk_ * rows_ * units<M>(s_.I));
    if (plan_.input == Weights::packed_on_the_way && p_.w_ih)
      walk.panel = arena.take<Unit>(units<M>(s_.I) * 4 * lanes);
    return walk;
  }

  // Runs jobs that differ in their direction alone; walks[k] is this worker's for jobs[k].
  static void run(ForwardJob* jobs, Walk* walks, int64_t count, Team::Worker& worker) {
    const ForwardJob& any = jobs[0];
    const int64_t T_ = any.s_.T, chunk = any.chunk_;
    // Items of a stage: ranges of groups, some for each worker.
    const int64_t pieces =
        std::min<int64_t>(any.groups_, worker.workers() == 1 ? 1 : 4 * worker.workers());
    const int64_t panels = any.s_.projected ? any.w_.w_hr.count() : 0;
    const auto each_range = [&](auto&& body) {
      worker.each(count * pieces, [&](int64_t item) {
        const int64_t k = item / pieces, piece = item % pieces;
        body(jobs[k], walks[k], piece * any.groups_ / pieces, (piece + 1) * any.groups_ / pieces);
      });
    };
    for (int64_t k = 0; k < count; ++k) std::memset(walks[k].which, 0, any.rows_);
    worker.each(count, [&](int64_t k) { jobs[k].start(); });
    for (int64_t first = 0; first < T_; first += chunk) {
      const int64_t last = std::min(first + chunk, T_);
      if (!any.plan_.input_within_step) {
        for (int64_t k = 0; k < count; ++k) jobs[k].plan_product(walks[k], first, last);
        each_range([](const ForwardJob& job, Walk& walk, int64_t n0, int64_t n1) {
          job.input_product(walk, n0, n1);
        });
      }
      for (int64_t index = first; index < last; ++index) {
        for (int64_t k = 0; k < count; ++k)
          jobs[k].plan_step(walks[k], jobs[k].schedule_.time(index), first, last);
        each_range([&](const ForwardJob& job, Walk& walk, int64_t n0, int64_t n1) {
          job.step(walk, index, n0, n1);
        });
        if (any.p_.variant) {
          worker.each(count * any.rows_, [&](int64_t item) {
            jobs[item / any.rows_].variant_row(walks[item / any.rows_], index, item % any.rows_);
          });
        }
        if (panels > 0) {
          worker.each(count * panels, [&](int64_t item) {
            jobs[item / panels].project(walks[item / panels], item % panels);
          });
        }
      }
    }
    worker.each(count, [&](int64_t k) { jobs[k].finish(walks[k]); });
  }

 private:
  // Whether rows of x are no operands as they lie: of another type, or not whole units in their places.
  bool staged() const {
    if (!p_.w_ih) return false;
    const auto whole = [](int64_t elements) { return elements % M::depth == 0; };
    return !std::is_same_v<S, Element> || !whole(s_.I) || !whole(p_.x_stride_t) ||
           !whole(p_.x_stride_b) || reinterpret_cast<uintptr_t>(p_.x) % alignof(Unit) != 0;
  }

  Element* h_buffer(int64_t b, int which) const { return h_ + (which * rows_ + b) * stride_h_; }

  // Where the pre-activations of t, b are, in the chunk of steps first .. last.
  T* gates_at(int64_t t, int64_t b, int64_t first, int64_t last) const {
    if (p_.gates) return static_cast<T*>(p_.gates) + ((t * s_.B + b0_ + b) * s_.D + d_) * 4 * s_.H;
    if (!gates_) return nullptr;
    const int64_t start = std::min(schedule_.time(first), schedule_.time(last - 1));
    return gates_ + ((t - start) * rows_ + b) * 4 * s_.H;
  }

  // State buffers are padded: lanes past H or P start as zeros and stay finite, and meet weights
  // that are zero.
  void start() const {
    std::memset(static_cast<void*>(h_), 0, sizeof(Element) * 2 * rows_ * stride_h_);
    std::memset(static_cast<void*>(zeros_), 0, sizeof(T) * std::max(stride_h_, padded_));
    if (m_) std::memset(static_cast<void*>(m_), 0, sizeof(Element) * rows_ * stride_m_);
    if (h_state_) std::memset(static_cast<void*>(h_state_), 0, sizeof(T) * rows_ * stride_h_);
    for (int64_t b = 0; b < rows_; ++b) {
      const int64_t at = d_ * s_.B + b0_ + b;
      for (int64_t j = 0; p_.h0 && j < s_.P; j += lanes) {
        const int n = lanes_left(j, s_.P, lanes);
        Vec<T> h = load<T>(static_cast<const S*>(p_.h0) + at * s_.P + j, n);
        if (h_state_) store<T>(h_state_ + b * stride_h_ + j, h);
        if (h_scale(b)) h = rounded<T, S>(h * load<T>(h_scale(b) + j, n));
        store<T>(h_buffer(b, 0) + j, h);
      }
      for (int64_t j = 0; j < padded_; j += lanes) {
        const int n = lanes_left(j, s_.H, lanes);
        store<T>(c_ + b * padded_ + j,
                 p_.c0 ? load_either<T, S>(p_.c0, p_.wide_c, at * s_.H + j, n) : Vec<T>{});
      }
    }
  }

  void finish(const Walk& walk) const {
    for (int64_t b = 0; b < rows_; ++b) {
      const int64_t at = d_ * s_.B + b0_ + b;
      for (int64_t j = 0; j < s_.P; j += lanes) {
        const Vec<T> h = h_state_ ? load<T>(h_state_ + b * stride_h_ + j)
                                  : load<T>(h_buffer(b, walk.which[b]) + j);
        store<T>(static_cast<S*>(p_.h_n) + at * s_.P + j, h, lanes_left(j, s_.P, lanes));
      }
      for (int64_t j = 0; j < s_.H; j += lanes) {
        store_either<T, S>(p_.c_n, p_.wide_c, at * s_.H + j, load<T>(c_ + b * padded_ + j),
                           lanes_left(j, s_.H, lanes));
      }
    }
  }

  // Active rows of the chunk.
  void plan_product(Walk& walk, int64_t first, int64_t last) const {
    walk.products = 0;
    for (int64_t index = first; index < last; ++index) {
      const int64_t t = schedule_.time(index);
      for (int64_t b = 0; b < rows_; ++b) {
        if (!schedule_.active(t, b0_ + b)) continue;
        Product& product = walk.product[walk.products];
        product.gates = gates_at(t, b, first, last);
        if (p_.w_ih) {
          product.x = input_at(walk, t, b, walk.products);
        } else {
          product.given = static_cast<const T*>(p_.x) + t * p_.x_stride_t +
                          (b0_ + b) * p_.x_stride_b + d_ * 4 * s_.H;
        }
        ++walk.products;
      }
    }
  }

  // The row of x at t, b; a converted copy in slot `index` where x is not in the form of operands.
  const Unit* input_at(const Walk& walk, int64_t t, int64_t b, int64_t index) const {
    const S* x = static_cast<const S*>(p_.x) + t * p_.x_stride_t + (b0_ + b) * p_.x_stride_b +
                 s_.input_of(d_) * s_.I;
    if (!walk.x) return reinterpret_cast<const Unit*>(x);
    Unit* out = walk.x + index * units<M>(s_.I);
    for (int64_t k = 0; k < units<M>(s_.I); k += kLanes<Unit>) {
      store_lanes(out + k, M::along(x + k * M::depth, s_.I - k * M::depth),
                  lanes_left(k, units<M>(s_.I), kLanes<Unit>));
    }
    return out;
  }

  // Pre-activations of the chunk from its input and the biases, for groups n0 .. n1.
  void input_product(const Walk& walk, int64_t n0, int64_t n1) const {
    if (!p_.w_ih) {
      for (int64_t q = 0; q < walk.products; ++q) {
        for (int gate = 0; gate < 4; ++gate) {
          for (int64_t n = n0; n < n1; ++n) {
            const int64_t at = gate * s_.H + n * lanes;
            const int left = lanes_left(n * lanes, s_.H, lanes);
            store<T>(walk.product[q].gates + at, load<T>(walk.product[q].given + at, left), left);
          }
        }
      }
      return;
    }
    const S* const w = static_cast<const S*>(p_.w_ih[d_]);
    if (plan_.input == Weights::unpacked) {
      for (int64_t q = 0; q < walk.products; ++q) {
        for (int64_t n = n0; n < n1; ++n) {
#pragma GCC unroll 4
          for (int gate = 0; gate < 4; ++gate) {
            store<T>(walk.product[q].gates + gate * s_.H + n * lanes,
                     load<T>(w_.bias + (n * 4 + gate) * lanes), lanes_left(n * lanes, s_.H, lanes));
          }
        }
      }
      multiply_unpacked<T>(
          w, s_.H, s_.I, n0, n1, walk.products,
          [&](int64_t q) { return reinterpret_cast<const Element*>(walk.product[q].x); },
          [&](int64_t q) { return walk.product[q].gates; });
      return;
    }
    const int64_t K = units<M>(s_.I);
    for (int64_t n = n0; n < n1; ++n) {
      const Unit* group = walk.panel;
      if (walk.panel) {
        w_.pack_group(w, s_.H, s_.I, n, walk.panel);
      } else {
        group = w_.group_of(w_.w_ih, s_.I, n);
      }
      const int64_t j0 = n * lanes;
      const int left = lanes_left(j0, s_.H, lanes);
      int64_t k0 = 0;
      do {
        const int64_t depth = std::min(K - k0, k_block);
        for_row_tiles(walk.products, [&]<int R>(int64_t first) {
          const Product* const product = walk.product + first;
          Vec<T> acc[R][4];
          const Unit* a[R];
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            a[r] = product[r].x + k0;
#pragma GCC unroll 4
            for (int gate = 0; gate < 4; ++gate) {
              acc[r][gate] = k0 == 0 ? load<T>(w_.bias + (n * 4 + gate) * lanes)
                                     : load<T>(product[r].gates + gate * s_.H + j0, left);
            }
          }
          accumulate<M, R, 4, chains_of(kRows, 4)>(acc, a, group + k0 * 4 * lanes, depth);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int gate = 0; gate < 4; ++gate)
              store<T>(product[r].gates + gate * s_.H + j0, acc[r][gate], left);
          }
        });
        k0 += depth;
      } while (k0 < K);
    }
  }

  // Active and idle rows of step t.
  void plan_step(Walk& walk, int64_t t, int64_t first, int64_t last) const {
    walk.rows = walk.idles = 0;
    for (int64_t b = 0; b < rows_; ++b) {
      if (!schedule_.active(t, b0_ + b)) {
        walk.idle[walk.idles++] = b;
        continue;
      }
      const int64_t at = (t * s_.B + b0_ + b) * s_.D + d_;
      const bool fresh = schedule_.fresh(t, b0_ + b);
      Row& row = walk.row[walk.rows++];
      row.x = plan_.input_within_step ? input_at(walk, t, b, b) : nullptr;
      row.h = fresh ? reinterpret_cast<const Unit*>(zeros_)
                    : reinterpret_cast<const Unit*>(h_buffer(b, walk.which[b]));
      walk.which[b] ^= 1;
      row.h_next = h_buffer(b, walk.which[b]);
      row.m = m_ ? m_ + b * stride_m_ : nullptr;
      row.gates = gates_at(t, b, first, last);
      row.c = c_ + b * padded_;
      row.c_prev = fresh ? zeros_ : row.c;
      row.c_out = p_.c ? static_cast<T*>(p_.c) + at * s_.H : nullptr;
      row.y = static_cast<S*>(p_.y) + at * s_.P;
      if (p_.variant) walk.variant[walk.rows - 1] = variant_row_of(b, at, fresh);
    }
  }

  VariantRow variant_row_of(int64_t b, int64_t at, bool fresh) const {
    T* const h_state = h_state_ ? h_state_ + b * stride_h_ : nullptr;
    return {b,
            at,
            z_ + b * 4 * padded_,
            h_state,
            fresh ? zeros_ : h_state,
            keep_h_ ? keep_h_ + b * stride_h_ : nullptr,
            keep_c_ ? keep_c_ + b * stride_m_ : nullptr,
            h_scale(b)};
  }

  // Of row b of the part, or null.
  const T* h_scale(int64_t b) const { return VariantRows<T>::h_scale(s_, p_.variant, d_, b0_ + b); }

  // A step for groups n0 .. n1. Every second step walks the groups backwards, so that it starts
  // with the weights that are still in the cache.
  void step(const Walk& walk, int64_t index, int64_t n0, int64_t n1) const {
    if (n0 == 0) clear_idle(walk, schedule_.time(index));
    int64_t depth = index == 0 && !p_.h0 ? 0 : units<M>(s_.P);  // nothing to multiply w_hh by
    if (p_.variant) return variant_products(walk, n0, n1, depth);
    if (depth > 0 && !w_.w_hh) {
      multiply_unpacked<T>(
          static_cast<const S*>(p_.w_hh[d_]), s_.H, s_.P, n0, n1, walk.rows,
          [&](int64_t q) { return reinterpret_cast<const Element*>(walk.row[q].h); },
          [&](int64_t q) { return walk.row[q].gates; });
      depth = 0;
    }
    for (int64_t i = n0; i < n1; ++i) {
      const int64_t n = index & 1 ? n0 + n1 - 1 - i : i;
      for_row_tiles(walk.rows, [&]<int R>(int64_t first) { cells<R>(walk.row + first, n, depth); });
    }
  }

  void clear_idle(const Walk& walk, int64_t t) const {
    for (int64_t q = 0; q < walk.idles; ++q) {
      const int64_t at = (t * s_.B + b0_ + walk.idle[q]) * s_.D + d_;
      std::memset(static_cast<void*>(static_cast<S*>(p_.y) + at * s_.P), 0, sizeof(S) * s_.P);
      if (p_.c)
        std::memset(static_cast<void*>(static_cast<T*>(p_.c) + at * s_.H), 0, sizeof(T) * s_.H);
      if (p_.gates)
        std::memset(static_cast<void*>(static_cast<T*>(p_.gates) + at * 4 * s_.H), 0,
                    sizeof(T) * 4 * s_.H);
    }
  }

  // One group of hidden units for R rows: the recurrent product, the cell, and what is kept of it.
  template <int R>
  LSTM_INLINE void cells(const Row* row, int64_t n, int64_t depth) const {
    const int64_t j0 = n * lanes, H = s_.H;
    const int left = lanes_left(j0, H, lanes);
    const bool within_step = plan_.input_within_step;
    Vec<T> acc[R][4];
    const Unit* h[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      h[r] = row[r].h;
#pragma GCC unroll 4
      for (int gate = 0; gate < 4; ++gate) {
        acc[r][gate] = within_step ? load<T>(w_.bias + (n * 4 + gate) * lanes)
                                   : load<T>(row[r].gates + gate * H + j0, left);
      }
    }
    if (within_step) {
      const Unit* x[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) x[r] = row[r].x;
      accumulate<M, R, 4>(acc, x, w_.group_of(w_.w_ih, s_.I, n), units<M>(s_.I));
    }
    accumulate<M, R, 4>(acc, h, w_.group_of(w_.w_hh, s_.P, n), depth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Cell<Vec<T>> cell{acc[r][0], acc[r][1], acc[r][2], acc[r][3], {}, {}};
      cell_forward<Math<T>>(cell, load<T>(row[r].c_prev + j0));
      store<T>(row[r].c + j0, cell.c);
      if (row[r].c_out) store<T>(row[r].c_out + j0, cell.c, left);
      if (p_.gates) {
        store<T>(row[r].gates + j0, cell.i, left);
        store<T>(row[r].gates + H + j0, cell.f, left);
        store<T>(row[r].gates + 2 * H + j0, cell.g, left);
        store<T>(row[r].gates + 3 * H + j0, cell.o, left);
      }
      if (s_.projected) {
        store<T>(row[r].m + j0, cell.m);
      } else {
        store_output(row[r], j0, cell.m, left);
      }
    }
  }

  // The pre-activations of groups n0 .. n1, or, with norm, the part of w_hh h. A function of its own,
  // so that the plain cell's stays as it is.
  __attribute__((noinline)) void variant_products(const Walk& walk, int64_t n0, int64_t n1,
                                                  int64_t depth) const {
    const bool within_step = plan_.input_within_step, apart = p_.variant->norm;
    for (int64_t n = n0; n < n1; ++n) {
      const int64_t j0 = n * lanes;
      for_row_tiles(walk.rows, [&]<int R>(int64_t first) {
        const Row* const row = walk.row + first;
        Vec<T> acc[R][4];
        const Unit *h[R], *x[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          h[r] = row[r].h;
          x[r] = row[r].x;
#pragma GCC unroll 4
          for (int gate = 0; gate < 4; ++gate) {
            acc[r][gate] = apart         ? Vec<T>{}
                           : within_step ? load<T>(w_.bias + (n * 4 + gate) * lanes)
                                         : load<T>(row[r].gates + gate * s_.H + j0,
                                                   lanes_left(j0, s_.H, lanes));
          }
        }
        if (within_step) accumulate<M, R, 4>(acc, x, w_.group_of(w_.w_ih, s_.I, n), units<M>(s_.I));
        accumulate<M, R, 4>(acc, h, w_.group_of(w_.w_hh, s_.P, n), depth);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int gate = 0; gate < 4; ++gate)
            store<T>(walk.variant[first + r].z + gate * padded_ + j0, acc[r][gate]);
        }
      });
    }
  }

  // The rest of a step for its active row q, up to the projection.
  void variant_row(const Walk& walk, int64_t index, int64_t q) const {
    if (q >= walk.rows) return;
    const Row& row = walk.row[q];
    const VariantRow& more = walk.variant[q];
    const Variant& v = *p_.variant;
    const VariantRows<T> rows(s_, v, d_);
    const int64_t t = schedule_.time(index) + v.first_step;
    if (more.keep_h) rows.choose(Choice::h, t, b0_ + more.b, s_.P, more.keep_h);
    if (more.keep_c) rows.choose(Choice::c, t, b0_ + more.b, s_.H, more.keep_c);
    const bool normed = v.norm && p_.gates;
    rows.forward({more.z, row.gates, row.c_prev, more.keep_c, row.c, row.c_out,
                  p_.gates ? row.gates : nullptr,
                  normed ? static_cast<T*>(v.normed) + more.at * 4 * s_.H : nullptr,
                  normed ? static_cast<T*>(v.rstd) + more.at : nullptr},
                 [&](int64_t j, const Vec<T>& m, int left) {
                   s_.projected ? store<T>(row.m + j, m)
                                : store_variant_output(row, more, j, m, left);
                 });
  }

  // h as the next step reads it is h as the caller sees it, rounding included.
  static LSTM_INLINE void store_output(const Row& row, int64_t j, const Vec<T>& h, int left) {
    store<T>(row.y + j, h, left);
    if constexpr (std::is_same_v<S, Element>) {
      store<T>(row.h_next + j, h);
    } else {
      store<T>(row.h_next + j, rounded<T, S>(h));
    }
  }

  static LSTM_INLINE void store_variant_output(const Row& row, const VariantRow& more, int64_t j,
                                               Vec<T> h, int left) {
    if (more.keep_h) {
      const Vec<T> keep = load<T>(more.keep_h + j);
      h = keep * load<T>(more.h_prev + j) + (1 - keep) * h;
    }
    store<T>(row.y + j, h, left);
    h = rounded<T, S>(h);
    if (more.h_state) store<T>(more.h_state + j, h);
    if (more.h_scale) h = rounded<T, S>(h * load<T>(more.h_scale + j, left));
    store<T>(row.h_next + j, h);
  }

  // h = w_hr m, panel n.
  void project(const Walk& walk, int64_t n) const {
    call_with_vectors(w_.w_hr.vectors(n), [&]<int N>() {
      for_row_tiles(walk.rows, [&]<int R>(int64_t first) {
        Vec<T> acc[R][N] = {};
        const Unit* m[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) m[r] = reinterpret_cast<const Unit*>(walk.row[first + r].m);
        accumulate<M, R, N>(acc, m, w_.w_hr.panel(n), w_.w_hr.K);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < N; ++v) {
            const int64_t j = n * w_.w_hr.width + v * lanes;
            const Row& row = walk.row[first + r];
            const int left = lanes_left(j, s_.P, lanes);
            p_.variant ? store_variant_output(row, walk.variant[first + r], j, acc[r][v], left)
                       : store_output(row, j, acc[r][v], left);
          }
        }
      });
    });
  }

  const LayerForward& p_;
  const LayerShape& s_;
  const CpuPlan& plan_;
  const ForwardWeights<M>& w_;
  const int64_t d_, b0_, rows_, groups_, padded_, stride_h_, stride_m_, chunk_;
  const Schedule schedule_;
  Element* h_;  // [2][rows][stride_h]: the step before and the step being made
  T* c_;        // [rows][padded]
  T* zeros_;    // h or c of a fresh row
  T* gates_;    // [chunk][rows][4H] when gates are not kept
  Element* m_;  // [rows][stride_m], with projection
  // Of other cells:
  T* z_ = nullptr;        // [rows][4][padded]
  T* h_state_ = nullptr;  // [rows][stride_h], where h_ holds something else, or all of it is wanted
  T *keep_h_ = nullptr, *keep_c_ = nullptr;  // [rows][stride_h], [rows][stride_m]
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
