"""The ops of a layer in segments of time, made of the ops for a whole layer.

Each direction runs its segments one after the other and hands its state on, c in the compute dtype;
backward goes through them the other way. They are ops, not plain functions, so that a compiled
graph has no loop to unroll and holds for any length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, piece_ops, reference, shapes
from .cuts import Cuts, Segment

_library = torch.library.Library("lstm_cuda", "FRAGMENT")
_library.define(
    "segments_forward(Tensor x, Tensor[] w_ih, Tensor[] w_hh, Tensor[] bias, Tensor[] w_hr, "
    "Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset, int reversed, int steps, bool cells, "
    "bool allow_tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "segments_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, "
    "Tensor[] w_ih, Tensor[] w_hh, Tensor[] bias, Tensor[] w_hr, Tensor? h0, Tensor? c0, "
    "Tensor? lengths, Tensor? reset, int reversed, Tensor[] kept, bool recompute, "
    "int steps, int truncate, bool need_dx, bool need_dw, bool allow_tf32) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class _Direction(Cuts):
    """One recurrence of a layer, segment by segment. Arguments are those of the ops."""

    def __init__(
        self,
        d: int,
        x: Tensor,
        w_ih: Sequence[Tensor],
        w_hh: Sequence[Tensor],
        bias: Sequence[Tensor],
        w_hr: Sequence[Tensor],
        lengths: Tensor | None,
        reset: Tensor | None,
        reversed: int,
        steps: int,
        allow_tf32: bool,
    ) -> None:
        super().__init__(x, lengths, reset, bool(reversed >> d & 1), steps)
        D, P = len(w_hh), w_hh[0].shape[1]
        self.allow_tf32 = allow_tf32
        self.w_ih, self.w_hh, self.bias, self.w_hr = (w[d::D] for w in (w_ih, w_hh, bias, w_hr))
        self.d, self.columns = d, slice(d * P, (d + 1) * P)  # of y
        self._sums: Tensor | None = None

    def first(self, h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, Tensor]:
        """h [1, B, P] and c [1, B, H], in the compute dtype, that the recurrence starts from."""
        B, (G, P) = self.x.shape[1], self.w_hh[0].shape
        own, compute = slice(self.d, self.d + 1), shapes.compute_dtype(self.x.dtype)
        return (
            self.x.new_zeros(1, B, P) if h0 is None else h0[own],
            self.x.new_zeros(1, B, G // 4, dtype=compute) if c0 is None else c0[own].to(compute),
        )

    def start(
        self, s: Segment, h0: Tensor | None, c0: Tensor | None, y: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same for a segment, from y and c of all steps."""
        h, state = self.first(h0, c0)
        if not 0 < s.entry < self.x.shape[0]:
            return h, state
        before = s.entry if self.backwards else s.entry - 1
        h_before, c_before = y[None, before, :, self.columns], c[None, before, :, self.d]
        if self.lengths is not None:  # a row that has no step there comes from h0 and c0
            there = (self.lengths > before)[:, None]
            h_before, c_before = (
                torch.where(there, h_before, h),
                torch.where(there, c_before, state),
            )
        closed = self.closed(s.entry)
        if closed is None:
            return h_before, c_before
        return reference._zero(h_before, closed), reference._zero(c_before, closed)

    def forward(
        self, s: Segment, h: Tensor, c: Tensor, save: bool, cells: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return ops.layer_forward(
            s.x, self.w_ih, self.w_hh, self.bias, self.w_hr, h, c, s.lengths, s.reset,
            int(self.backwards), save, cells, self.allow_tf32, None, 0, s.before, s.after,
        )  # fmt: skip

    def backward(
        self,
        s: Segment,
        dy: Tensor | None,
        dh_n: Tensor | None,
        across: Tensor | None,
        dc_n: Tensor | None,
        dc: Tensor | None,
        h: Tensor,
        c: Tensor,
        saved: tuple[Tensor, Tensor, Tensor],
        need_dx: bool,
        need_dw: bool,
    ) -> tuple[Tensor, ...]:
        """dx, what crosses into the steps before, dc0, parts of the weights' gradients.

        The second is dh0 or, from ``piece_ops.piece_backward`` where steps come before, its carry.

        Args:
            dy, dc: of the segment.
            dh_n: of the whole sequence, [1, B, P].
            across, dc_n: the second and the third result for the segment after it; None and dc_n
                [1, B, H], in the compute dtype, for the last.
            h, c: what the segment starts from.
            saved: its y, gates and c.
        """
        if not piece_ops.in_pieces(self.x):
            return ops.layer_backward(
                dy, dh_n if s.after == 0 else across, dc_n, dc, s.x, self.w_ih, self.w_hh,
                self.w_hr, h, c, s.lengths, s.reset, int(self.backwards), *saved, need_dx, need_dw,
                self.allow_tf32,
            )  # fmt: skip
        if self._sums is None:
            self._sums = piece_ops.piece_sums(self.x, self.w_ih, self.w_hh, self.w_hr)
        dx, dh0, dc0, *dw, carry = piece_ops.piece_backward(
            dy, self.ending(s, dh_n), dc_n, dc, s.x, self.w_ih, self.w_hh, self.w_hr, h, c,
            s.lengths, s.reset, int(self.backwards), *saved, need_dx, need_dw, s.before, s.after,
            across, self._sums,
        )  # fmt: skip
        return dx, dh0 if s.before == 0 else carry, dc0, *dw

    def ending(self, s: Segment, final: Tensor | None) -> Tensor | None:
        """``final`` [1, B, P] of rows whose last step is here; with the first, of empty ones."""
        if final is None:
            return None
        if self.lengths is None:
            return final if s.after == 0 else None
        last = torch.zeros_like(self.lengths) if self.backwards else self.lengths - 1
        here = (self.lengths > 0) & (s.start <= last) & (last < s.end)
        if s.before == 0:
            here |= self.lengths == 0
        return reference._zero(final, ~here)


def _empty_forward(
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    bias: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    steps: int,
    cells: bool,
    allow_tf32: bool,
) -> tuple[Tensor, ...]:
    """The results of ``_forward``, not filled in."""
    y, h_n, c_n, _, c = shapes.layer_forward_fake(
        x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, reversed, False, cells, allow_tf32
    )
    T, B, D, H, P = shapes.sizes(x, w_hh)
    N = (T + steps - 1) // steps
    return y, h_n, c_n, c, x.new_empty(N, D, B, P), c.new_empty(N, D, B, H)


def _forward(
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    bias: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    steps: int,
    cells: bool,
    allow_tf32: bool,
) -> tuple[Tensor, ...]:
    """``ops.layer_forward`` segment by segment.

    Args:
        x ... reversed: as for ``ops.layer_forward``.
        steps: of a segment.
        cells, allow_tf32: as for ``ops.layer_forward``.

    Returns:
        As ``ops.layer_forward`` but for the gates, then h [N, D, B, P] in x's dtype and c [N, D, B,
        H] in the compute dtype: what each direction starts each of the N segments from.
    """
    results = _empty_forward(
        x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, reversed, steps, cells, allow_tf32
    )
    y, h_n, c_n, c, h_starts, c_starts = results
    T, B, D, *_ = shapes.sizes(x, w_hh)
    if lengths is not None and lengths.device.type == "cpu" and B > 0:
        low, high = (int(n) for n in lengths.aminmax())
        if low < 0 or high > T:  # the op, which would say so, sees none but clamped ones
            raise ValueError(f"lengths must be in 0..{T}; got {low if low < 0 else high}")
    for d in range(D):
        run = _Direction(d, x, w_ih, w_hh, bias, w_hr, lengths, reset, reversed, steps, allow_tf32)
        h, state = run.first(h0, c0)
        for s in run.segments():
            closed = run.closed(s.entry)
            if closed is not None:
                h, state = reference._zero(h, closed), reference._zero(state, closed)
            h_starts[s.n, d], c_starts[s.n, d] = h[0], state[0]
            y_s, h, state, _, c_s = run.forward(s, h, state, False, cells)
            y[s.start : s.end, :, run.columns] = y_s
            if cells:
                c[s.start : s.end, :, d] = c_s[:, :, 0]
        h_n[d], c_n[d] = h[0], state[0]
    return results


def _empty_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    bias: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    kept: Sequence[Tensor],
    recompute: bool,
    steps: int,
    truncate: int,
    need_dx: bool,
    need_dw: bool,
    allow_tf32: bool,
) -> tuple[Tensor, ...]:
    """The results of ``_backward``, not filled in."""
    dx, _, _, *dw = shapes.layer_backward_fake(
        dy, dh_n, dc_n, dc, x, w_ih, w_hh, w_hr, None, None, lengths, reset, reversed, x, x, x,
        need_dx, need_dw, allow_tf32,
    )  # fmt: skip
    _, B, D, H, P = shapes.sizes(x, w_hh)
    dc0 = x.new_empty(D, B, H, dtype=shapes.compute_dtype(x.dtype))
    return dx, x.new_empty(D, B, P), dc0, *dw


