// A step of other cells than torch.nn.LSTM's, for one row of the batch: what follows the products.
//
// One body for all options. It takes whole rows, as layer norm must, and costs little more than the
// plain cell, which is done in registers: a row of pre-activations stays in the nearest cache.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

constexpr int64_t kChoices = 64;  // rows of choices are made in runs of so many units

// Every other lane of 32 bits is multiplied to 64, which is an instruction; widening all of them and
// multiplying lanes of 64 bits takes twice as long.
struct VectorProduct {
  using U = Vec<uint32_t>;
  typedef uint64_t Pairs __attribute__((vector_size(LSTM_VECTOR_BYTES)));
  static constexpr uint64_t kLow = 0xFFFFFFFF;

  static LSTM_INLINE void wide(const U& a, uint32_t m, U& high, U& low) {
    const Pairs even = even_lanes(a, m);
    const Pairs odd = even_lanes(bit_cast<U>(bit_cast<Pairs>(a) >> 32), m);
    high = bit_cast<U>((even >> 32) | (odd & ~kLow));
    low = bit_cast<U>((even & kLow) | (odd << 32));
  }

 private:
  static LSTM_INLINE Pairs even_lanes(const U& a, uint32_t m) {
#if LSTM_VECTOR_BYTES == 64
    return bit_cast<Pairs>(
        _mm512_maskz_mul_epu32(__mmask8(-1), bit_cast<__m512i>(a), _mm512_set1_epi32(int(m))));
#elif LSTM_VECTOR_BYTES == 32 && defined(__AVX2__)
    return bit_cast<Pairs>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi32(int(m))));
#else
    return (bit_cast<Pairs>(a) & kLow) * uint64_t(m);
#endif
  }
};

template <class T>
class VariantRows {
  static constexpr int lanes = kLanes<T>;

 public:
  VariantRows(const LayerShape& s, const Variant& v, int64_t d)
      : v_(v), d_(d), H_(s.H), padded_(round_up(s.H, lanes)) {
    if (v.peephole) peephole_ = static_cast<const T*>(v.peephole) + d * 3 * s.H;
    if (v.norm) norm_ = static_cast<const T*>(v.norm) + d * 6 * s.H;
  }

  // Rows of sums that backward makes besides: of peepholes, then of norm.
  static int64_t sums(const Variant& v) { return (v.peephole ? 3 : 0) + (v.norm ? 6 : 0); }

  // The row of h_scale, or null.
  static const T* h_scale(const LayerShape& s, const Variant* v, int64_t d, int64_t b) {
    return v && v->h_scale ? static_cast<const T*>(v->h_scale) + (d * s.B + b) * s.P : nullptr;
  }

  // How much of the state to keep, for n units; `keep` holds whole runs. t is a time of the whole
  // sequence.
  void choose(Choice choice, int64_t t, int64_t b, int64_t n, T* keep) const {
    const double probability = choice == Choice::h ? v_.cell.zoneout_h : v_.cell.zoneout_c;
    if (!v_.seed) {
      for (int64_t j = 0; j < round_up(n, kChoices); ++j) keep[j] = T(probability);
      return;
    }
    using U = Vec<uint32_t>;
    constexpr int width = kLanes<uint32_t>;
    const uint64_t threshold = random_threshold(probability);
    for (int64_t j = 0; j < n; j += kChoices) {
      for (int lane = 0; lane < 16; lane += width) {
        uint32_t first[width];
        for (int l = 0; l < width; ++l) first[l] = random_lane(j + lane + l);
        PhiloxState<U> s{
            {bit_cast<U>(first), U{} + uint32_t(b), U{} + uint32_t(t), U{} + uint32_t(choice)}};
        philox<VectorProduct>(s, v_.seed[d_]);
        for (int word = 0; word < 4; ++word) {
          const auto drawn = bit_cast<Words>(s.word[word]);
          T* const out = keep + j + 16 * word + lane;
          for (int l = 0; l < width; ++l) out[l] = drawn.value[l] < threshold ? T(1) : T(0);
        }
      }
    }
  }

