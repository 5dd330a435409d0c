// Backward pass of the recurrence of one direction over a range of batch rows, by one worker or
// several in step.
//
// Steps run against the direction of the recurrence. A step takes dh = dy + dgates[next] w_hh in
// registers, a tile of batch rows times a panel of hidden units, and goes straight on to the cell's
// gradients; other cells leave the registers (backward_variant.h). The dgates of a chunk of steps
// stay in scratch memory (chunk_gradients.h) for the products that gradients.h makes of them.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

template <class S, class M>
class BackwardJob {
  using T = typename M::Compute;
  using Unit = typename M::Unit;
  using Element = typename M::Element;
  using Row = BackwardRow<S, M>;
  static constexpr int lanes = kLanes<T>;

 public:
  // What each worker makes for itself on the way: the same for all that run a job in step.
  struct Walk {
    Row* row;  // active rows of the step
    int64_t rows;
    const Element** carry;  // [rows], dgates of the step after, or zeros
    bool* fresh;            // [rows], no gradient of c comes from the step after
  };

  BackwardJob(const LayerBackward& p, const BackwardWeights<M>& w,
              const ChunkGradients<S, M>& chunk, Arena& arena)
      : p_(p),
        s_(p.shape),
        w_(w),
        chunk_(chunk),
        d_(chunk.d),
        b0_(chunk.b0),
        rows_(chunk.rows),
        G_(4 * s_.H),
        padded_(round_up(s_.H, lanes)),
        schedule_(schedule_of(s_, d_, p.lengths, p.reset)),
        variant_(p, d_, b0_, rows_, arena) {
    carried_ = arena.take<Element>(rows_ * G_);
    dc_ = arena.take<T>(rows_ * padded_);
    c0_ = p.c0 ? arena.take<T>(rows_ * s_.H) : nullptr;
    zeros_ = arena.take<T>(std::max(G_, padded_));
  }

  Walk walk(Arena& arena) const {
    return {arena.take<Row>(rows_), 0, arena.take<const Element*>(rows_), arena.take<bool>(rows_)};
  }

  void begin(Walk& walk) const {
    for (int64_t b = 0; b < rows_; ++b) {
      walk.carry[b] = p_.carry_in ? carried_ + b * G_ : zeros();
      walk.fresh[b] = false;
    }
  }

  void start() const {
    std::memset(static_cast<void*>(zeros_), 0, sizeof(T) * std::max(G_, padded_));
    variant_.start();
    for (int64_t b = 0; b < rows_; ++b) {
      const int64_t at = d_ * s_.B + b0_ + b;
      for (int64_t j = 0; j < padded_; j += lanes) {
        const int left = lanes_left(j, s_.H, lanes);
        const int64_t from = at * s_.H + j;
        store<T>(dc_ + b * padded_ + j,
                 p_.dc_n ? load_either<T, S>(p_.dc_n, p_.wide_c, from, left) : Vec<T>{});
        if (c0_)
          store<T>(c0_ + b * s_.H + j, load_either<T, S>(p_.c0, p_.wide_c, from, left), left);
      }
      for (int64_t j = 0; p_.carry_in && j < G_; j += lanes) {
        const int left = lanes_left(j, G_, lanes);
        const T* const from = static_cast<const T*>(p_.carry_in) + at * G_ + j;
        store<T>(carried_ + b * G_ + j, load<T>(from, left), left);
      }
    }
  }

