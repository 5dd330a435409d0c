// What the input brings to the forward pass of one direction: pre-activations x w_ih^T + b of the
// active rows of a chunk of steps, or those that the caller has made already.
//
// Rows of x are multiplied where they lie, with any strides; where they are no operands as they
// lie, they are converted once into a worker's own memory.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

template <class S, class M>
class ForwardInput {
  using T = typename M::Compute;
  using Unit = typename M::Unit;
  using Element = typename M::Element;
  static constexpr int lanes = kLanes<T>;
  static constexpr int64_t k_block = 1024;

  struct Row {
    const Unit* x;
    T* gates;
    const T* given;  // pre-activations, where x holds those
  };

 public:
  // What each worker makes for itself on the way.
  struct Walk {
    Row* row;  // active rows of the chunk
    int64_t rows;
    Unit* x;      // [rows][units(I)] when x must be converted
    Unit* panel;  // one group of w_ih, packed on the way
  };

  ForwardInput(const LayerForward& p, const CpuPlan& plan, const ForwardWeights<M>& w, int64_t d)
      : p_(p), s_(p.shape), plan_(plan), w_(w), d_(d) {}

  // For chunks of at most so many rows.
  Walk walk(int64_t most, Arena& arena) const {
    Walk walk{};
    if (!plan_.input_within_step) walk.row = arena.take<Row>(most);
    if (staged()) walk.x = arena.take<Unit>(most * units<M>(s_.I));
    if (plan_.input == Weights::packed_on_the_way && p_.w_ih)
      walk.panel = arena.take<Unit>(units<M>(s_.I) * 4 * lanes);
    return walk;
  }

  // The row of x at t, b; a converted copy in slot `index` where x is not in the form of operands.
  const Unit* operand(const Walk& walk, int64_t t, int64_t b, int64_t index) const {
    const S* x = static_cast<const S*>(p_.x) + t * p_.x_stride_t + b * p_.x_stride_b +
                 s_.input_of(d_) * s_.I;
    if (!walk.x) return reinterpret_cast<const Unit*>(x);
    Unit* out = walk.x + index * units<M>(s_.I);
    for (int64_t k = 0; k < units<M>(s_.I); k += kLanes<Unit>) {
      store_lanes(out + k, M::along(x + k * M::depth, s_.I - k * M::depth),
                  lanes_left(k, units<M>(s_.I), kLanes<Unit>));
    }
    return out;
  }

  // Adds the row at t, b to the chunk; its pre-activations go to `gates`.
  void add(Walk& walk, int64_t t, int64_t b, T* gates) const {
    Row& row = walk.row[walk.rows];
    row.gates = gates;
    if (p_.w_ih) {
      row.x = operand(walk, t, b, walk.rows);
    } else {
      row.given =
          static_cast<const T*>(p_.x) + t * p_.x_stride_t + b * p_.x_stride_b + d_ * 4 * s_.H;
    }
    ++walk.rows;
  }

  // Pre-activations of the chunk, for groups n0 .. n1.
  void multiply(const Walk& walk, int64_t n0, int64_t n1) const {
    if (!p_.w_ih) return copy_given(walk, n0, n1);
    const S* const w = static_cast<const S*>(p_.w_ih[d_]);
    if (plan_.input == Weights::unpacked) {
      start_from_bias(walk, n0, n1);
      multiply_unpacked<T>(
          w, s_.H, s_.I, n0, n1, walk.rows,
          [&](int64_t q) { return reinterpret_cast<const Element*>(walk.row[q].x); },
          [&](int64_t q) { return walk.row[q].gates; });
      return;
    }
    for (int64_t n = n0; n < n1; ++n) {
      const Unit* group = walk.panel;
      if (walk.panel) {
        w_.pack_group(w, s_.H, s_.I, n, walk.panel);
      } else {
        group = w_.group_of(w_.w_ih, s_.I, n);
      }
      multiply_packed(walk, n, group);
    }
  }

 private:
  // Whether rows of x are no operands as they lie: of another type, or not whole units in their places.
  bool staged() const {
    if (!p_.w_ih) return false;
    const auto whole = [](int64_t elements) { return elements % M::depth == 0; };
    return !std::is_same_v<S, Element> || !whole(s_.I) || !whole(p_.x_stride_t) ||
           !whole(p_.x_stride_b) || reinterpret_cast<uintptr_t>(p_.x) % alignof(Unit) != 0;
  }

  void copy_given(const Walk& walk, int64_t n0, int64_t n1) const {
    for (int64_t q = 0; q < walk.rows; ++q) {
      for (int gate = 0; gate < 4; ++gate) {
        for (int64_t n = n0; n < n1; ++n) {
          const int64_t at = gate * s_.H + n * lanes;
          const int left = lanes_left(n * lanes, s_.H, lanes);
          store<T>(walk.row[q].gates + at, load<T>(walk.row[q].given + at, left), left);
        }
      }
    }
  }

  void start_from_bias(const Walk& walk, int64_t n0, int64_t n1) const {
    for (int64_t q = 0; q < walk.rows; ++q) {
      for (int64_t n = n0; n < n1; ++n) {
#pragma GCC unroll 4
        for (int gate = 0; gate < 4; ++gate) {
          store<T>(walk.row[q].gates + gate * s_.H + n * lanes,
                   load<T>(w_.bias + (n * 4 + gate) * lanes), lanes_left(n * lanes, s_.H, lanes));
        }
      }
    }
  }

  // One group of hidden units, along blocks of the depth.
  LSTM_INLINE void multiply_packed(const Walk& walk, int64_t n, const Unit* group) const {
    const int64_t K = units<M>(s_.I), j0 = n * lanes;
    const int left = lanes_left(j0, s_.H, lanes);
    int64_t k0 = 0;
    do {
      const int64_t depth = std::min(K - k0, k_block);
      for_row_tiles(walk.rows, [&]<int R>(int64_t first) {
        const Row* const row = walk.row + first;
        Vec<T> acc[R][4];
        const Unit* a[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          a[r] = row[r].x + k0;
#pragma GCC unroll 4
          for (int gate = 0; gate < 4; ++gate) {
            acc[r][gate] = k0 == 0 ? load<T>(w_.bias + (n * 4 + gate) * lanes)
                                   : load<T>(row[r].gates + gate * s_.H + j0, left);
          }
        }
        accumulate<M, R, 4, chains_of(kRows, 4)>(acc, a, group + k0 * 4 * lanes, depth);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int gate = 0; gate < 4; ++gate)
            store<T>(row[r].gates + gate * s_.H + j0, acc[r][gate], left);
        }
      });
      k0 += depth;
    } while (k0 < K);
  }

  const LayerForward& p_;
  const LayerShape& s_;
  const CpuPlan& plan_;
  const ForwardWeights<M>& w_;
  const int64_t d_;
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
