"""One layer on the fused op, with its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .batching import LENGTHS, RESET, STATES, STEPS, Arguments, Dims, batched
from .gradients import gradients
from .packed import PackedWeights
from .products import forward_mode
from .second_order import Run

W = TypeVar("W", Tensor, Tensor | None, int)


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

    Nothing is saved for backward unless a gradient can be asked for, and nothing while exporting.

    Args:
        x ... reversed: as for ``reference.lstm_layer``.
        cells: the cell states are wanted.
        packed: where the layer's packed weights are kept, for calls without gradients.

    Returns:
        As ``reference.lstm_layer``; the last is meaningless unless ``cells``.

    """
    D = len(weights)
    # w_ih of each recurrence, then w_hh of each, and so on: the order of the op's lists.
    flat = weights[0] if D == 1 else [w for column in zip(*weights, strict=True) for w in column]
    # What is exported is for inference. is_exporting() is True in all that torch 2.11 traces.
    recorded = torch.is_grad_enabled() and not torch.compiler._is_exporting_flag
    y, h_n, c_n, gates, c = _run(
        x, h0, c0, lengths, reset, reversed, D, *flat,
        cells=cells, recorded=recorded, save=_differentiations() > 0, packed=packed,
    )  # fmt: skip
    return y, h_n, c_n, c if cells or gates.dim() == 1 else c.detach()


def _run(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    D: int,
    *flat: Tensor,
    cells: bool,
    recorded: bool,
    save: bool,
    packed: PackedWeights | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n, gates and c; the last two are [0] where nothing can ask for them.

    ``save``: something above asks for them, whatever can be seen here.
    """
    allow_tf32 = tf32_allowed(x.device.type, x.dtype)
    transformed = is_transformed(x, flat, h0, c0)
    if not save:
        save = (recorded and requires_grad(x, flat, h0, c0)) or _has_tangent(x, flat, h0, c0)
    if transformed or save:
        if c0 is not None and c0 is h0:
            c0 = c0.view_as(c0)  # torch.compile refuses the same tensor twice
        function = _TransformedLayer if transformed else _Layer
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = function.apply(
            x, h0, c0, lengths, reset, reversed, cells, D, allow_tf32, recorded, save, *flat
        )
        return results
    w_ih, w_hh, bias, w_hr = by_kind(flat, D)
    kept = (None, 0) if packed is None else packed.find(x, w_hh, w_hr, allow_tf32)
    return ops.layer_forward(
        x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, reversed, False, cells, allow_tf32, *kept
    )


def tf32_allowed(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch's settings let a recurrence round the operands of its products to TF32."""
    if device_type != "cuda" or dtype is not torch.float32:
        return False
    rnn = torch.backends.cudnn.rnn
    return bool(rnn.fp32_precision == "tf32")  # type: ignore[attr-defined]


def requires_grad(
    x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None
) -> bool:
    if x.requires_grad or (h0 is not None and h0.requires_grad):
        return True
    if c0 is not None and c0.requires_grad:
        return True
    return any(w.requires_grad for w in weights)


def is_transformed(
    x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None
) -> bool:
    """Whether torch.func is at work, or forward-mode differentiation of one of these."""
    return torch._C._are_functorch_transforms_active() or _has_tangent(x, weights, h0, c0)


def _differentiations() -> int:
    """How many times torch.func differentiates what runs here; vmap does not."""
    if not torch._C._are_functorch_transforms_active():
        return 0
    if torch.compiler.is_compiling():
        return 1  # which torch.compile cannot count
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() != torch._C._functorch.TransformType.Vmap for level in levels)


def _has_tangent(
    x: Tensor, weights: Sequence[Tensor], h0: Tensor | None, c0: Tensor | None
) -> bool:
    """Whether forward mode differentiates by one of these."""
    if forward_ad._current_level < 0:
        return False
    given = (t for t in (x, h0, c0, *weights) if t is not None)
    return any(forward_ad.unpack_dual(t).tangent is not None for t in given)


def by_kind(flat: Sequence[W], D: int) -> tuple[Sequence[W], Sequence[W], Sequence[W], Sequence[W]]:
    """w_ih, w_hh, biases and w_hr of D recurrences, from their flat list."""
    per = len(flat) // D  # 2 to 5: [w_ih, w_hh] + [b_ih, b_hh] + [w_hr]
    end = 4 * D if per >= 4 else 2 * D
    return flat[:D], flat[D : 2 * D], flat[2 * D : end], flat[end:]


def flat_gradients(dw: Sequence[Tensor], D: int, count: int, needed: bool) -> list[Tensor | None]:
    """Those of ``count`` weights in their flat list, from dw_ih, dw_hh, db and dw_hr of the op."""
    if not needed:
        return [None] * count
    dw_ih, dw_hh, db, dw_hr = dw
    _, _, bias, w_hr = by_kind(range(count), D)
    # Both biases have the same gradient, in storage of their own: optimizers write to it.
    parts = [dw_ih, dw_hh] + ([db, db.clone()] if bias else []) + ([dw_hr] if w_hr else [])
    return [part[d] for part in parts for d in range(D)]


