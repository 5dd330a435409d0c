// Backward pass of the recurrence of one direction over a range of batch rows, by one worker or
// several in step.
//
// Steps run against the direction of the recurrence. A step takes dh = dy + dgates[next] w_hh in
// registers, a tile of batch rows times a panel of hidden units, and goes straight on to the cell's
// gradients. The dgates of a chunk of steps stay in scratch memory for the products that
// gradients.h makes of them.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

// Packed weights of one direction, shared by all workers: products along the 4H gates, and along P
// for the projection.
template <class M>
struct BackwardWeights {
  using Unit = typename M::Unit;
  Panels<M> w_ih;        // depth units(4H), columns I
  Panels<M> w_hh;        // depth units(4H), columns P
  Panels<M> w_hr;        // depth units(P), columns H
  bool w_ih_on_the_way;  // used by one chunk alone: packed panel by panel as it is needed

  // Where no step comes after another and nobody wants dh0, nothing is multiplied by w_hh.
  void reserve(Arena& arena, const LayerBackward& p, bool one_chunk) {
    const LayerShape& s = p.shape;
    const auto panels = [&](int64_t depth, int64_t columns, bool keep) {
      return Panels<M>{arena.take<Unit>(keep ? Panels<M>::size(units<M>(depth), columns) : 0),
                       units<M>(depth), columns};
    };
    w_ih_on_the_way = one_chunk;
    w_hh = panels(s.T > 1 || p.carry_in || p.dh0 ? 4 * s.H : 0, s.P, true);
    w_ih = panels(4 * s.H, p.dx && p.w_ih ? s.I : 0, !one_chunk);
    w_hr = panels(s.P, s.projected ? s.H : 0, true);
  }

  // Packs panel n of all count() panels of direction d.
  int64_t count() const {
    return w_hh.count() + w_hr.count() + (w_ih_on_the_way ? 0 : w_ih.count());
  }
  template <class S>
  void pack(const LayerBackward& p, int64_t d, int64_t n) const {
    if (n < w_hh.count())
      return pack_rows(w_hh.panel(n), n, w_hh, static_cast<const S*>(p.w_hh[d]), 4 * p.shape.H);
    n -= w_hh.count();
    if (n < w_hr.count())
      return pack_rows(w_hr.panel(n), n, w_hr, static_cast<const S*>(p.w_hr[d]), p.shape.P);
    n -= w_hr.count();
    pack_rows(w_ih.panel(n), n, w_ih, static_cast<const S*>(p.w_ih[d]), 4 * p.shape.H);
  }

  // Panel n of w_ih: the packed one, or one that is packed into `room` now.
  template <class S>
  const Unit* input_panel(const LayerBackward& p, int64_t d, int64_t n, Unit* room) const {
    if (!w_ih_on_the_way) return w_ih.panel(n);
    pack_rows(room, n, w_ih, static_cast<const S*>(p.w_ih[d]), 4 * p.shape.H);
    return room;
  }

 private:
  template <class S>
  static void pack_rows(Unit* out, int64_t n, const Panels<M>& panels, const S* w, int64_t depth) {
    const int64_t columns = panels.columns;
    pack_panel<M>(out, n, panels.K, columns,
                  [=](int64_t k) -> const S* { return k < depth ? w + k * columns : nullptr; });
  }
};

// What the steps of one chunk leave for the products, of one direction and part: a slot for each
// step and batch row.
template <class S, class M>
struct ChunkGradients {
  using T = typename M::Compute;
  using Element = typename M::Element;
  Element* dgates;    // [steps][rows][4H]
  Element* dh;        // [steps][rows][stride_dh], with projection
  Element* m;         // [steps][rows][H], with projection
  S* h = nullptr;     // [steps][rows][P], h as it met w_hh, with h_scale
  T* sums = nullptr;  // [steps][rows][sums of VariantRows][H]
  int64_t d, b0, rows, steps, G, stride_dh, H, P, extra = 0;

