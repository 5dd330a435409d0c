// What the steps of one chunk leave in scratch memory for the products of gradients.h, of one
// direction and part of the batch: a slot for each step and batch row.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

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

}  // namespace lstm_cuda::LSTM_CPU_ISA