  struct Forward {
    T* z;                    // [4][padded], pre-activations; with norm, w_hh h alone. Overwritten
    const T* given;          // [4H], with norm: the rest of the pre-activations
    const T *c_prev, *keep;  // keep: null without zoneout of c
    T* c;
    T *c_out, *gates, *normed, *rstd;  // what is kept for backward; or null
  };

  // output(j, m, left) for each vector of the unprojected output.
  template <class Output>
  LSTM_INLINE void forward(const Forward& row, Output&& output) const {
    if (norm_) add_normed(row);
    for (int64_t j = 0; j < padded_; j += lanes) {
      const int left = lanes_left(j, H_, lanes);
      T* const z = row.z + j;
      Cell<Vec<T>> cell{
          load<T>(z), load<T>(z + padded_), load<T>(z + 2 * padded_), load<T>(z + 3 * padded_), {},
          {}};
      const Vec<T> c_prev = load<T>(row.c_prev + j);
      variant_cell<Math<T>>(v_.cell, peephole(j, left), cell, c_prev);
      if (row.gates) {
        store<T>(row.gates + j, cell.i, left);
        store<T>(row.gates + H_ + j, cell.f, left);
        store<T>(row.gates + 2 * H_ + j, cell.g, left);
        store<T>(row.gates + 3 * H_ + j, cell.o, left);
      }
      Vec<T> c = cell.c;
      if (row.keep) {
        const Vec<T> keep = load<T>(row.keep + j);
        c = keep * c_prev + (1 - keep) * c;
      }
      store<T>(row.c + j, c);
      if (row.c_out) store<T>(row.c_out + j, c, left);
      if (norm_) {
        store<T>(z, cell.c);
        store<T>(z + padded_, cell.o);
      } else {
        output(j, cell.o * activate<Math<T>>(v_.cell.output, cell.c), left);
      }
    }
    if (!norm_) return;
    const Statistics of = statistics(row.z, 1);
    for (int64_t j = 0; j < padded_; j += lanes) {
      const int left = lanes_left(j, H_, lanes);
      const Vec<T> normed = (load<T>(row.z + j) - of.mean) * of.rstd;
      const Vec<T> shown = normed * norm(4, j, left) + norm(5, j, left);
      output(j, load<T>(row.z + padded_ + j) * activate<Math<T>>(v_.cell.output, shown), left);
    }
  }

  struct Backward {
    const T *gates, *c_prev;
    const T* dm;                // [padded]
    const T *dc_next, *dc_out;  // dc_out: null: zero
    const T* keep;              // null without zoneout of c
    T* dc;
    const T *normed, *rstd;  // with norm
    T* sums;                 // [sums][H]; null: not wanted
    T* dgates_x;             // [4H], the gradient of pre-activations; null: not wanted
    T* room;                 // [8][padded], with norm
  };

  // use(j, d, m, left) for each vector of the gradients of what w_hh h is added to, or of w_hh h
  // itself with norm, and of the unprojected output.
  template <class Use>
  LSTM_INLINE void backward(const Backward& row, Use&& use) const {
    if (norm_) return backward_normed(row, use);
    for (int64_t j = 0; j < padded_; j += lanes) {
      const int left = lanes_left(j, H_, lanes);
      const Vec<T> c_prev = load<T>(row.c_prev + j, left);
      Cell<Vec<T>> cell = activated(row.gates, j, left), d;
      cell.c = variant_state(v_.cell, cell, c_prev);
      const Vec<T> s = activate<Math<T>>(v_.cell.output, cell.c);
      const Vec<T> dc = variant_output_backward(v_.cell, cell, s, load<T>(row.dm + j), d);
      finish(row, j, left, cell, c_prev, dc, d);
      use(j, d, cell.m, left);
    }
  }

 private:
  struct Words {
    uint32_t value[kLanes<uint32_t>];
  };
  struct Statistics {
    T mean, rstd;
  };