  ChunkGradients(const LayerBackward& p, const CpuPlan& plan, int64_t d, int64_t part,
                 int64_t steps, Arena& arena)
      : d(d),
        b0(plan.first_row(part, p.shape.B)),
        rows(plan.first_row(part + 1, p.shape.B) - b0),
        steps(steps) {
    const LayerShape& s = p.shape;
    G = 4 * s.H;
    H = s.H;
    P = s.P;
    stride_dh = round_up(s.P, M::depth * kLanes<typename M::Compute>);
    dgates = arena.take<Element>(steps * rows * G);
    dh = s.projected ? arena.take<Element>(steps * rows * stride_dh) : nullptr;
    m = s.projected ? arena.take<Element>(steps * rows * H) : nullptr;
    if (!p.variant || !p.sums_weights()) return;
    extra = VariantRows<T>::sums(*p.variant) * H;
    if (extra) sums = arena.take<T>(steps * rows * extra);
    if (p.variant->h_scale) h = arena.take<S>(steps * rows * P);
  }
  // Step `index` in the order of the recurrence and row b of the part.
  int64_t slot(int64_t index, int64_t b) const { return index % steps * rows + b; }
  Element* dgates_at(int64_t slot) const { return dgates + slot * G; }
  Element* dh_at(int64_t slot) const { return dh ? dh + slot * stride_dh : nullptr; }
  Element* m_at(int64_t slot) const { return m ? m + slot * H : nullptr; }
  S* h_at(int64_t slot) const { return h ? h + slot * P : nullptr; }
  T* sums_at(int64_t slot) const { return sums ? sums + slot * extra : nullptr; }
};

template <class S, class M>
class BackwardJob {
  using T = typename M::Compute;
  using Unit = typename M::Unit;
  using Element = typename M::Element;
  static constexpr int lanes = kLanes<T>;

