"""One layer in segments of time: gates recomputed in backward, backpropagation cut short.

The sequence is cut before every k-th step of time, for either direction. Two modes share this:

* ``checkpoint``: of a segment only the state it starts from is kept. Backward runs it again, by the
  same kernels and so to the same bits, right before it needs its gates.
* ``truncate``: the state crosses the boundaries, its gradient does not. Without ``checkpoint``,
  forward is that of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference, segment_ops
from .differentiation import pulled_back
from .layer import (
    _TransformedLayer,
    by_kind,
    flat_gradients,
    fused_layer,
    is_transformed,
    requires_grad,
    tf32_allowed,
)
from .packed import PackedWeights
from .products import forward_mode
from .second_order import Run


def check_segments(checkpoint: int | None, truncate: int | None) -> None:
    """Raise TypeError or ValueError unless these are numbers of steps that fit each other."""
    for name, steps in (("checkpoint", checkpoint), ("truncate", truncate)):
        if steps is None:
            continue
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(
                f"{name} must be a number of steps, an int, or None; got {type(steps).__name__}"
            )
        if steps < 1:
            raise ValueError(f"{name} must be at least 1 step; got {steps}")
    if checkpoint is not None and truncate is not None and truncate % checkpoint != 0:
        raise ValueError(
            f"truncate must be a multiple of checkpoint, {checkpoint}, so that both cut at the "
            f"same steps; got {truncate}"
        )


def segmented_layer(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    cells: bool,
    checkpoint: int | None,
    truncate: int | None,
    packed: PackedWeights | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fused_layer`` in segments; without gradients, ``fused_layer`` itself.

    Args:
        x ... cells: as for ``fused_layer``.
        checkpoint: steps after which a state is kept; None: gates are kept instead.
        truncate: steps after which no gradient crosses; None: it crosses everywhere. At least one
            of both is given, and ``check_segments`` has passed them.
        packed: as for ``fused_layer``.

    Returns:
        As ``fused_layer``.

    Raises:
        NotImplementedError: under vmap and, with ``truncate``, forward-mode differentiation.
    """
    D = len(weights)
    flat = [w for column in zip(*weights, strict=True) for w in column]
    transformed = is_transformed(x, flat, h0, c0)
    recorded = torch.is_grad_enabled()
    if not transformed and not (recorded and requires_grad(x, flat, h0, c0)):
        return fused_layer(x, weights, h0, c0, lengths, reset, reversed, cells, packed)
    if c0 is not None and c0 is h0:
        c0 = c0.view_as(c0)  # torch.compile refuses the same tensor twice
    function = _TransformedSegments if transformed else _Segments
    y, h_n, c_n, *others = function.apply(
        x, h0, c0, lengths, reset, reversed, cells, D, tf32_allowed(x.device.type, x.dtype),
        recorded, checkpoint, truncate, *flat,
    )  # fmt: skip
    return y, h_n, c_n, others[1] if checkpoint is None else others[0]