  LSTM_INLINE Peephole<Vec<T>> peephole(int64_t j, int left) const {
    if (!peephole_) return Peephole<Vec<T>>{Vec<T>{}, Vec<T>{}, Vec<T>{}};
    return {load<T>(peephole_ + j, left), load<T>(peephole_ + H_ + j, left),
            load<T>(peephole_ + 2 * H_ + j, left)};
  }
  LSTM_INLINE Vec<T> norm(int row, int64_t j, int left) const {
    return load<T>(norm_ + row * H_ + j, left);
  }
  LSTM_INLINE Cell<Vec<T>> activated(const T* gates, int64_t j, int left) const {
    return {load<T>(gates + j, left),
            load<T>(gates + H_ + j, left),
            load<T>(gates + 2 * H_ + j, left),
            load<T>(gates + 3 * H_ + j, left),
            Vec<T>{},
            Vec<T>{}};
  }

  static LSTM_INLINE T total(const Vec<T>& v) {
    T sum = 0;
    for (int l = 0; l < lanes; ++l) sum += v[l];
    return sum;
  }
  // Lanes past the first `left` at zero.
  static LSTM_INLINE Vec<T> real(const Vec<T>& v, int left) {
    if (left == lanes) return v;
    Vec<T> result{};
    for (int l = 0; l < left; ++l) result[l] = v[l];
    return result;
  }

  // Of `blocks` blocks of H, each padded with zeros.
  LSTM_INLINE Statistics statistics(const T* v, int blocks) const {
    const T count = T(blocks * H_);
    Vec<T> sum{};
    for (int64_t j = 0; j < blocks * padded_; j += lanes) sum += load<T>(v + j);
    const T mean = total(sum) / count;
    Vec<T> squares{};
    for (int block = 0; block < blocks; ++block) {
      for (int64_t j = 0; j < padded_; j += lanes) {
        const Vec<T> off = real(load<T>(v + block * padded_ + j) - mean, lanes_left(j, H_, lanes));
        squares += off * off;
      }
    }
    return {mean, T(1 / __builtin_sqrt(double(total(squares) / count) + kNormEpsilon))};
  }

  LSTM_INLINE void add_normed(const Forward& row) const {
    const Statistics of = statistics(row.z, 4);
    if (row.rstd) *row.rstd = of.rstd;
    for (int gate = 0; gate < 4; ++gate) {
      for (int64_t j = 0; j < padded_; j += lanes) {
        const int left = lanes_left(j, H_, lanes);
        T* const z = row.z + gate * padded_ + j;
        const Vec<T> normed = (load<T>(z) - of.mean) * of.rstd;
        if (row.normed) store<T>(row.normed + gate * H_ + j, normed, left);
        store<T>(z, load<T>(row.given + gate * H_ + j, left) + normed * norm(gate, j, left));
      }
    }
  }

  // The rest of a cell's backward, from the gradient of c that its output brings.
  LSTM_INLINE void finish(const Backward& row, int64_t j, int left, const Cell<Vec<T>>& cell,
                          const Vec<T>& c_prev, Vec<T> dc, Cell<Vec<T>>& d) const {
    Vec<T> later = load<T>(row.dc_next + j);
    if (row.dc_out) later += load<T>(row.dc_out + j, left);
    Vec<T> kept{};
    if (row.keep) {
      const Vec<T> keep = load<T>(row.keep + j);
      kept = keep * later;
      later = (1 - keep) * later;
    }
    dc += later;
    variant_cell_backward(v_.cell, peephole(j, left), cell, c_prev, dc, d);
    store<T>(row.dc + j, dc + kept);
    if (row.dgates_x) {
      store<T>(row.dgates_x + j, d.i, left);
      store<T>(row.dgates_x + H_ + j, d.f, left);
      store<T>(row.dgates_x + 2 * H_ + j, d.g, left);
      store<T>(row.dgates_x + 3 * H_ + j, d.o, left);
    }
    if (row.sums && peephole_) {
      store<T>(row.sums + j, d.i * c_prev, left);
      store<T>(row.sums + H_ + j, d.f * c_prev, left);
      store<T>(row.sums + 2 * H_ + j, d.o * cell.c, left);
    }
  }

