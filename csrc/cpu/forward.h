// Forward pass of one direction over a range of batch rows, by one worker or several in step.
//
// Time goes in chunks whose pre-activations stay in the cache: x w_ih^T + b for the whole chunk
// (forward_input.h), then its steps one by one. A step is a tile of batch rows times a group of `lanes` hidden units:
// the four gates of the group are the four vectors of a packed panel, so i, f, g, o of a cell end
// in the same lane of four registers and the cell follows without a trip through memory. Weights
// are packed [group][K][gate][lane]: once a call, or, for the input of a layer that is one chunk,
// group by group on the way. Where packing costs more than it gains, the product runs along the
// rows of w (CpuPlan). Other cells leave the registers (forward_variant.h).
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

template <class S, class M>
class ForwardJob {
  using T = typename M::Compute;
  using Unit = typename M::Unit;
  using Element = typename M::Element;
  using Row = ForwardRow<S, M>;
  using Input = ForwardInput<S, M>;
  using Other = ForwardVariant<S, M>;
  static constexpr int lanes = kLanes<T>;

 public:
  // What each worker makes for itself on the way: the same for all that run a job in step.
  struct Walk {
    Row* row;  // active rows of the step
    ForwardVariantRow<T>* variant;
    int64_t* idle;  // rows of the step that are past their length
    int64_t rows, idles;
    typename Input::Walk input;
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
        schedule_(schedule_of(s_, d, p.lengths, p.reset)),
        input_(p, plan, w, d),
        variant_(p, plan, w, d, b0_, rows_, arena) {
    h_ = arena.take<Element>(2 * rows_ * stride_h_);
    c_ = arena.take<T>(rows_ * padded_);
    zeros_ = arena.take<T>(std::max(stride_h_, padded_));
    gates_ = p.gates || plan.input_within_step ? nullptr : arena.take<T>(chunk_ * rows_ * 4 * s_.H);
    m_ = s_.projected ? arena.take<Element>(rows_ * stride_m_) : nullptr;
  }

  Walk walk(Arena& arena) const {
    Walk walk{};
    walk.row = arena.take<Row>(rows_);
    walk.variant = arena.take<ForwardVariantRow<T>>(p_.variant ? rows_ : 0);
    walk.idle = arena.take<int64_t>(rows_);
    walk.which = arena.take<uint8_t>(rows_);
    walk.input = input_.walk(chunk_ * rows_, arena);
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
        for (int64_t k = 0; k < count; ++k) jobs[k].plan_input(walks[k], first, last);
        each_range([](const ForwardJob& job, Walk& walk, int64_t n0, int64_t n1) {
          job.input_.multiply(walk.input, n0, n1);
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
            jobs[item / any.rows_].finish_row(walks[item / any.rows_], index, item % any.rows_);
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
    variant_.start();
    for (int64_t b = 0; b < rows_; ++b) {
      const int64_t at = d_ * s_.B + b0_ + b;
      T* const h_state = variant_.h_state(b);
      const T* const h_scale = variant_.h_scale(b);
      for (int64_t j = 0; p_.h0 && j < s_.P; j += lanes) {
        const int n = lanes_left(j, s_.P, lanes);
        Vec<T> h = load<T>(static_cast<const S*>(p_.h0) + at * s_.P + j, n);
        if (h_state) store<T>(h_state + j, h);
        if (h_scale) h = rounded<T, S>(h * load<T>(h_scale + j, n));
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
      const T* const h_state = variant_.h_state(b);
      for (int64_t j = 0; j < s_.P; j += lanes) {
        const Vec<T> h = h_state ? load<T>(h_state + j) : load<T>(h_buffer(b, walk.which[b]) + j);
        store<T>(static_cast<S*>(p_.h_n) + at * s_.P + j, h, lanes_left(j, s_.P, lanes));
      }
      for (int64_t j = 0; j < s_.H; j += lanes) {
        store_either<T, S>(p_.c_n, p_.wide_c, at * s_.H + j, load<T>(c_ + b * padded_ + j),
                           lanes_left(j, s_.H, lanes));
      }
    }
  }

  // Active rows of the chunk.
  void plan_input(Walk& walk, int64_t first, int64_t last) const {
    walk.input.rows = 0;
    for (int64_t index = first; index < last; ++index) {
      const int64_t t = schedule_.time(index);
      for (int64_t b = 0; b < rows_; ++b) {
        if (schedule_.active(t, b0_ + b))
          input_.add(walk.input, t, b0_ + b, gates_at(t, b, first, last));
      }
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
      row.x = plan_.input_within_step ? input_.operand(walk.input, t, b0_ + b, b) : nullptr;
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
      if (p_.variant) walk.variant[walk.rows - 1] = variant_.row(b, at, fresh ? zeros_ : nullptr);
    }
  }

  // A step for groups n0 .. n1. Every second step walks the groups backwards, so that it starts
  // with the weights that are still in the cache.
  void step(const Walk& walk, int64_t index, int64_t n0, int64_t n1) const {
    if (n0 == 0) clear_idle(walk, schedule_.time(index));
    int64_t depth = index == 0 && !p_.h0 ? 0 : units<M>(s_.P);  // nothing to multiply w_hh by
    if (p_.variant) return variant_.products(walk.row, walk.variant, walk.rows, n0, n1, depth);
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
        row[r].store_output(j0, cell.m, left);
      }
    }
  }

  // The rest of a step for its active row q, up to the projection, of another cell.
  void finish_row(const Walk& walk, int64_t index, int64_t q) const {
    if (q < walk.rows) variant_.finish(walk.row[q], walk.variant[q], schedule_.time(index));
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
            p_.variant ? Other::store_output(row, walk.variant[first + r], j, acc[r][v], left)
                       : row.store_output(j, acc[r][v], left);
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
  const Input input_;
  const Other variant_;
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