  // The steps last-1 .. first of jobs that differ in their direction alone; walks[k] is this
  // worker's for jobs[k].
  static void run_chunk(BackwardJob* jobs, Walk* walks, int64_t count, int64_t first, int64_t last,
                        Team::Worker& worker) {
    const BackwardJob& any = jobs[0];
    const int64_t outputs = any.w_.w_hh.count(),
                  cells = any.s_.projected ? any.w_.w_hr.count() : outputs;
    for (int64_t index = last - 1; index >= first; --index) {
      for (int64_t k = 0; k < count; ++k) jobs[k].plan_step(walks[k], index);
      if (any.variant_.chooses()) {
        worker.each(count * any.rows_, [&](int64_t item) {
          jobs[item / any.rows_].choose(walks[item / any.rows_], index, item % any.rows_);
        });
      }
      if (any.s_.projected) {
        worker.each(count * outputs, [&](int64_t item) {
          jobs[item / outputs].output_gradient(walks[item / outputs], item % outputs);
        });
      }
      worker.each(count * cells, [&](int64_t item) {
        jobs[item / cells].step(walks[item / cells], item % cells);
      });
      if (any.p_.variant) {
        worker.each(count * any.rows_, [&](int64_t item) {
          jobs[item / any.rows_].finish_row(walks[item / any.rows_], item % any.rows_);
        });
      }
    }
    worker.each(count, [&](int64_t k) { jobs[k].keep_carry(walks[k]); });
    for (int64_t k = 0; k < count; ++k) jobs[k].follow_carry(walks[k]);
  }

  // Items of finish().
  int64_t panels() const { return w_.w_hh.count(); }
  void finish(const Walk& walk, int64_t n) const {
    if (p_.dh0) finish_h(walk, n);
    if (p_.dc0 && n == 0) finish_c(walk);
    if (p_.carry_out && n == 0) hand_on(walk);
  }

 private:
  // dh0 of panel n.
  void finish_h(const Walk& walk, int64_t n) const {
    const int64_t base = d_ * s_.B + b0_;
    call_with_vectors(w_.w_hh.vectors(n), [&]<int N>() {
      for_row_tiles(rows_, [&]<int R>(int64_t first) {
        Vec<T> acc[R][N] = {};
        const Unit* a[R];
        for (int r = 0; r < R; ++r) a[r] = reinterpret_cast<const Unit*>(walk.carry[first + r]);
        accumulate<M, R, N>(acc, a, w_.w_hh.panel(n), w_.w_hh.K);
        for (int r = 0; r < R; ++r) {
          const int64_t b = first + r;
          const bool unused = schedule_.length(b0_ + b) == 0;  // h_n is h_0
          const T* const scale = variant_.h_scale(b);
          const T* const dh_next = walk.fresh[b] ? nullptr : variant_.dh_next(b);
          for (int v = 0; v < N; ++v) {
            const int64_t j = n * w_.w_hh.width + v * lanes, at = (base + b) * s_.P + j;
            const int left = lanes_left(j, s_.P, lanes);
            if (scale) acc[r][v] *= load<T>(scale + j, left);
            if (dh_next) acc[r][v] += load<T>(dh_next + j);
            if (unused && p_.dh_n) {
              if (!p_.carry_in) acc[r][v] = Vec<T>{};
              acc[r][v] += load<T>(static_cast<const S*>(p_.dh_n) + at, left);
            }
            store<T>(static_cast<T*>(p_.dh0) + at, acc[r][v], left);
          }
        }
      });
    });
  }

  void finish_c(const Walk& walk) const {
    for (int64_t b = 0; b < rows_; ++b) {
      const T* dc = walk.fresh[b] ? zeros_ : dc_ + b * padded_;
      std::memcpy(static_cast<T*>(p_.dc0) + (d_ * s_.B + b0_ + b) * s_.H, dc, sizeof(T) * s_.H);
    }
  }

  void hand_on(const Walk& walk) const {
    for (int64_t b = 0; b < rows_; ++b) {
      T* const out = static_cast<T*>(p_.carry_out) + (d_ * s_.B + b0_ + b) * G_;
      for (int64_t j = 0; j < G_; j += lanes) {
        const int left = lanes_left(j, G_, lanes);
        store<T>(out + j, load<T>(walk.carry[b] + j, left), left);
      }
    }
  }

  const Element* zeros() const { return reinterpret_cast<const Element*>(zeros_); }

