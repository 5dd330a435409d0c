"""One layer of another cell than ``torch.nn.LSTM``'s on the fused ops, with its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference, variant_ops
from .differentiation import pulled_back
from .layer import by_kind, flat_gradients, is_transformed, requires_grad, tf32_allowed
from .masks import Masks
from .reference import Cell
from .shapes import compute_dtype


def variant_layer(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``reference.lstm_layer`` on the fused ops.

    Derivatives beyond the first, torch.func's and those of forward mode take the reference's way,
    with the same masks.

    Args:
        x ... layer_norm, masks: as for ``reference.lstm_layer``.
        cells: the cell states are wanted.

    Returns:
        As ``reference.lstm_layer``; the last is meaningless unless ``cells``.
    """
    D = len(weights)
    dtype = compute_dtype(x.dtype)
    allow_tf32 = tf32_allowed(x.device.type, x.dtype)
    if is_transformed(x, parameters(weights, peephole, layer_norm), h0, c0):
        return reference.lstm_layer(
            x, weights, h0, c0, lengths, reset, reversed, cell, peephole, layer_norm, masks=masks
        )
    w_p = None
    if peephole is not None:
        w_p = torch.stack([torch.stack(list(row)) for row in peephole]).to(dtype)
    norm = None
    if layer_norm is not None:
        norm = torch.stack([_norm(row[1:]) for row in layer_norm]).to(dtype)
        if lengths is not None:
            x = reference.without_padding(x, reference.valid_steps(x, lengths))
        # The norm of the input's part is no business of the recurrence.
        with reference.without_autocast(x.device.type):
            gates_x = [
                reference.input_gates(x, row, gains[0], dtype)
                for row, gains in zip(weights, layer_norm, strict=True)
            ]
            x = gates_x[0] if D == 1 else torch.cat(gates_x, -1)
        weights = [[row[1], row[-1]] if len(row) in (3, 5) else [row[1]] for row in weights]
    flat = [w for column in zip(*weights, strict=True) for w in column]
    recorded = torch.is_grad_enabled() and not torch.compiler._is_exporting_flag  # as layer.py
    if recorded and requires_grad(x, [*flat, *(t for t in (w_p, norm) if t is not None)], h0, c0):
        if c0 is not None and c0 is h0:
            c0 = c0.view_as(c0)  # torch.compile refuses the same tensor twice
        y, h_n, c_n, c = _Layer.apply(
            reversed, cells, D, allow_tf32, cell, masks.first_step, x, h0, c0, w_p, norm, lengths,
            reset, masks.h_scale, masks.seed, *flat,
        )  # fmt: skip
        return y, h_n, c_n, c
    y, h_n, c_n, _, c, _, _ = variant_ops.variant_forward(
        x, *_kinds(flat, D, norm), h0, c0, lengths, reset, reversed, False, cells, allow_tf32, cell,
        w_p, norm, masks,
    )  # fmt: skip
    return y, h_n, c_n, c


def parameters(*kinds: Sequence[Sequence[Tensor]] | None) -> list[Tensor]:
    """All tensors in rows of weights, of peepholes, of gains."""
    return [w for rows in kinds for row in rows or () for w in row]


def _norm(row: Sequence[Tensor]) -> Tensor:
    """[6, H] as the ops want it, from the gains of w_hh h and of c and, maybe, the shift of c."""
    hh, c = row[:2]
    shift = row[2] if len(row) == 3 else torch.zeros_like(c)
    return torch.cat([hh, c, shift]).view(6, -1)


