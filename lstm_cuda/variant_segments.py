"""One layer of another cell in segments of time, as segments.py has it for torch.nn.LSTM's.

Each segment of each direction is a call of its own, which for ``checkpoint``
``torch.utils.checkpoint`` runs again in backward, with the same masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as run_again

from . import ops, reference
from .layer import is_transformed, requires_grad
from .masks import Masks, draw
from .reference import Cell
from .variant import masked_layer

_T = TypeVar("_T")


def segmented_variant_layer(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    cell: Cell,
    peephole: Sequence[Sequence[Tensor]] | None,
    layer_norm: Sequence[Sequence[Tensor]] | None,
    training: bool,
    cells: bool,
    checkpoint: int | None,
    truncate: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``variant_layer`` in segments; without gradients, in one.

    Args:
        x ... cells: as for ``variant_layer``.
        checkpoint, truncate: as for ``segments.segmented_layer``.

    Returns:
        As ``variant_layer``.
    """
    masks = Masks()
    if training:
        weights, masks = draw(cell, weights, x.shape[1], ops.compute_dtype(x.dtype))
    given = (x, weights, h0, c0, lengths, reset, reversed, cell, peephole, layer_norm)
    parameters = [w for rows in (weights, peephole, layer_norm) for row in rows or () for w in row]
    if is_transformed(x, tuple(parameters), h0, c0):
        return reference.lstm_layer(*given, truncate=truncate, masks=masks)
    recorded = torch.is_grad_enabled() and not torch.compiler._is_exporting_flag  # as layer.py
    if x.shape[0] == 0 or not (recorded and requires_grad(x, parameters, h0, c0)):
        return masked_layer(*given, masks, cells)

    D = len(weights)
    parts: dict[int, tuple[Tensor, ...]] = {}
    for backwards in (False, True):
        members = [d for d in range(D) if bool(reversed >> d & 1) == backwards]
        if not members:
            continue

        def of(rows: Sequence[_T] | None, members: list[int] = members) -> list[_T] | None:
            return None if rows is None else [rows[d] for d in members]

        h, c = (t if t is None or len(members) == D else t[members] for t in (h0, c0))
        scale = masks.h_scale
        own = Masks(
            None if scale is None else scale[members],
            None if masks.seed is None else masks.seed[members],
        )
        direction = _Direction(
            x, of(weights) or [], lengths, reset, backwards, cell, of(peephole), of(layer_norm),
            own, cells,
        )  # fmt: skip
        y, h_n, c_n, all_c = direction.run(h, c, checkpoint, truncate)
        for k, d in enumerate(members):
            parts[d] = y[:, :, k], h_n[k], c_n[k], all_c[:, :, k] if cells else all_c
    ys, h_ns, c_ns, cs = zip(*(parts[d] for d in range(D)), strict=True)
    return (
        torch.stack(ys, 2).flatten(2),
        torch.stack(h_ns),
        torch.stack(c_ns),
        torch.stack(cs, 2) if cells else cs[0],
    )


class _Direction:
    """The recurrences of a layer that run in one direction, segment by segment.

    Arguments are those of ``masked_layer``.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Sequence[Tensor]],
        lengths: Tensor | None,
        reset: Tensor | None,
        backwards: bool,
        cell: Cell,
        peephole: Sequence[Sequence[Tensor]] | None,
        layer_norm: Sequence[Sequence[Tensor]] | None,
        masks: Masks,
        cells: bool,
    ) -> None:
        self.x, self.weights, self.lengths, self.reset = x, weights, lengths, reset
        self.backwards, self.masks, self.cells = backwards, masks, cells
        self.cell, self.peephole, self.layer_norm = cell, peephole, layer_norm

    def run(
        self, h0: Tensor | None, c0: Tensor | None, checkpoint: int | None, truncate: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y [T, B, D, P], h_n, c_n and c of these recurrences."""
        (T, B, _), (G, P), D = self.x.shape, self.weights[0][1].shape, len(self.weights)
        w_hh, compute = self.weights[0][1], ops.compute_dtype(self.x.dtype)
        steps = checkpoint or truncate or T
        # Between calls c is as wide as within one.
        h = w_hh.new_zeros(D, B, P) if h0 is None else h0
        c = w_hh.new_zeros(D, B, G // 4, dtype=compute) if c0 is None else c0.to(compute)
        starts = list(range(0, T, steps))
        ys, cs = [], []
        for start in starts[::-1] if self.backwards else starts:
            end = min(start + steps, T)
            h, c = self._across(end if self.backwards else start, h, c, truncate)
            if checkpoint is None:
                y, h, c, all_c = self._segment(start, end, h, c)
            else:
                y, h, c, all_c = run_again(
                    self._segment, start, end, h, c, use_reentrant=False, preserve_rng_state=False
                )
            ys.append(y.unflatten(2, (D, P)))
            cs.append(all_c)
        order = -1 if self.backwards else 1
        return (
            torch.cat(ys[::order]),
            h,
            c.to(w_hh.dtype if c0 is None else c0.dtype),
            torch.cat(cs[::order]) if self.cells else cs[0],
        )

    def _segment(
        self, start: int, end: int, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lengths = None if self.lengths is None else (self.lengths - start).clamp(0, end - start)
        return masked_layer(
            self.x[start:end], self.weights, h, c, lengths,
            None if self.reset is None else self.reset[start:end],
            (1 << len(self.weights)) - 1 if self.backwards else 0,
            self.cell, self.peephole, self.layer_norm,
            replace(self.masks, first_step=start), self.cells,
        )  # fmt: skip

    def _across(
        self, entry: int, h: Tensor, c: Tensor, truncate: int | None
    ) -> tuple[Tensor, Tensor]:
        """The state as it crosses the boundary before step ``entry``.

        A row that ends before it has no state to hold back there: h0 and h_n pass.
        """
        if not 0 < entry < self.x.shape[0]:
            return h, c
        if truncate is not None and entry % truncate == 0:
            if self.lengths is None:
                h, c = h.detach(), c.detach()
            else:
                crosses = (self.lengths > entry)[:, None]
                h, c = (torch.where(crosses, t.detach(), t) for t in (h, c))
        # Forwards, the segment sees it as the reset of its first step.
        if self.backwards and self.reset is not None:
            closed = self.reset[entry]
            closed = closed if self.lengths is None else closed & (self.lengths > entry)
            h, c = reference._zero(h, closed), reference._zero(c, closed)
        return h, c
