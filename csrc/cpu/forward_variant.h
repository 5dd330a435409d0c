// What other cells than torch.nn.LSTM's add to the forward pass of one direction over a range of
// batch rows: products that leave their sums in memory, for the rows of variant.h, and the states
// that zoneout and h_scale need beside h and c.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

template <class S, class M>
class ForwardVariant {
  using T = typename M::Compute;
  using Unit = typename M::Unit;
  using Row = ForwardRow<S, M>;
  using More = ForwardVariantRow<T>;
  static constexpr int lanes = kLanes<T>;

 public:
  // For the plain cell: no memory, and no state of its own.
  ForwardVariant(const LayerForward& p, const CpuPlan& plan, const ForwardWeights<M>& w, int64_t d,
                 int64_t b0, int64_t rows, Arena& arena)
      : p_(p),
        s_(p.shape),
        plan_(plan),
        w_(w),
        d_(d),
        b0_(b0),
        rows_(rows),
        padded_(round_up(s_.H, lanes)),
        stride_h_(round_up(s_.P, kChoices)),
        stride_c_(round_up(s_.H, kChoices)) {
    if (!p.variant) return;
    const Variant& v = *p.variant;
    z_ = arena.take<T>(rows_ * 4 * padded_);
    if (v.h_scale || v.cell.zoneout_h > 0) h_state_ = arena.take<T>(rows_ * stride_h_);
    if (v.cell.zoneout_h > 0) keep_h_ = arena.take<T>(rows_ * stride_h_);
    if (v.cell.zoneout_c > 0) keep_c_ = arena.take<T>(rows_ * stride_c_);
  }

  // Of row b of the part, or null: h without h_scale, and h_scale.
  T* h_state(int64_t b) const { return h_state_ ? h_state_ + b * stride_h_ : nullptr; }
  const T* h_scale(int64_t b) const { return VariantRows<T>::h_scale(s_, p_.variant, d_, b0_ + b); }

  void start() const {
    if (h_state_) std::memset(static_cast<void*>(h_state_), 0, sizeof(T) * rows_ * stride_h_);
  }

  // Row b of the part, at `at` of [T, B, D]. `zeros`: its h before if it is fresh, else null.
  More row(int64_t b, int64_t at, const T* zeros) const {
    return {b,
            at,
            z_ + b * 4 * padded_,
            h_state(b),
            zeros ? zeros : h_state(b),
            keep_h_ ? keep_h_ + b * stride_h_ : nullptr,
            keep_c_ ? keep_c_ + b * stride_c_ : nullptr,
            h_scale(b)};
  }

  // The pre-activations of groups n0 .. n1, or, with norm, the part of w_hh h. A function of its own,
  // so that the plain cell's stays as it is.
  __attribute__((noinline)) void products(const Row* rows, const More* more, int64_t count,
                                          int64_t n0, int64_t n1, int64_t depth) const {
    const bool within_step = plan_.input_within_step, apart = p_.variant->norm;
    for (int64_t n = n0; n < n1; ++n) {
      const int64_t j0 = n * lanes;
      for_row_tiles(count, [&]<int R>(int64_t first) {
        const Row* const row = rows + first;
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
            store<T>(more[first + r].z + gate * padded_ + j0, acc[r][gate]);
        }
      });
    }
  }

  // The rest of step t for one row, up to the projection.
  void finish(const Row& row, const More& more, int64_t t) const {
    const Variant& v = *p_.variant;
    const VariantRows<T> rows(s_, v, d_);
    t += v.first_step;
    if (more.keep_h) rows.choose(Choice::h, t, b0_ + more.b, s_.P, more.keep_h);
    if (more.keep_c) rows.choose(Choice::c, t, b0_ + more.b, s_.H, more.keep_c);
    const bool normed = v.norm && p_.gates;
    rows.forward({more.z, row.gates, row.c_prev, more.keep_c, row.c, row.c_out,
                  p_.gates ? row.gates : nullptr,
                  normed ? static_cast<T*>(v.normed) + more.at * 4 * s_.H : nullptr,
                  normed ? static_cast<T*>(v.rstd) + more.at : nullptr},
                 [&](int64_t j, const Vec<T>& m, int left) {
                   s_.projected ? store<T>(row.m + j, m) : store_output(row, more, j, m, left);
                 });
  }

  static LSTM_INLINE void store_output(const Row& row, const More& more, int64_t j, Vec<T> h,
                                       int left) {
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

 private:
  const LayerForward& p_;
  const LayerShape& s_;
  const CpuPlan& plan_;
  const ForwardWeights<M>& w_;
  const int64_t d_, b0_, rows_, padded_, stride_h_, stride_c_;
  T* z_ = nullptr;        // [rows][4][padded]
  T* h_state_ = nullptr;  // [rows][stride_h], where h holds something else, or all of it is wanted
  T *keep_h_ = nullptr, *keep_c_ = nullptr;  // [rows][stride_h], [rows][stride_c]
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