def _kinds(
    flat: Sequence[Tensor], D: int, norm: Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """w_ih, w_hh, biases and w_hr; with norm there are only w_hh and w_hr."""
    return by_kind(flat, D) if norm is None else ([], flat[:D], [], flat[D:])


class _Layer(torch.autograd.Function):
    """y, h_n, c_n, c of a layer, in reverse mode."""

    @staticmethod
    def forward(
        ctx: Any,
        reversed: int,
        cells: bool,
        D: int,
        allow_tf32: bool,
        cell: Cell,
        first_step: int,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        peephole: Tensor | None,
        norm: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        h_scale: Tensor | None,
        seed: Tensor | None,
        *flat: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, h_n, c_n, gates, c, normed, rstd = variant_ops.variant_forward(
            x, *_kinds(flat, D, norm), h0, c0, lengths, reset, reversed, True, cells, allow_tf32,
            cell, peephole, norm, Masks(h_scale, seed, first_step),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.reversed, ctx.D, ctx.allow_tf32 = reversed, D, allow_tf32
        ctx.cell, ctx.first_step = cell, first_step
        ctx.save_for_backward(
            x, h0, c0, peephole, norm, lengths, reset, h_scale, seed, y, gates, c, normed, rstd,
            *flat,
        )  # fmt: skip
        if not cells:
            ctx.mark_non_differentiable(c)
        return y, h_n, c_n, c

    @staticmethod
    def backward(
        ctx: Any,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dc: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # torch.utils.checkpoint gives them once
        (
            x, h0, c0, peephole, norm, lengths, reset, h_scale, seed, y, gates, c, normed, rstd,
            *flat,
        ) = saved  # fmt: skip
        masks = Masks(h_scale, seed, ctx.first_step)
        w_ih, w_hh, _, w_hr = _kinds(flat, ctx.D, norm)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _by_reference(ctx, saved, (dy, dh_n, dc_n, dc), masks)
        needs = ctx.needs_input_grad[6:]  # of tensors
        needs_w = any(needs[3:5]) or any(needs[9:])
        dx, dh0, dc0, *dw, dpeephole, dnorm = variant_ops.variant_backward(
            dy, dh_n, dc_n, dc, x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, ctx.reversed, y, gates,
            c, needs[0], needs_w, ctx.allow_tf32, ctx.cell, peephole, norm, masks, normed, rstd,
        )  # fmt: skip
        if norm is None or not needs_w:
            dflat = flat_gradients(dw, ctx.D, len(flat), needs_w)
        else:
            dflat = [part[d] for part in (dw[1], dw[3])[: len(flat) // ctx.D] for d in range(ctx.D)]
        return (
            None, None, None, None, None, None,
            dx if needs[0] else None,
            dh0 if needs[1] else None,
            dc0 if needs[2] else None,
            dpeephole if needs[3] else None,
            dnorm if needs[4] else None,
            None, None, None, None,
            *dflat,
        )  # fmt: skip


def _by_reference(
    ctx: Any, saved: tuple[Any, ...], grads: tuple[Tensor | None, ...], masks: Masks
) -> tuple[Tensor | None, ...]:
    """The same gradients as functions that can be differentiated."""
    x, h0, c0, peephole, norm, lengths, reset, h_scale, seed, _, _, _, _, _, *flat = saved

    def layer(given: list[Any]) -> tuple[Tensor, ...]:
        x, h0, c0, peephole, norm, _, _, _, _, *flat = given
        w_ih, w_hh, bias, w_hr = _kinds(flat, ctx.D, norm)
        weights: Any = [
            [w_ih[d] if w_ih else None, w_hh[d], *bias[d :: ctx.D], *w_hr[d :: ctx.D]]
            for d in range(ctx.D)
        ]
        w_p = None if peephole is None else [w.unbind(0) for w in peephole]
        gains: Any = None
        if norm is not None:
            gains = [[None, w[:4].flatten(), w[4], w[5]] for w in norm]
        return reference.lstm_layer(
            x, weights, h0, c0, lengths, reset, ctx.reversed, ctx.cell, w_p, gains, masks=masks
        )

    inputs = (x, h0, c0, peephole, norm, lengths, reset, h_scale, seed, *flat)
    found = pulled_back(layer, inputs, ctx.needs_input_grad[6:], grads)
    return (None,) * 6 + tuple(found)
