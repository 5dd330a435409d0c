"""One layer on the fused op, with its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, reference
from .packed import PackedWeights


def fused_layer(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    cells: bool,
    packed: PackedWeights | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``reference.lstm_layer`` with the plain cell, on the fused op.

    Nothing is saved for backward unless a gradient can be asked for.

    Args:
        x ... reversed: as for ``reference.lstm_layer``.
        cells: the cell states are wanted.
        packed: where the layer's packed weights are kept, for calls without gradients.

    Returns:
        As ``reference.lstm_layer``; the last is meaningless unless ``cells``.

    Raises:
        NotImplementedError: under vmap or forward-mode differentiation.
    """
    D = len(weights)
    # w_ih of each recurrence, then w_hh of each, and so on: the order of the op's lists.
    flat = weights[0] if D == 1 else [w for column in zip(*weights, strict=True) for w in column]
    _refuse_transforms(x, flat, h0, c0)
    allow_tf32 = tf32_allowed(x.device.type, x.dtype)
    if torch.is_grad_enabled() and _requires_grad(x, flat, h0, c0):
        if c0 is not None and c0 is h0:
            c0 = c0.view_as(c0)  # torch.compile refuses the same tensor twice
        transformed = torch._C._are_functorch_transforms_active()
        function = _TransformedLayer if transformed else _Layer
        y, h_n, c_n, _, c = function.apply(
            x, h0, c0, lengths, reset, reversed, cells, D, allow_tf32, *flat
        )
        return y, h_n, c_n, c
    w_ih, w_hh, bias, w_hr = _by_kind(flat, D)
    kept = (None, 0) if packed is None else packed.find(x, w_hh, w_hr, allow_tf32)
    y, h_n, c_n, _, c = ops.layer_forward(
        x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, reversed, False, cells, allow_tf32, *kept
    )
    return y, h_n, c_n, c


def tf32_allowed(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch's settings let a recurrence round the operands of its products to TF32."""
    if device_type != "cuda" or dtype is not torch.float32:
        return False
    rnn = torch.backends.cudnn.rnn
    return bool(rnn.fp32_precision == "tf32")  # type: ignore[attr-defined]


def _requires_grad(
    x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None
) -> bool:
    if x.requires_grad or (h0 is not None and h0.requires_grad):
        return True
    if c0 is not None and c0.requires_grad:
        return True
    return any(w.requires_grad for w in weights)


def _refuse_transforms(
    x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None
) -> None:
    """Raise under the transforms that the op cannot follow.

    Without this, forward-mode differentiation would be answered with zeros.
    """
    if forward_ad._current_level >= 0:
        for t in (x, h0, c0, *weights):
            if t is not None and forward_ad.unpack_dual(t).tangent is not None:
                raise NotImplementedError(_unsupported("forward-mode differentiation"))
    if torch._C._are_functorch_transforms_active():
        for interpreter in torch._C._functorch.get_interpreter_stack() or ():
            if interpreter.key() == torch._C._functorch.TransformType.Vmap:
                raise NotImplementedError(_unsupported("torch.func.vmap"))
            if interpreter.key() == torch._C._functorch.TransformType.Jvp:
                raise NotImplementedError(_unsupported("forward-mode differentiation"))


def _unsupported(transform: str) -> str:
    return (
        f"the fused LSTM does not support {transform} (and what is built on it) yet; "
        'backend="torch" runs the differentiable reference, which does'
    )


def _by_kind(
    flat: Sequence[Tensor], D: int
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """w_ih, w_hh, biases and w_hr of D recurrences, from their flat list."""
    per = len(flat) // D  # 2 to 5: [w_ih, w_hh] + [b_ih, b_hh] + [w_hr]
    end = 4 * D if per >= 4 else 2 * D
    return flat[:D], flat[D : 2 * D], flat[2 * D : end], flat[end:]


class _TransformedLayer(torch.autograd.Function):
    """y, h_n, c_n, gates, c of a layer; gates, and c unless asked for, carry no gradient.

    In the form that torch.func asks for.
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
        *flat: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        w_ih, w_hh, bias, w_hr = _by_kind(flat, D)
        return ops.layer_forward(
            x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, reversed, True, cells, allow_tf32
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, h0, c0, lengths, reset, ctx.reversed, cells, ctx.D, ctx.allow_tf32, *flat = inputs
        y, _, _, gates, c = output
        ctx.set_materialize_grads(False)  # an absent gradient stays absent, down to the kernel
        if cells:
            ctx.mark_non_differentiable(gates)
        else:
            ctx.mark_non_differentiable(gates, c)
        ctx.save_for_backward(x, h0, c0, lengths, reset, y, gates, c, *flat)

    @staticmethod
    def backward(
        ctx: Any,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        _dgates: None,
        dc: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, h0, c0, lengths, reset, y, gates, c, *flat = ctx.saved_tensors
        needs_x, needs_h0, needs_c0, _, _, _, _, _, _, *needs_flat = ctx.needs_input_grad
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return _differentiable_backward(ctx, dy, dh_n, dc_n, dc)
        D = ctx.D
        w_ih, w_hh, bias, w_hr = _by_kind(flat, D)
        dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr = ops.layer_backward(
            dy, dh_n, dc_n, dc, x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, ctx.reversed,
            y, gates, c, needs_x, any(needs_flat), ctx.allow_tf32,
        )  # fmt: skip
        dflat: list[Tensor | None] = [None] * len(flat)
        if any(needs_flat):
            # Both biases have the same gradient, in storage of their own: optimizers write to it.
            parts = [dw_ih, dw_hh] + ([db, db.clone()] if bias else []) + ([dw_hr] if w_hr else [])
            dflat = [part[d] for part in parts for d in range(D)]
        return (
            dx if needs_x else None,
            dh0 if needs_h0 else None,
            dc0 if needs_c0 else None,
            None, None, None, None, None, None,
            *dflat,
        )  # fmt: skip


class _Layer(torch.autograd.Function):
    """The same outside torch.func, where ``apply`` need not bind arguments: that would cost more
    than a small layer.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        outputs = _TransformedLayer.forward(*inputs)
        _TransformedLayer.setup_context(ctx, inputs, outputs)
        return outputs

    backward = staticmethod(_TransformedLayer.backward)


def _differentiable_backward(
    ctx: Any,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions: those of the layer recomputed by the reference."""
    x, h0, c0, lengths, reset, _, _, _, *flat = ctx.saved_tensors
    inputs = [x, h0, c0, *flat]
    needs = ctx.needs_input_grad[:3] + ctx.needs_input_grad[9:]
    wanted = [k for k, need in enumerate(needs) if need]
    present = [k for k, grad in enumerate((dy, dh_n, dc_n, dc)) if grad is not None]

    def layer(*differentiated: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        for k, t in zip(wanted, differentiated, strict=True):
            given[k] = t
        x, h0, c0, *flat = given
        rows = [flat[d :: ctx.D] for d in range(ctx.D)]
        outputs = reference.lstm_layer(x, rows, h0, c0, lengths, reset, ctx.reversed)
        return tuple(outputs[k] for k in present)

    pull_back = torch.func.vjp(layer, *(inputs[k] for k in wanted))[1]
    grads: list[Tensor | None] = [None] * len(inputs)
    cotangents = (grad for grad in (dy, dh_n, dc_n, dc) if grad is not None)
    for k, grad in zip(wanted, pull_back(tuple(cotangents)), strict=True):
        grads[k] = grad
    return (*grads[:3], None, None, None, None, None, None, *grads[3:])
