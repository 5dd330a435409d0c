// What other cells than torch.nn.LSTM's add to the backward pass of one direction over a range of
// batch rows: gradients that go through memory, for the rows of variant.h, and what zoneout passes
// on beside them.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

template <class S, class M>
class BackwardVariant {
  using T = typename M::Compute;
  using Row = BackwardRow<S, M>;
  static constexpr int lanes = kLanes<T>;

 public:
  // For the plain cell: no memory.
  BackwardVariant(const LayerBackward& p, int64_t d, int64_t b0, int64_t rows, Arena& arena)
      : p_(p),
        s_(p.shape),
        d_(d),
        b0_(b0),
        rows_(rows),
        padded_(round_up(s_.H, lanes)),
        width_(round_up(std::max(s_.P, s_.H), kChoices)) {
    if (!p.variant) return;
    const Variant& v = *p.variant;
    dm_ = arena.take<T>(rows_ * padded_);
    if (v.cell.zoneout_h > 0) {
      keep_h_ = arena.take<T>(rows_ * width_);
      dh_ = arena.take<T>(rows_ * width_);
    }
    if (v.cell.zoneout_c > 0) keep_c_ = arena.take<T>(rows_ * width_);
    if (v.norm) room_ = arena.take<T>(rows_ * 8 * padded_);
  }

  // Of row b of the part: where the gradient of the unprojected output goes; h_scale, or null; what
  // zoneout passes on to the h before, or null.
  T* dm(int64_t b) const { return dm_ + b * padded_; }
  const T* h_scale(int64_t b) const { return VariantRows<T>::h_scale(s_, p_.variant, d_, b0_ + b); }
  T* dh_next(int64_t b) const { return dh_ ? dh_ + b * width_ : nullptr; }

  void start() const {
    if (dh_) std::memset(static_cast<void*>(dh_), 0, sizeof(T) * rows_ * width_);
  }

  // Zoneout's choices of step t, before anything else of it.
  bool chooses() const { return keep_h_ || keep_c_; }
  void choose(const Row& row, int64_t t) const {
    const VariantRows<T> rows(s_, *p_.variant, d_);
    t += p_.variant->first_step;
    if (keep_h_) rows.choose(Choice::h, t, b0_ + row.b, s_.P, keep_h_ + row.b * width_);
    if (keep_c_) rows.choose(Choice::c, t, b0_ + row.b, s_.H, keep_c_ + row.b * width_);
  }

  // All of dh, from what w_hh brings; what is for the h before zoneout comes out.
  LSTM_INLINE Vec<T> output(const Row& row, int64_t j, Vec<T> dh) const {
    const int left = lanes_left(j, s_.P, lanes);
    const T* const scale = h_scale(row.b);
    if (scale) dh *= load<T>(scale + j, left);
    if (row.dh_next) dh += load<T>(row.dh_next + j);
    dh += row.outer_gradient(j, left);
    if (!dh_) return dh;
    const Vec<T> keep = load<T>(keep_h_ + row.b * width_ + j);
    store<T>(dh_ + row.b * width_ + j, keep * dh);
    return (1 - keep) * dh;
  }

  // The rest of a step for one row, from the gradient of the unprojected output.
  void finish(const Row& row) const {
    const Variant& v = *p_.variant;
    const VariantRows<T> rows(s_, v, d_);
    const int64_t H = s_.H, G = 4 * H;
    rows.backward({row.gates, row.c_prev, dm(row.b), row.dc_next, row.dc_out,
                   keep_c_ ? keep_c_ + row.b * width_ : nullptr, row.dc,
                   v.norm ? static_cast<const T*>(v.normed) + row.at * G : nullptr,
                   v.norm ? static_cast<const T*>(v.rstd) + row.at : nullptr, row.sums,
                   p_.dx && !p_.w_ih ? static_cast<T*>(p_.dx) + row.at * G : nullptr,
                   v.norm ? room_ + row.b * 8 * padded_ : nullptr},
                  [&](int64_t j, const Cell<Vec<T>>& d, const Vec<T>& m, int left) {
                    row.store_dgates(H, j, d, left);
                    if (row.m) store<T>(row.m + j, m, left);
                  });
    for (int64_t j = 0; row.h_scaled && j < s_.P; j += lanes) {
      const int left = lanes_left(j, s_.P, lanes);
      const Vec<T> h = row.h_prev ? load<T>(row.h_prev + j, left) : Vec<T>{};
      store<T>(row.h_scaled + j, h * load<T>(h_scale(row.b) + j, left), left);
    }
  }

 private:
  const LayerBackward& p_;
  const LayerShape& s_;
  const int64_t d_, b0_, rows_, padded_, width_;
  T* dm_ = nullptr;                          // [rows][padded]
  T* dh_ = nullptr;                          // [rows][width]
  T *keep_h_ = nullptr, *keep_c_ = nullptr;  // [rows][width]
  T* room_ = nullptr;                        // [rows][8][padded], with norm
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
