"""Products of whole sequences, and sums of outer products: each is made of the other's derivatives.

On CPUs they run on the project's own kernels, in the dtype of sums; elsewhere in torch's ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import derivative_ops as ops
from .batching import fold


def product(a: Tensor, w: Tensor) -> Tensor:
    """a [T, D, B, m] times w [D, m, n], in a's dtype; differentiable.

    It is computed in w's dtype; on CPUs in a's, which must then be that of sums.
    """
    if a.device.type != "cpu":
        return torch.einsum("tdbm,dmn->tdbn", a.to(w.dtype), w).to(a.dtype)
    w = w.to(a.dtype)
    if not differentiable():
        return ops.product(a, w)
    result: Tensor = _Product.apply(a, w, torch.is_grad_enabled())
    return result


def outer_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over t and b of those of a [T, D, B, m] and b [T, D, B, n], in dtype: [D, m, n].

    Differentiable. On CPUs the sums are in a's dtype, as for ``product``.
    """
    if a.device.type != "cpu":
        rows = (t.to(dtype).transpose(0, 1).flatten(1, 2) for t in (a, b))
        return torch.bmm(next(rows).transpose(1, 2), next(rows))
    b = b.to(a.dtype)
    if not differentiable():
        return ops.outer_products(a, b).to(dtype)
    result: Tensor = _OuterProducts.apply(a, b, torch.is_grad_enabled())
    return result.to(dtype)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None stands for zeros."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def differentiable() -> bool:
    """Whether what is computed now may be differentiated, in either mode, or is transformed."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return True
    return torch._C._are_functorch_transforms_active()


@contextmanager
def forward_mode(ctx: Any) -> Iterator[tuple[Any, ...]]:
    """What ctx saved, as a rule for forward mode needs it.

    Such a rule is called with forward mode off, which would lose tangents of other levels, and
    with tensors that have the tangents of its own level.
    """
    with forward_ad._set_fwd_grad_enabled(True), torch.set_grad_enabled(ctx.recorded):
        saved = ctx.saved_tensors
        yield tuple(t if t is None else forward_ad.unpack_dual(t).primal for t in saved)


class _Product(torch.autograd.Function):
    """``product`` on a CPU. ``recorded``: backward may come; torch.func hides torch.no_grad."""

    @staticmethod
    def forward(a: Tensor, w: Tensor, recorded: bool) -> Tensor:
        return ops.product(a, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.recorded or grad is None:
            return None, None, None
        a, w = ctx.saved_tensors
        needs_a, needs_w, _ = ctx.needs_input_grad
        return (
            product(grad, w.transpose(1, 2)) if needs_a else None,
            outer_products(a, grad, w.dtype) if needs_w else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, dw: Tensor | None, _: None) -> Tensor | None:
        with forward_mode(ctx) as (a, w):
            return add(
                None if da is None else product(da, w), None if dw is None else product(a, dw)
            )

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], a: Tensor, w: Tensor, recorded: bool) -> Any:
        a_dim, w_dim, _ = in_dims
        into, size = 2 if w_dim is None else 1, info.batch_size
        rows, matrix = fold(a, a_dim, size, into), w if w_dim is None else fold(w, w_dim, size, 0)
        return _Product.apply(rows, matrix, recorded).unflatten(into, (size, -1)), into


class _OuterProducts(torch.autograd.Function):
    """``outer_products`` on a CPU, as ``_Product``."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, recorded: bool) -> Tensor:
        return ops.outer_products(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.recorded or grad is None:
            return None, None, None
        a, b = ctx.saved_tensors
        needs_a, needs_b, _ = ctx.needs_input_grad
        return (
            product(b, grad.transpose(1, 2)) if needs_a else None,
            product(a, grad) if needs_b else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, _: None) -> Tensor | None:
        with forward_mode(ctx) as (a, b):
            return add(
                None if da is None else outer_products(da, b, a.dtype),
                None if db is None else outer_products(a, db, a.dtype),
            )

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], a: Tensor, b: Tensor, recorded: bool) -> Any:
        a_dim, b_dim, _ = in_dims
        size = info.batch_size
        folded = fold(a, a_dim, size, 1), fold(b, b_dim, size, 1)
        return _OuterProducts.apply(*folded, recorded).unflatten(0, (size, -1)), 0


def _keep(ctx: Any, inputs: tuple[Any, ...]) -> None:
    a, b, ctx.recorded = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b)
    ctx.save_for_forward(a, b)
