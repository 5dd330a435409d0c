// What other cells than torch.nn.LSTM's have besides cell.h, one element at a time: peepholes, zoneout,
// the scale of recurrent dropout, and values normalised.
#pragma once

#include "../random.h"
#include "element.cuh"

namespace lstm_cuda {

struct UnitOfStep {
  int64_t t, d, b, unit;
};

template <class Compute>
LSTM_DEVICE Peephole<Compute> peephole_of(const Variant& v, int64_t H, const UnitOfStep& at) {
  if (!v.peephole) return {0, 0, 0};
  const Compute* const w = static_cast<const Compute*>(v.peephole) + at.d * 3 * H + at.unit;
  return {w[0], w[H], w[2 * H]};
}

// What makes values of a row normal: to mean 0 and variance 1.
template <class Compute>
struct Normed {
  Compute mean, rstd;

  LSTM_DEVICE Normed(Compute mean_of_row, Compute variance)
      : mean(mean_of_row), rstd(1 / square_root(variance + Compute(kNormEpsilon))) {}

  LSTM_DEVICE Compute operator()(Compute v) const { return (v - mean) * rstd; }

  static LSTM_DEVICE Normed of_saved(Compute mean_of_row, Compute rstd_of_row) {
    Normed normed;
    normed.mean = mean_of_row;
    normed.rstd = rstd_of_row;
    return normed;
  }

 private:
  Normed() = default;
  static LSTM_DEVICE float square_root(float v) { return ::sqrtf(v); }
  static LSTM_DEVICE double square_root(double v) { return ::sqrt(v); }
};

// How much of the state zoneout keeps.
template <class Compute>
LSTM_DEVICE Compute kept_part(const Variant& v, Choice choice, const UnitOfStep& at) {
  const double probability = choice == Choice::h ? v.cell.zoneout_h : v.cell.zoneout_c;
  if (!v.seed) return Compute(probability);
  return random_keep(v.seed[at.d], choice, v.first_step + at.t, at.b, at.unit, probability)
             ? Compute(1)
             : Compute(0);
}

// What zoneout makes of the state before a step and after it.
template <class Compute>
LSTM_DEVICE Compute zoned_out(const Variant& v, Choice choice, const UnitOfStep& at, Compute before,
                              Compute after) {
  if ((choice == Choice::h ? v.cell.zoneout_h : v.cell.zoneout_c) <= 0) return after;
  const Compute keep = kept_part<Compute>(v, choice, at);
  return keep * before + (1 - keep) * after;
}

// h as the next product reads it.
template <Arithmetic arithmetic, class Element>
LSTM_DEVICE Element as_read(const Variant& v, int64_t state_at, Element h) {
  using Compute = typename Types<arithmetic>::Compute;
  if (v.h_scale)
    h = to_element<Element>(to_compute(h) * static_cast<const Compute*>(v.h_scale)[state_at]);
  return operand<arithmetic>(h);
}

// h as a result, from h before zoneout; `read` is what the next product reads. h_state [D, B, P] has
// h of the step before, where zoneout wants it, and gets this one; else it is null.
template <Arithmetic arithmetic, class Compute, class Element>
LSTM_DEVICE Element output_of(const Variant& v, void* h_state, const UnitOfStep& at,
                              int64_t state_at, bool fresh, Compute h, Element& read) {
  Compute* const state = static_cast<Compute*>(h_state);
  if (state) h = zoned_out(v, Choice::h, at, fresh ? Compute(0) : state[state_at], h);
  const Element rounded = to_element<Element>(h);
  if (state) state[state_at] = to_compute(rounded);
  read = as_read<arithmetic>(v, state_at, rounded);
  return rounded;
}

// The gradient of h that comes from the step after: `product` through w_hh, and what zoneout left.
template <class Compute>
LSTM_DEVICE Compute recurrent_gradient(const Variant& v, const void* dh_state, int64_t state_at,
                                       Compute product) {
  if (v.h_scale) product *= static_cast<const Compute*>(v.h_scale)[state_at];
  if (dh_state) product += static_cast<const Compute*>(dh_state)[state_at];
  return product;
}

// The gradient of h before zoneout; dh_state, if there is zoneout of h, gets what is for the h before.
template <class Compute>
LSTM_DEVICE Compute output_gradient(const Variant& v, void* dh_state, const UnitOfStep& at,
                                    int64_t state_at, bool carried, Compute product,
                                    Compute outer) {
  Compute dh = outer;
  if (carried) dh += recurrent_gradient(v, dh_state, state_at, product);
  if (!dh_state) return dh;
  const Compute keep = kept_part<Compute>(v, Choice::h, at);
  static_cast<Compute*>(dh_state)[state_at] = keep * dh;
  return (1 - keep) * dh;
}

}  // namespace lstm_cuda