  // dgates of a row's latest step move out of the way of the next chunk.
  void keep_carry(const Walk& walk) const {
    for (int64_t b = 0; b < rows_; ++b) {
      Element* kept = carried_ + b * G_;
      if (walk.carry[b] != zeros() && walk.carry[b] != kept) {
        std::memcpy(static_cast<void*>(kept), walk.carry[b], sizeof(Element) * G_);
      }
    }
  }
  void follow_carry(Walk& walk) const {
    for (int64_t b = 0; b < rows_; ++b) {
      if (walk.carry[b] != zeros()) walk.carry[b] = carried_ + b * G_;
    }
  }

  void plan_step(Walk& walk, int64_t index) const {
    const int64_t t = schedule_.time(index);
    walk.rows = 0;
    for (int64_t b = 0; b < rows_; ++b) {
      const int64_t global = b0_ + b, slot = chunk_.slot(index, b);
      if (!schedule_.active(t, global)) continue;
      const int64_t at = (t * s_.B + global) * s_.D + d_, state = d_ * s_.B + global;
      const int64_t previous = schedule_.previous(t, global);
      const bool fresh = schedule_.fresh(t, global);
      const bool last = schedule_.reversed ? t == 0 : t + 1 == schedule_.length(global);

      Row& row = walk.row[walk.rows++];
      row.carry = reinterpret_cast<const Unit*>(walk.carry[b]);
      row.gates = static_cast<const T*>(p_.gates) + at * G_;
      row.c = static_cast<const T*>(p_.c) + at * s_.H;
      row.c_prev = zeros_;
      if (!fresh && previous >= 0)
        row.c_prev = static_cast<const T*>(p_.c) + ((previous * s_.B + global) * s_.D + d_) * s_.H;
      if (!fresh && previous < 0 && c0_) row.c_prev = c0_ + b * s_.H;
      row.dy = p_.dy ? static_cast<const S*>(p_.dy) + at * s_.P : nullptr;
      row.dh_n = p_.dh_n && last ? static_cast<const S*>(p_.dh_n) + state * s_.P : nullptr;
      row.dc_out = p_.dc ? static_cast<const T*>(p_.dc) + at * s_.H : nullptr;
      row.dgates_out = p_.dgates ? static_cast<const T*>(p_.dgates) + at * G_ : nullptr;
      row.dc = dc_ + b * padded_;
      row.dc_next = walk.fresh[b] ? zeros_ : row.dc;
      row.dgates = chunk_.dgates_at(slot);
      row.dh = chunk_.dh_at(slot);
      row.m = chunk_.m_at(slot);
      if (p_.variant) {
        row.b = b;
        row.at = at;
        row.dh_next = walk.fresh[b] ? nullptr : variant_.dh_next(b);
        row.sums = chunk_.sums_at(slot);
        row.h_scaled = chunk_.h_at(slot);
        row.h_prev = nullptr;
        if (!fresh && previous >= 0)
          row.h_prev =
              static_cast<const S*>(p_.y) + ((previous * s_.B + global) * s_.D + d_) * s_.P;
        if (!fresh && previous < 0 && p_.h0)
          row.h_prev = static_cast<const S*>(p_.h0) + state * s_.P;
      }
      walk.carry[b] = fresh ? zeros() : row.dgates;
      walk.fresh[b] = fresh;
    }
  }

  void choose(const Walk& walk, int64_t index, int64_t q) const {
    if (q < walk.rows) variant_.choose(walk.row[q], schedule_.time(index));
  }

  // With projection: dh, panel n of it, kept for dw_hr.
  void output_gradient(const Walk& walk, int64_t n) const {
    if (p_.variant) {
      return multiply(
          walk, w_.w_hh, n, false, [](const Row& row) { return row.carry; },
          [this](const Row& row, int64_t j, const Vec<T>& dh) {
            store<T>(row.dh + j, variant_.output(row, j, dh));
          });
    }
    multiply(
        walk, w_.w_hh, n, true, [](const Row& row) { return row.carry; },
        [](const Row& row, int64_t j, const Vec<T>& dh) { store<T>(row.dh + j, dh); });
  }

