// The weights of the backward pass: packed for products along the 4H gates and, for the projection,
// along P.
#pragma once

namespace lstm_cuda::LSTM_CPU_ISA {

// Packed weights of one direction, shared by all workers.
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

}  // namespace lstm_cuda::LSTM_CPU_ISA