class _TransformedLayer(torch.autograd.Function):
    """y, h_n, c_n, gates, c of a layer, in the form that torch.func and forward mode ask for.

    Gates and c carry gradients, so that backward can be differentiated (``second_order``).
    ``recorded``: backward may come; torch.func hides torch.no_grad from here.
    ``save``: a derivative of either mode may come.
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
        save: bool,
        *flat: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        w_ih, w_hh, bias, w_hr = by_kind(flat, D)
        return ops.layer_forward(
            x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, reversed, save, cells, allow_tf32
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_forward(*_keep(ctx, inputs, output))

    @staticmethod
    def backward(
        ctx: Any,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dgates: Tensor | None,
        dc: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if not ctx.recorded:
            return (None,) * len(ctx.needs_input_grad)
        x, h0, c0, lengths, reset, y, gates, c, *flat = ctx.saved_tensors
        needs_x, needs_h0, needs_c0, _, _, _, _, _, _, _, _, *needs_flat = ctx.needs_input_grad
        w_ih, w_hh, _, w_hr = by_kind(flat, ctx.D)
        given = x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, ctx.reversed, y, gates, c
        compiling = torch.compiler.is_compiling()
        if compiling:
            dgates = None  # zeros: gates carry no gradient there
        by_kernel = dgates is None or ops.takes_dgates(x)
        differentiable = not compiling and (_differentiable() or not by_kernel)
        backward: Any = ops.layer_backward
        if differentiable and by_kernel and _differentiations() == 1:
            # This may well be the last derivative.
            differentiable, backward = False, gradients
        if differentiable:
            if torch.is_grad_enabled():
                asked = _asked_for(ctx, (x, h0, c0, lengths, reset, *flat))
                needs_x = needs_x and asked[0]
                needs_flat = [n and a for n, a in zip(needs_flat, asked[5:], strict=True)]
            grads = Run(*given).gradients(dy, dh_n, dc_n, dgates, dc, needs_x, any(needs_flat))
        else:
            grads = backward(
                dy, dh_n, dc_n, dc, *given, needs_x, any(needs_flat), ctx.allow_tf32, dgates
            )
        dx, dh0, dc0, *dw = grads
        dflat = flat_gradients(dw, ctx.D, len(flat), any(needs_flat))
        return (
            dx if needs_x else None,
            dh0 if needs_h0 else None,
            dc0 if needs_c0 else None,
            None, None, None, None, None, None, None, None,
            *dflat,
        )  # fmt: skip

    @staticmethod
    def jvp(ctx: Any, *changes: Tensor | None) -> tuple[Tensor, ...]:
        dx, dh0, dc0, _, _, _, _, _, _, _, _, *dflat = changes
        with forward_mode(ctx) as (x, h0, c0, lengths, reset, y, gates, c, *flat):
            w_ih, w_hh, _, w_hr = by_kind(flat, ctx.D)
            run = Run(x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, ctx.reversed, y, gates, c)
            return run.tangents(dx, dh0, dc0, *by_kind(dflat, ctx.D))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        x, h0, c0, lengths, reset, reversed, cells, D, _, recorded, save, *flat = inputs
        x_dim, h0_dim, c0_dim, lengths_dim, reset_dim, _, _, _, _, _, _, *flat_dims = in_dims

        def call(given: Arguments) -> tuple[Tensor, ...]:
            x, (h0, c0, lengths, reset), flat, D, reversed = given
            return _run(
                x, h0, c0, lengths, reset, reversed, D, *flat,
                cells=cells, recorded=recorded, save=save,
            )  # fmt: skip

        given = Arguments(x, (h0, c0, lengths, reset), flat, D, reversed)
        dims = Dims(x_dim, (h0_dim, c0_dim, lengths_dim, reset_dim), flat_dims)
        places = (STATES, STATES, LENGTHS, RESET)
        result_places = (STEPS, STATES, STATES, STEPS, STEPS)
        return batched(call, info.batch_size, given, dims, places, result_places)


class _Layer(torch.autograd.Function):
    """The same for reverse mode alone, outside torch.func.

    There ``apply`` need not bind arguments, which would cost more than a small layer, and
    torch.compile, which refuses a rule for forward mode, can follow.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        outputs = _TransformedLayer.forward(*inputs)
        _keep(ctx, inputs, outputs)
        if torch.compiler.is_compiling():  # backward cannot be differentiated there
            _, _, _, gates, c = outputs
            cells = inputs[6]
            if cells:
                ctx.mark_non_differentiable(gates)
            else:
                ctx.mark_non_differentiable(gates, c)
        return outputs

    backward = staticmethod(_TransformedLayer.backward)


def _asked_for(ctx: Any, inputs: Sequence[Tensor | None]) -> list[bool]:
    """Of which inputs this backward is asked for gradients: ``torch.autograd.grad`` names them.

    ``ctx.needs_input_grad`` only tells which can have one. Here the products for others would be
    made, and recorded, in vain.
    """
    nodes = iter(ctx.next_functions)  # of those inputs that are tensors
    return [t is not None and _will_be_executed(next(nodes)[0]) for t in inputs]


def _will_be_executed(node: Any) -> bool:
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # its answer for a leaf that is asked for
        return True


def _differentiable() -> bool:
    """Whether backward must be differentiable."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _keep(
    ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Keep in ctx what derivatives need; the tensors among it are returned."""
    x, h0, c0, lengths, reset, ctx.reversed, _, ctx.D, ctx.allow_tf32, ctx.recorded, _, *flat = (
        inputs
    )
    y, _, _, gates, c = outputs
    ctx.set_materialize_grads(False)  # an absent gradient stays absent, down to the kernel
    saved = x, h0, c0, lengths, reset, y, gates, c, *flat
    ctx.save_for_backward(*saved)
    return saved
