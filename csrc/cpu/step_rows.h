// What a step knows of one active row of the batch: where it reads and where it writes.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

template <class S, class M>
struct ForwardRow {
  using T = typename M::Compute;
  using Unit = typename M::Unit;
  using Element = typename M::Element;
  const Unit* x;  // input, where it is multiplied within the step
  const Unit* h;  // h of the step before
  Element* h_next;
  Element* m;
  T* gates;  // pre-activations in; activated gates out when they are kept
  const T* c_prev;
  T* c;
  T* c_out;  // where c of this step is kept, or null
  S* y;

  // h as the next step reads it is h as the caller sees it, rounding included.
  LSTM_INLINE void store_output(int64_t j, const Vec<T>& h, int left) const {
    store<T>(y + j, h, left);
    if constexpr (std::is_same_v<S, Element>) {
      store<T>(h_next + j, h);
    } else {
      store<T>(h_next + j, rounded<T, S>(h));
    }
  }
};

// The rest of a row, for other cells. Apart, so that rows of the plain cell stay small.
template <class T>
struct ForwardVariantRow {
  int64_t b, at;  // of the part, and of [T, B, D]
  T* z;
  T* h_state;          // h without h_scale; or null
  const T* h_prev;     // the same of the step before
  T *keep_h, *keep_c;  // null without zoneout
  const T* h_scale;    // or null
};

template <class S, class M>
struct BackwardRow {
  using T = typename M::Compute;
  using Unit = typename M::Unit;
  using Element = typename M::Element;
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

  // The part of dh that comes from outside the recurrence.
  LSTM_INLINE Vec<T> outer_gradient(int64_t j, int left) const {
    Vec<T> outer{};
    if (dy) outer = load<T>(dy + j, left);
    if (dh_n) outer += load<T>(dh_n + j, left);
    return outer;
  }

  // With H columns to a gate.
  LSTM_INLINE void store_dgates(int64_t H, int64_t j, const Cell<Vec<T>>& d, int left) const {
    store<T>(dgates + j, d.i, left);
    store<T>(dgates + H + j, d.f, left);
    store<T>(dgates + 2 * H + j, d.g, left);
    store<T>(dgates + 3 * H + j, d.o, left);
  }
};

}  // namespace lstm_cuda::LSTM_CPU_ISA
