// What other cells than torch.nn.LSTM's do to h on its way from step to step, one element at a time:
// zoneout, and the scale of recurrent dropout.
#pragma once

#include "../random.h"
#include "element.cuh"

namespace lstm_cuda {

struct UnitOfStep {
  int64_t t, d, b, unit;
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

// h as a result, from h before zoneout; `read` is what the next product reads. h_state [D, B, P] has
// h of the step before, where zoneout wants it, and gets this one; else it is null.
template <Arithmetic arithmetic, class Compute, class Element>
LSTM_DEVICE Element output_of(const Variant& v, void* h_state, const UnitOfStep& at,
                              int64_t state_at, bool fresh, Compute h, Element& read) {
  Compute* const state = static_cast<Compute*>(h_state);
  if (state) {
    const Compute keep = kept_part<Compute>(v, Choice::h, at);
    h = keep * (fresh ? Compute(0) : state[state_at]) + (1 - keep) * h;
  }
  const Element rounded = to_element<Element>(h);
  if (state) state[state_at] = to_compute(rounded);
  read = rounded;
  if (v.h_scale)
    read =
        to_element<Element>(to_compute(rounded) * static_cast<const Compute*>(v.h_scale)[state_at]);
  read = operand<arithmetic>(read);
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
