"""The first backward pass of a layer, as a function that can be differentiated and batched.

``second_order.Run`` gives the same gradients by functions with derivatives of their own, and keeps
what those need. Here they come from the fused op, and a run is made only if they are in fact
differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .batching import LENGTHS, RESET, STATES, STEPS, WEIGHTS, Arguments, Dims, batched
from .differentiation import pulled_back
from .products import forward_mode
from .second_order import Run

# Of dy, dh_n, dc_n, dc, dgates; h0, c0, lengths, reset; y, gates, c.
_PLACES = (
    STEPS, STATES, STATES, STEPS, STEPS, STATES, STATES, LENGTHS, RESET, STEPS, STEPS, STEPS,
)  # fmt: skip
_RESULT_PLACES = (STEPS, STATES, STATES, WEIGHTS, WEIGHTS, WEIGHTS, WEIGHTS)


def gradients(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    y: Tensor,
    gates: Tensor,
    c: Tensor,
    need_dx: bool,
    need_dw: bool,
    allow_tf32: bool,
    dgates: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What ``ops.layer_backward`` returns, differentiable by all tensors given."""
    others = dy, dh_n, dc_n, dc, dgates, h0, c0, lengths, reset, y, gates, c
    results: tuple[Tensor, ...] = _Gradients.apply(
        reversed, len(w_hh), need_dx, need_dw, allow_tf32, x, *others, *w_ih, *w_hh, *w_hr
    )
    return results


class _Gradients(torch.autograd.Function):
    """``gradients``, for torch.func."""

    @staticmethod
    def forward(
        reversed: int,
        D: int,
        need_dx: bool,
        need_dw: bool,
        allow_tf32: bool,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        x, dy, dh_n, dc_n, dc, dgates, h0, c0, lengths, reset, y, gates, c, *weights = tensors
        return ops.layer_backward(
            dy, dh_n, dc_n, dc, x, weights[:D], weights[D : 2 * D], weights[2 * D :], h0, c0,
            lengths, reset, reversed, y, gates, c, need_dx, need_dw, allow_tf32, dgates,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *ctx.settings, _ = inputs[:5]
        ctx.set_materialize_grads(False)
        ctx.recorded = True
        ctx.save_for_backward(*inputs[5:])
        ctx.save_for_forward(*inputs[5:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        found = pulled_back(
            lambda given: _by_run(ctx.settings, given), tensors, ctx.needs_input_grad[5:], grads
        )
        return (None,) * 5 + tuple(found)

    @staticmethod
    def jvp(ctx: Any, *changes: Tensor | None) -> tuple[Tensor, ...]:
        moving = {k: change for k, change in enumerate(changes[5:]) if change is not None}
        with forward_mode(ctx) as tensors:
            duals = [forward_ad.make_dual(tensors[k], change) for k, change in moving.items()]
            results = map(forward_ad.unpack_dual, _by_run(ctx.settings, tensors, [*moving], duals))
            return tuple(
                torch.zeros_like(primal) if tangent is None else tangent
                for primal, tangent in results
            )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        reversed, D, need_dx, need_dw, allow_tf32, x, *rest = inputs
        others, weights = rest[: len(_PLACES)], rest[len(_PLACES) :]
        x_dim, *rest_dims = in_dims[5:]
        dims = Dims(x_dim, rest_dims[: len(_PLACES)], rest_dims[len(_PLACES) :])
        if need_dw and all(dim is None for dim in dims.weights):
            # Gradients for each member of weights that they share: the op would add them up.
            there = [k for k, t in enumerate(inputs[5:]) if t is not None]
            every = torch.func.vmap(
                lambda *by: _by_run(inputs[:4], inputs[5:], there, by),
                tuple(in_dims[5 + k] for k in there),
            )
            return every(*(inputs[5 + k] for k in there)), (0,) * len(_RESULT_PLACES)

        def call(given: Arguments) -> tuple[Tensor, ...]:
            results: tuple[Tensor, ...] = _Gradients.apply(
                given.reversed, given.D, need_dx, need_dw, allow_tf32,
                given.x, *given.others, *given.weights,
            )  # fmt: skip
            return results

        given = Arguments(x, others, weights, D, reversed)
        return batched(call, info.batch_size, given, dims, _PLACES, _RESULT_PLACES, need_dx)


def _by_run(
    settings: Sequence[Any],
    tensors: Sequence[Tensor | None],
    which: Sequence[int] = (),
    by: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """The gradients as differentiable functions of ``by``, which take the places ``which``."""
    reversed, D, need_dx, need_dw = settings
    given: list[Any] = list(tensors)
    for k, t in zip(which, by, strict=True):
        given[k] = t
    x, dy, dh_n, dc_n, dc, dgates, h0, c0, lengths, reset, y, gates, c, *weights = given
    w_ih, w_hh, w_hr = weights[:D], weights[D : 2 * D], weights[2 * D :]
    run = Run(x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, reversed, y, gates, c)
    dx, dh0, dc0, *dw = run.gradients(dy, dh_n, dc_n, dgates, dc, need_dx, need_dw)
    # The op gives no gradient of a state that is not there.
    nothing = x.new_empty(0)
    return (
        dx,
        nothing if h0 is None else dh0,
        nothing if c0 is None else dc0.to(c0.dtype),
        *dw,
    )