def _backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    bias: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    kept: Sequence[Tensor],
    recompute: bool,
    steps: int,
    truncate: int,
    need_dx: bool,
    need_dw: bool,
    allow_tf32: bool,
) -> tuple[Tensor, ...]:
    """The gradients of a layer, from the last segment of each direction to its first.

    Weight gradients are summed over the segments in that order, in the compute dtype.

    Args:
        dy, dh_n, dc_n, dc: gradients of y, h_n, c_n and c; None where there is none.
        x ... reversed: as given to ``_forward`` or ``ops.layer_forward``.
        kept: the last two results of the former, for ``recompute``; or y, gates and c of the
            latter.
        recompute: run the segments again, for their gates.
        steps: of a segment.
        truncate: steps after which no gradient crosses; 0: it crosses everywhere.
        need_dx, need_dw, allow_tf32: as for ``ops.layer_backward``.

    Returns:
        As ``ops.layer_backward`` with h0 and c0; dc0 in the compute dtype, the others in x's.
    """
    results = _empty_backward(
        dy, dh_n, dc_n, dc, x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, reversed, kept,
        recompute, steps, truncate, need_dx, need_dw, allow_tf32,
    )  # fmt: skip
    dx, dh0, dc0, *dw = results
    D, compute = len(w_hh), shapes.compute_dtype(x.dtype)
    dx_sum = torch.empty_like(dx, dtype=compute) if D > 1 else dx
    dw_sums = [torch.zeros_like(t, dtype=compute) for t in dw]
    for d in range(D):
        run = _Direction(d, x, w_ih, w_hh, bias, w_hr, lengths, reset, reversed, steps, allow_tf32)
        last, across = None if dh_n is None else dh_n[d : d + 1], None
        dstate = None if dc_n is None else dc_n[d : d + 1].to(compute)
        for s in run.segments()[::-1]:
            here = slice(s.start, s.end)
            if recompute:
                h, state = (t[s.n, d : d + 1] for t in kept)
                y_s, _, _, gates_s, c_s = run.forward(s, h, state, True, True)
            else:
                y, gates, c = kept
                h, state = run.start(s, h0, c0, y, c)
                y_s = y[here, :, run.columns]
                gates_s, c_s = gates[here, :, d : d + 1], c[here, :, d : d + 1]
            dx_s, across, dstate, *dw_s = run.backward(
                s, None if dy is None else dy[here, :, run.columns], last, across, dstate,
                None if dc is None else dc[here, :, d : d + 1], h, state, (y_s, gates_s, c_s),
                need_dx, need_dw,
            )  # fmt: skip
            if need_dx:
                dx_sum[here] = dx_s if d == 0 else dx_sum[here] + dx_s
            for total, part in zip(dw_sums, dw_s, strict=True):
                if part.numel() > 0:
                    total[d] += part[0]
            closed = run.closed(s.entry, truncate)
            if closed is not None:
                across, dstate = reference._zero(across, closed), reference._zero(dstate, closed)
        if across is None:  # without a step
            across = last
        dh0[d] = 0 if across is None else across[0]
        dc0[d] = 0 if dstate is None else dstate[0]
    if D > 1:
        dx.copy_(dx_sum)
    for result, total in zip(dw, dw_sums, strict=True):
        result.copy_(total)
    return results


for _name, _run, _empty in (
    ("segments_forward", _forward, _empty_forward),
    ("segments_backward", _backward, _empty_backward),
):
    _library.impl(_name, _run, "CPU")
    _library.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"lstm_cuda::{_name}", _empty, lib=_library)

forward = torch.ops.lstm_cuda.segments_forward.default
backward = torch.ops.lstm_cuda.segments_backward.default