class _TransformedSegments(torch.autograd.Function):
    """What ``segment_ops.forward`` or, without ``checkpoint``, ``ops.layer_forward`` returns.

    Only y, h_n, c_n and, if asked for, c carry gradients. In the form that torch.func asks for.
    """

    @staticmethod
    def forward(
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        reversed: int,
        cells: bool,
        D: int,
        allow_tf32: bool,
        recorded: bool,
        checkpoint: int | None,
        truncate: int | None,
        *flat: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (x, *by_kind(flat, D), h0, c0, lengths, reset, reversed)
        if checkpoint is None:
            return ops.layer_forward(*inputs, True, cells, allow_tf32)
        return segment_ops.forward(*inputs, checkpoint, cells, allow_tf32)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_forward(*_keep(ctx, inputs, output))

    @staticmethod
    def backward(
        ctx: Any,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        *others: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, h0, c0, lengths, reset, *rest = ctx.saved_tensors
        recompute = ctx.checkpoint is not None
        kept, flat = (rest[:2], rest[2:]) if recompute else (rest[:3], rest[3:])
        # torch.compile makes zeros where there is no gradient, of the shape of nothing.
        dc = others[0 if recompute else 1] if ctx.cells else None
        needs_x, needs_h0, needs_c0, *_ = ctx.needs_input_grad
        needs_flat = ctx.needs_input_grad[-len(flat) :]
        no_grads = (None,) * 9
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            needs = (needs_x, needs_h0, needs_c0, *needs_flat)
            grads = _differentiable_backward(ctx, (x, h0, c0, *flat), needs, (dy, dh_n, dc_n, dc))
            return (*grads[:3], *no_grads, *grads[3:])
        w_ih, w_hh, bias, w_hr = by_kind(flat, ctx.D)
        dx, dh0, dc0, *dw = segment_ops.backward(
            dy, dh_n, dc_n, dc, x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, ctx.reversed,
            kept, recompute, ctx.checkpoint or ctx.truncate, ctx.truncate or 0, needs_x,
            any(needs_flat), ctx.allow_tf32,
        )  # fmt: skip
        return (
            dx if needs_x else None,
            dh0 if needs_h0 else None,
            dc0.to(c0.dtype) if needs_c0 else None,
            *no_grads,
            *flat_gradients(dw, ctx.D, len(flat), any(needs_flat)),
        )

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> Any:
        if ctx.truncate is not None:
            raise NotImplementedError(_unsupported("truncate", "forward-mode differentiation"))
        dx, dh0, dc0, _, _, _, _, _, _, _, _, _, *dflat = changes
        with forward_mode(ctx) as (x, h0, c0, lengths, reset, _, _, *flat):
            y, _, _, gates, c = _TransformedLayer.apply(
                x, h0, c0, lengths, reset, ctx.reversed, True, ctx.D, ctx.allow_tf32, ctx.recorded,
                True, *flat,
            )  # fmt: skip
            w_ih, w_hh, _, w_hr = by_kind(flat, ctx.D)
            run = Run(x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, ctx.reversed, y, gates, c)
            dy, dh_n, dc_n, _, dc = run.tangents(dx, dh0, dc0, *by_kind(dflat, ctx.D))
        return dy, dh_n, dc_n, dc if ctx.cells else None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise NotImplementedError(_unsupported("checkpoint and truncate", "torch.func.vmap"))


def _unsupported(modes: str, transform: str) -> str:
    return (
        f"{modes} cannot go under {transform}; call without, or take "
        'backend="torch", whose truncate can'
    )


class _Segments(torch.autograd.Function):
    """The same outside torch.func."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = _TransformedSegments.forward(*inputs)
        _keep(ctx, inputs, outputs)
        return outputs

    backward = staticmethod(_TransformedSegments.backward)


def _keep(
    ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Keep in ctx what derivatives need; the tensors among it are returned."""
    x, h0, c0, lengths, reset, ctx.reversed, ctx.cells, ctx.D, ctx.allow_tf32, *rest = inputs
    ctx.recorded, ctx.checkpoint, ctx.truncate, *flat = rest
    ctx.set_materialize_grads(False)
    if ctx.checkpoint is None:
        y, _, _, gates, c = outputs
        kept, hidden = [y, gates, c], [gates]
    else:
        _, _, _, c, *starts = outputs
        kept, hidden = starts, starts
    ctx.mark_non_differentiable(*hidden, *([] if ctx.cells else [c]))
    saved = x, h0, c0, lengths, reset, *kept, *flat
    ctx.save_for_backward(*saved)
    return saved


def _differentiable_backward(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """The gradients as differentiable functions: those of the whole layer, run again.

    By the reference where gradients end at boundaries, which the fused layer has none of.
    """
    lengths, reset = ctx.saved_tensors[3:5]

    def layer(given: list[Any]) -> tuple[Tensor, ...]:
        x, h0, c0, *flat = given
        rows = [flat[d :: ctx.D] for d in range(ctx.D)]
        arguments = x, rows, h0, c0, lengths, reset, ctx.reversed
        if ctx.truncate is None:
            return fused_layer(*arguments, True)
        return reference.lstm_layer(*arguments, truncate=ctx.truncate)

    return pulled_back(layer, inputs, needs, grads)
