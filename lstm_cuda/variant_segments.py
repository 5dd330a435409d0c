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

from . import reference
from .cuts import Cuts, Segment
from .layer import is_transformed, requires_grad
from .masks import Masks
from .reference import Cell
from .shapes import compute_dtype
from .variant import parameters, variant_layer

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
    masks: Masks,
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
    given = (x, weights, h0, c0, lengths, reset, reversed, cell, peephole, layer_norm)
    tensors = parameters(weights, peephole, layer_norm)
    if is_transformed(x, tensors, h0, c0):
        return reference.lstm_layer(*given, truncate=truncate, masks=masks)
    recorded = torch.is_grad_enabled() and not torch.compiler._is_exporting_flag  # as layer.py
    if x.shape[0] == 0 or not (recorded and requires_grad(x, tensors, h0, c0)):
        return variant_layer(*given, masks, cells)

    D = len(weights)
    parts: dict[int, tuple[Tensor, ...]] = {}
    for backwards in (False, True):
        members = [d for d in range(D) if bool(reversed >> d & 1) == backwards]
        if not members:
            continue

        def of(rows: Sequence[_T] | None, members: list[int] = members) -> list[_T] | None:
            return None if rows is None else [rows[d] for d in members]

        h, c = (t if t is None or len(members) == D else t[members] for t in (h0, c0))
        h_scale, seed = (None if t is None else t[members] for t in (masks.h_scale, masks.seed))
        direction = _Direction(
            x, of(weights) or [], lengths, reset, backwards, checkpoint or truncate or x.shape[0],
            cell, of(peephole), of(layer_norm), Masks(h_scale, seed), cells,
        )  # fmt: skip
        y, h_n, c_n, all_c = direction.run(h, c, checkpoint is not None, truncate or 0)
        for k, d in enumerate(members):
            parts[d] = y[:, :, k], h_n[k], c_n[k], all_c[:, :, k] if cells else all_c
    ys, h_ns, c_ns, cs = zip(*(parts[d] for d in range(D)), strict=True)
    return (
        torch.stack(ys, 2).flatten(2),
        torch.stack(h_ns),
        torch.stack(c_ns),
        torch.stack(cs, 2) if cells else cs[0],
    )


class _Direction(Cuts):
    """The recurrences of a layer that run in one direction, segment by segment.

    Arguments are those of ``Cuts`` and of ``variant_layer``.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Sequence[Tensor]],
        lengths: Tensor | None,
        reset: Tensor | None,
        backwards: bool,
        steps: int,
        cell: Cell,
        peephole: Sequence[Sequence[Tensor]] | None,
        layer_norm: Sequence[Sequence[Tensor]] | None,
        masks: Masks,
        cells: bool,
    ) -> None:
        super().__init__(x, lengths, reset, backwards, steps)
        self.weights, self.masks, self.cells = weights, masks, cells
        self.cell, self.peephole, self.layer_norm = cell, peephole, layer_norm

    def run(
        self, h0: Tensor | None, c0: Tensor | None, checkpoint: bool, truncate: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y [T, B, D, P], h_n, c_n and c of these recurrences."""
        B, (G, P), D = self.x.shape[1], self.weights[0][1].shape, len(self.weights)
        w_hh, compute = self.weights[0][1], compute_dtype(self.x.dtype)
        # Between calls c is as wide as within one.
        h = w_hh.new_zeros(D, B, P) if h0 is None else h0
        c = w_hh.new_zeros(D, B, G // 4, dtype=compute) if c0 is None else c0.to(compute)
        ys, cs = [], []
        for s in self.segments():
            h, c = self._across(s.entry, h, c, truncate)
            if checkpoint:
                y, h, c, all_c = run_again(
                    self._segment, s, h, c, use_reentrant=False, preserve_rng_state=False
                )
            else:
                y, h, c, all_c = self._segment(s, h, c)
            ys.append(y.unflatten(2, (D, P)))
            cs.append(all_c)
        order = -1 if self.backwards else 1
        return (
            torch.cat(ys[::order]),
            h,
            c.to(w_hh.dtype if c0 is None else c0.dtype),
            torch.cat(cs[::order]) if self.cells else cs[0],
        )

    def _segment(self, s: Segment, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return variant_layer(
            s.x, self.weights, h, c, s.lengths, s.reset,
            (1 << len(self.weights)) - 1 if self.backwards else 0,
            self.cell, self.peephole, self.layer_norm,
            replace(self.masks, first_step=s.start), self.cells,
        )  # fmt: skip

    def _across(self, entry: int, h: Tensor, c: Tensor, truncate: int) -> tuple[Tensor, Tensor]:
        """The state as it crosses the boundary before step ``entry``."""
        closed, held = self.closed(entry), self.closed(entry, truncate)
        if closed is not None:
            h, c = reference._zero(h, closed), reference._zero(c, closed)
        if truncate > 0 and held is not None:
            h, c = (torch.where(held[:, None], t.detach(), t) for t in (h, c))
        return h, c