  // dm, panel n of it, and the cell's gradients.
  void step(const Walk& walk, int64_t n) const {
    if (p_.variant) {
      const auto keep = [this](const Row& row, int64_t j, const Vec<T>& dm) {
        store<T>(variant_.dm(row.b) + j, s_.projected ? dm : variant_.output(row, j, dm));
      };
      if (s_.projected) {
        return multiply(
            walk, w_.w_hr, n, false,
            [](const Row& row) { return reinterpret_cast<const Unit*>(row.dh); }, keep);
      }
      return multiply(walk, w_.w_hh, n, false, [](const Row& row) { return row.carry; }, keep);
    }
    const auto cell = [this](const Row& row, int64_t j, const Vec<T>& dm) {
      this->cell(row, j, dm);
    };
    if (s_.projected) {
      multiply(
          walk, w_.w_hr, n, false,
          [](const Row& row) { return reinterpret_cast<const Unit*>(row.dh); }, cell);
    } else {
      multiply(walk, w_.w_hh, n, true, [](const Row& row) { return row.carry; }, cell);
    }
  }

  // use(row, column, sum): operand(row) times panel n, plus the gradient from outside where
  // `outer`.
  template <class Operand, class Use>
  LSTM_INLINE void multiply(const Walk& walk, const Panels<M>& panels, int64_t n, bool outer,
                            Operand operand, Use use) const {
    call_with_vectors(panels.vectors(n), [&]<int N>() {
      for_row_tiles(walk.rows, [&]<int R>(int64_t first) {
        const Row* const row = walk.row + first;
        Vec<T> acc[R][N];
        const Unit* a[R];
        for (int r = 0; r < R; ++r) {
          a[r] = operand(row[r]);
          for (int v = 0; v < N; ++v) {
            const int64_t j = n * panels.width + v * lanes;
            acc[r][v] =
                outer ? row[r].outer_gradient(j, lanes_left(j, panels.columns, lanes)) : Vec<T>{};
          }
        }
        accumulate<M, R, N>(acc, a, panels.panel(n), panels.K);
        for (int r = 0; r < R; ++r) {
          for (int v = 0; v < N; ++v) use(row[r], n * panels.width + v * lanes, acc[r][v]);
        }
      });
    });
  }

  LSTM_INLINE void cell(const Row& row, int64_t j, const Vec<T>& dm) const {
    const int64_t H = s_.H;
    const int left = lanes_left(j, H, lanes);
    Cell<Vec<T>> cell{load<T>(row.gates + j, left),
                      load<T>(row.gates + H + j, left),
                      load<T>(row.gates + 2 * H + j, left),
                      load<T>(row.gates + 3 * H + j, left),
                      load<T>(row.c + j, left),
                      {}};
    Cell<Vec<T>> d;
    Vec<T> dc = load<T>(row.dc_next + j);
    if (row.dc_out) dc += load<T>(row.dc_out + j, left);
    cell_backward<Math<T>>(cell, load<T>(row.c_prev + j, left), dm, dc, d);
    if (row.dgates_out) {
      const Cell<Vec<T>> slope = cell_slopes(cell);
      d.i += slope.i * load<T>(row.dgates_out + j, left);
      d.f += slope.f * load<T>(row.dgates_out + H + j, left);
      d.g += slope.g * load<T>(row.dgates_out + 2 * H + j, left);
      d.o += slope.o * load<T>(row.dgates_out + 3 * H + j, left);
    }
    store<T>(row.dc + j, dc);
    row.store_dgates(H, j, d, left);
    if (row.m) store<T>(row.m + j, cell.m, left);
  }

  // The rest of a step for its active row q, of another cell.
  void finish_row(const Walk& walk, int64_t q) const {
    if (q < walk.rows) variant_.finish(walk.row[q]);
  }

  const LayerBackward& p_;
  const LayerShape& s_;
  const BackwardWeights<M>& w_;
  const ChunkGradients<S, M>& chunk_;
  const int64_t d_, b0_, rows_, G_, padded_;
  const Schedule schedule_;
  Element* carried_;  // [rows][4H]
  T* dc_;             // [rows][padded]
  T* c0_;             // [rows][H] in the compute type
  T* zeros_;          // dgates or c of no step
  const BackwardVariant<S, M> variant_;
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