  struct Row {
    const Unit* carry;  // dgates of the step after
    const T *gates, *c, *c_prev;
    const S *dy, *dh_n;            // null: zero
    const T *dc_out, *dgates_out;  // null: zero
    const T* dc_next;              // gradient of c from the step after
    T* dc;
    Element *dgates, *dh, *m;
    int64_t b, at;     // other cells: of the part, and of [T, B, D]
    const T* dh_next;  // what zoneout brings to h from the step after
    S* h_scaled;       // for dw_hh; or null
    const S* h_prev;   // null: zeros
    T* sums;
  };

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
        schedule_(schedule_of(s_, d_, p.lengths, p.reset)) {
    carried_ = arena.take<Element>(rows_ * G_);
    dc_ = arena.take<T>(rows_ * padded_);
    c0_ = p.c0 ? arena.take<T>(rows_ * s_.H) : nullptr;
    zeros_ = arena.take<T>(std::max(G_, padded_));
    if (!p.variant) return;
    const Variant& v = *p.variant;
    dm_ = arena.take<T>(rows_ * padded_);
    if (v.cell.zoneout_h > 0) {
      keep_h_ = arena.take<T>(rows_ * width());
      dh_ = arena.take<T>(rows_ * width());
    }
    if (v.cell.zoneout_c > 0) keep_c_ = arena.take<T>(rows_ * width());
    if (v.norm) room_ = arena.take<T>(rows_ * 8 * padded_);
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
    if (dh_) std::memset(static_cast<void*>(dh_), 0, sizeof(T) * rows_ * width());
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
      if (any.keep_h_ || any.keep_c_) {
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
          jobs[item / any.rows_].variant_row(walks[item / any.rows_], item % any.rows_);
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
          for (int v = 0; v < N; ++v) {
            const int64_t j = n * w_.w_hh.width + v * lanes, at = (base + b) * s_.P + j;
            const int left = lanes_left(j, s_.P, lanes);
            if (h_scale(b)) acc[r][v] *= load<T>(h_scale(b) + j, left);
            if (dh_ && !walk.fresh[b]) acc[r][v] += load<T>(dh_ + b * width() + j);
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
        row.dh_next = !dh_ || walk.fresh[b] ? nullptr : dh_ + b * width();
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

  // The part of dh that comes from outside the recurrence.
  LSTM_INLINE Vec<T> outer_gradient(const Row& row, int64_t j, int left) const {
    Vec<T> dh{};
    if (row.dy) dh = load<T>(row.dy + j, left);
    if (row.dh_n) dh += load<T>(row.dh_n + j, left);
    return dh;
  }

  // Of row b of the part, or null.
  const T* h_scale(int64_t b) const { return VariantRows<T>::h_scale(s_, p_.variant, d_, b0_ + b); }
  int64_t width() const { return round_up(std::max(s_.P, s_.H), kChoices); }

  void choose(const Walk& walk, int64_t index, int64_t q) const {
    if (q >= walk.rows) return;
    const VariantRows<T> rows(s_, *p_.variant, d_);
    const int64_t b = walk.row[q].b, t = schedule_.time(index) + p_.variant->first_step;
    if (keep_h_) rows.choose(Choice::h, t, b0_ + b, s_.P, keep_h_ + b * width());
    if (keep_c_) rows.choose(Choice::c, t, b0_ + b, s_.H, keep_c_ + b * width());
  }

  // All of dh of another cell, from what w_hh brings; what is for the h before zoneout comes out.
  LSTM_INLINE Vec<T> variant_output(const Row& row, int64_t j, Vec<T> dh) const {
    const int left = lanes_left(j, s_.P, lanes);
    const T* const scale = h_scale(row.b);
    if (scale) dh *= load<T>(scale + j, left);
    if (row.dh_next) dh += load<T>(row.dh_next + j);
    dh += outer_gradient(row, j, left);
    if (!dh_) return dh;
    const Vec<T> keep = load<T>(keep_h_ + row.b * width() + j);
    store<T>(dh_ + row.b * width() + j, keep * dh);
    return (1 - keep) * dh;
  }

  void variant_row(const Walk& walk, int64_t q) const {
    if (q >= walk.rows) return;
    const Row& row = walk.row[q];
    const Variant& v = *p_.variant;
    const VariantRows<T> rows(s_, v, d_);
    const int64_t H = s_.H;
    rows.backward({row.gates, row.c_prev, dm_ + row.b * padded_, row.dc_next, row.dc_out,
                   keep_c_ ? keep_c_ + row.b * width() : nullptr, row.dc,
                   v.norm ? static_cast<const T*>(v.normed) + row.at * G_ : nullptr,
                   v.norm ? static_cast<const T*>(v.rstd) + row.at : nullptr, row.sums,
                   p_.dx && !p_.w_ih ? static_cast<T*>(p_.dx) + row.at * G_ : nullptr,
                   v.norm ? room_ + row.b * 8 * padded_ : nullptr},
                  [&](int64_t j, const Cell<Vec<T>>& d, const Vec<T>& m, int left) {
                    store<T>(row.dgates + j, d.i, left);
                    store<T>(row.dgates + H + j, d.f, left);
                    store<T>(row.dgates + 2 * H + j, d.g, left);
                    store<T>(row.dgates + 3 * H + j, d.o, left);
                    if (row.m) store<T>(row.m + j, m, left);
                  });
    for (int64_t j = 0; row.h_scaled && j < s_.P; j += lanes) {
      const int left = lanes_left(j, s_.P, lanes);
      const Vec<T> h = row.h_prev ? load<T>(row.h_prev + j, left) : Vec<T>{};
      store<T>(row.h_scaled + j, h * load<T>(h_scale(row.b) + j, left), left);
    }
  }

  // With projection: dh, panel n of it, kept for dw_hr.
  void output_gradient(const Walk& walk, int64_t n) const {
    if (p_.variant) {
      return multiply(
          walk, w_.w_hh, n, false, [](const Row& row) { return row.carry; },
          [this](const Row& row, int64_t j, const Vec<T>& dh) {
            store<T>(row.dh + j, variant_output(row, j, dh));
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
        store<T>(dm_ + row.b * padded_ + j, s_.projected ? dm : variant_output(row, j, dm));
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
                outer ? outer_gradient(row[r], j, lanes_left(j, panels.columns, lanes)) : Vec<T>{};
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
    store<T>(row.dgates + j, d.i, left);
    store<T>(row.dgates + H + j, d.f, left);
    store<T>(row.dgates + 2 * H + j, d.g, left);
    store<T>(row.dgates + 3 * H + j, d.o, left);
    if (row.m) store<T>(row.m + j, cell.m, left);
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
  // Of other cells:
  T* dm_ = nullptr;  // [rows][padded]
  T* dh_ = nullptr;  // [rows][width], what zoneout passes on to the h before
  T *keep_h_ = nullptr, *keep_c_ = nullptr;  // [rows][width]
  T* room_ = nullptr;                        // [rows][8][padded], with norm
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