  template <class Use>
  LSTM_INLINE void backward_normed(const Backward& row, Use&& use) const {
    T *const c = row.room, *const dnormed = row.room + padded_, *const d_o = row.room + 2 * padded_,
             *const dz = row.room + 4 * padded_;
    T* const sums = row.sums ? row.sums + (peephole_ ? 3 * H_ : 0) : nullptr;
    for (int64_t j = 0; j < padded_; j += lanes) {
      const int left = lanes_left(j, H_, lanes);
      const Vec<T> c_prev = load<T>(row.c_prev + j, left);
      store<T>(c + j, variant_state(v_.cell, activated(row.gates, j, left), c_prev));
    }
    const Statistics of = statistics(c, 1);
    Vec<T> mean{}, product{};
    for (int64_t j = 0; j < padded_; j += lanes) {
      const int left = lanes_left(j, H_, lanes);
      Cell<Vec<T>> cell = activated(row.gates, j, left), d;
      const Vec<T> normed = (load<T>(c + j) - of.mean) * of.rstd, gain = norm(4, j, left);
      const Vec<T> s = activate<Math<T>>(v_.cell.output, Vec<T>(normed * gain + norm(5, j, left)));
      const Vec<T> dshown = variant_output_backward(v_.cell, cell, s, load<T>(row.dm + j), d);
      if (sums) {
        store<T>(sums + 4 * H_ + j, dshown * normed, left);
        store<T>(sums + 5 * H_ + j, dshown, left);
      }
      store<T>(dnormed + j, dshown * gain);
      store<T>(d_o + j, d.o);
      store<T>(row.room + 3 * padded_ + j, cell.m);
      mean += dshown * gain;
      product += dshown * gain * normed;
    }
    T scale = 1 / T(H_), mean_of = total(mean) * scale, product_of = total(product) * scale;
    mean = product = Vec<T>{};
    for (int64_t j = 0; j < padded_; j += lanes) {
      const int left = lanes_left(j, H_, lanes);
      const Vec<T> c_prev = load<T>(row.c_prev + j, left),
                   normed = (load<T>(c + j) - of.mean) * of.rstd;
      Cell<Vec<T>> cell = activated(row.gates, j, left), d;
      cell.c = load<T>(c + j);
      d.o = load<T>(d_o + j);
      const Vec<T> dc = (load<T>(dnormed + j) - mean_of - normed * product_of) * of.rstd;
      finish(row, j, left, cell, c_prev, real(dc, left), d);
      const Vec<T> gates[4] = {d.i, d.f, d.g, d.o};
      for (int gate = 0; gate < 4; ++gate) {
        const Vec<T> h_normed = load<T>(row.normed + gate * H_ + j, left),
                     dh = gates[gate] * norm(gate, j, left);
        if (sums) store<T>(sums + gate * H_ + j, gates[gate] * h_normed, left);
        store<T>(dz + gate * padded_ + j, dh);
        mean += dh;
        product += dh * h_normed;
      }
    }
    scale = 1 / T(4 * H_);
    mean_of = total(mean) * scale, product_of = total(product) * scale;
    for (int64_t j = 0; j < padded_; j += lanes) {
      const int left = lanes_left(j, H_, lanes);
      Vec<T> d[4];
      for (int gate = 0; gate < 4; ++gate) {
        const Vec<T> h_normed = load<T>(row.normed + gate * H_ + j, left);
        d[gate] = (load<T>(dz + gate * padded_ + j) - mean_of - h_normed * product_of) * *row.rstd;
      }
      use(j, Cell<Vec<T>>{d[0], d[1], d[2], d[3], {}, {}}, load<T>(row.room + 3 * padded_ + j),
          left);
    }
  }

  const Variant& v_;
  const int64_t d_, H_, padded_;
  const T *peephole_ = nullptr, *norm_ = nullptr;
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
