"""The recurrence that the derivatives of a layer obey, forwards and transposed.

Along a run of a layer with gates i, f, g, o and cell states c, and with s = tanh(c), changes a_x of
the inputs, a_z of what enters the gates, a_c of the cell states and a_m of the unprojected outputs
m = o s add up to the changes (marked ')::

    z'[t] = a_z[t] + V a_x[t] + W m'[t-1]
    i', f', g', o' = (i (1 - i) z_i', f (1 - f) z_f', (1 - g^2) z_g', o (1 - o) z_o')
    c'[t] = a_c[t] + f[t] c'[t-1] + (g i' + c[t-1] f' + i g')[t]
    m'[t] = a_m[t] + (o (1 - s^2) c' + s o')[t]

``tangents`` solves this; ``adjoints`` solves the transposed system, which is backward's::

    dm[t] = b_m[t] + W^T dz[t+1]
    dc[t] = b_c[t] + f[t+1] dc[t+1] + (o (1 - s^2) dm)[t]
    di, df, dg, do = b_gates[t] + (g dc, c[t-1] dc, i dc, s dm)[t]
    dz[t] = b_z[t] + (i (1 - i) di, f (1 - f) df, (1 - g^2) dg, o (1 - o) do)[t]
    dx[t] = V^T dz[t]

Each is linear in its sources and the other's transpose, so each is the other's derivative by them;
and the derivatives by the cells are local products of the two solutions (``cell_gradients``). So
the pair is closed under differentiation, forward or reverse, to any order. Where no more
derivatives can follow, a CPU makes them in one pass of a kernel.

Shapes, with T steps in the order of the recurrence and D recurrences: z, gates [T, D, B, 4H]; c, m
[T, D, B, H]; x [T, D, B, I]; W [D, 4H, H]; V [D, 4H, I]; c0 [D, B, H], which enters the first step.
W and V may have 16 bits: all else is in float32, and on CUDA products with them are in their dtype.
V may be None if neither a_x nor dx is wanted.
``fresh`` is [T, D, B, 1] bool, or None for nowhere: where it is True, nothing passes from t - 1 to
t. A source may be None for zeros, and so may c0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import derivative_ops, recurrence_steps
from .batching import fold
from .products import add, differentiable, forward_mode, outer_products, product
from .recurrence_steps import (
    States,
    after,
    before,
    coefficient_changes,
    coefficients,
    cut,
    slopes,
)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # by gates, cells and c0


def tangents(
    a_x: Tensor | None,
    a_z: Tensor | None,
    a_c: Tensor | None,
    a_m: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    W: Tensor,
    V: Tensor | None,
    fresh: Tensor | None,
) -> States:
    """z', c' and m'; differentiable."""
    recorded = torch.is_grad_enabled()
    states: States = _Tangents.apply(a_x, a_z, a_c, a_m, gates, cells, c0, W, V, fresh, recorded)
    return states


def adjoints(
    b_z: Tensor | None,
    b_gates: Tensor | None,
    b_c: Tensor | None,
    b_m: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    W: Tensor,
    V: Tensor | None,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, or [0] without V, and dz, dc and dm; differentiable."""
    recorded = torch.is_grad_enabled()
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _Adjoints.apply(
        b_z, b_gates, b_c, b_m, gates, cells, c0, W, V, fresh, recorded
    )
    return result


class _Tangents(torch.autograd.Function):
    """``tangents``. ``recorded``: backward may come; torch.func hides torch.no_grad from here."""

    @staticmethod
    def forward(
        a_x: Tensor | None,
        a_z: Tensor | None,
        a_c: Tensor | None,
        a_m: Tensor | None,
        gates: Tensor,
        cells: Tensor,
        c0: Tensor | None,
        W: Tensor,
        V: Tensor | None,
        fresh: Tensor | None,
        recorded: bool,
    ) -> States:
        if gates.device.type == "cpu":
            W, V = W.to(cells.dtype), None if V is None else V.to(cells.dtype)
            _, z, c, m = derivative_ops.changes(
                False, a_x, a_z, None, a_c, a_m, gates, cells, c0, W, V, fresh
            )
            return z, c, m
        if a_x is not None:
            assert V is not None
            a_z = add(a_z, product(a_x, V.transpose(1, 2)))
        _, K, F, R = coefficients(gates, cells, c0, fresh)
        return recurrence_steps.tangent_steps(a_z, a_c, a_m, K, F, R, W, fresh)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: States) -> None:
        _keep(ctx, inputs[0], inputs[4:], output)

    @staticmethod
    def backward(ctx: Any, *sources: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.recorded or all(source is None for source in sources):
            return (None,) * 11
        a_x, gates, cells, c0, W, V, fresh, z, c, m = ctx.saved_tensors
        needs_x, *_, needs_W, needs_V, _, _ = ctx.needs_input_grad
        b_z, b_c, b_m = sources
        used = V if needs_x else None
        dx, dz, dc, dm = adjoints(b_z, None, b_c, b_m, gates, cells, c0, W, used, fresh)
        by_cells: Gradients = (None, None, None)
        if any(ctx.needs_input_grad[4:7]):
            by_cells = _cell_gradients(None, dc, dm, z, c, gates, cells, c0, fresh)
        by_W = _by_recurrent_weights(dz, m, W, fresh) if needs_W else None
        by_V = _by_input_weights(dz, a_x, V) if needs_V else None
        return _asked_for(ctx, dx, dz, dc, dm, *by_cells, by_W, by_V, None, None)

    @staticmethod
    def jvp(ctx: Any, *changes: Tensor | None) -> States:
        d_x, a_z, a_c, a_m, dgates, dcells, dc0, dW, dV, _, _ = changes
        with forward_mode(ctx) as (a_x, gates, cells, c0, W, V, fresh, z, c, m):
            if dW is not None:
                a_z = add(a_z, product(before(m, fresh), dW.transpose(1, 2)))
            if dV is not None and a_x is not None:
                a_z = add(a_z, product(a_x, dV.transpose(1, 2)))
            if not (dgates is None and dcells is None and dc0 is None):
                _, dK, dF, dR = coefficient_changes(gates, cells, c0, fresh, dgates, dcells, dc0)
                i, f, g, o = (dK * z).chunk(4, 3)
                a_c = add(a_c, dF * before(c, fresh) + i + f + g)
                a_m = add(a_m, dR * c + o)
            return tangents(d_x, a_z, a_c, a_m, gates, cells, c0, W, V, fresh)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _folded(_Tangents, info.batch_size, in_dims, inputs)


class _Adjoints(torch.autograd.Function):
    """``adjoints``, as ``_Tangents``."""

    @staticmethod
    def forward(
        b_z: Tensor | None,
        b_gates: Tensor | None,
        b_c: Tensor | None,
        b_m: Tensor | None,
        gates: Tensor,
        cells: Tensor,
        c0: Tensor | None,
        W: Tensor,
        V: Tensor | None,
        fresh: Tensor | None,
        recorded: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if gates.device.type == "cpu":
            W, V = W.to(cells.dtype), None if V is None else V.to(cells.dtype)
            return derivative_ops.changes(
                True, None, b_z, b_gates, b_c, b_m, gates, cells, c0, W, V, fresh
            )
        slope, K, F, R = coefficients(gates, cells, c0, fresh)
        if b_gates is not None:
            b_z = add(b_z, slope * b_gates)
        dz, dc, dm = recurrence_steps.adjoint_steps(b_z, b_c, b_m, K, F, R, W, fresh)
        return dz.new_empty(0) if V is None else product(dz, V), dz, dc, dm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs[1], inputs[4:], output[1:])

    @staticmethod
    def backward(ctx: Any, *sources: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.recorded or all(source is None for source in sources):
            return (None,) * 11
        b_gates, gates, cells, c0, W, V, fresh, dz, dc, dm = ctx.saved_tensors
        needs_z, needs_gates, _, _, *needs_cells, needs_W, needs_V, _, _ = ctx.needs_input_grad
        a_x, a_z, a_c, a_m = sources
        z = by_gates = None
        by_cells: Gradients = (None, None, None)
        if any(needs_cells) and not (needs_z or needs_gates) and _in_one_pass(cells):
            w, v = W.to(cells.dtype), None if V is None else V.to(cells.dtype)
            c, m, dgates, dcells, dc0 = derivative_ops.tangents_with_gradients(
                a_x, a_z, a_c, a_m, b_gates, dc, dm, gates, cells, c0, w, v, fresh
            )
            by_cells = dgates, dcells, dc0
        else:
            z, c, m = tangents(a_x, a_z, a_c, a_m, gates, cells, c0, W, V, fresh)
            by_gates = slopes(gates) * z if needs_gates else None
            if any(needs_cells):
                by_cells = _cell_gradients(b_gates, dc, dm, z, c, gates, cells, c0, fresh)
        by_W = _by_recurrent_weights(dz, m, W, fresh) if needs_W else None
        by_V = _by_input_weights(dz, a_x, V) if needs_V else None
        return _asked_for(ctx, z, by_gates, c, m, *by_cells, by_W, by_V, None, None)

    @staticmethod
    def jvp(ctx: Any, *changes: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b_z, b_gates, b_c, b_m, dgates, dcells, dc0, dW, dV, _, _ = changes
        with forward_mode(ctx) as (source, gates, cells, c0, W, V, fresh, dz, dc, dm):
            if dW is not None:
                b_m = add(b_m, product(after(dz, fresh), dW))
            if not (dgates is None and dcells is None and dc0 is None):
                dslope, dK, dF, dR = coefficient_changes(
                    gates, cells, c0, fresh, dgates, dcells, dc0
                )
                b_z = add(b_z, dK * torch.cat((dc, dc, dc, dm), 3))
                if source is not None:
                    b_z = add(b_z, dslope * source)
                b_c = add(b_c, after(dF * dc, fresh) + dR * dm)
            x, z, c, m = adjoints(b_z, b_gates, b_c, b_m, gates, cells, c0, W, V, fresh)
            return x if dV is None else x + product(dz, dV), z, c, m

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _folded(_Adjoints, info.batch_size, in_dims, inputs)


def _keep(
    ctx: Any, source: Tensor | None, run: tuple[Any, ...], solution: tuple[Tensor, ...]
) -> None:
    """Keep a source, the run (gates, cells, c0, W, V, fresh) and the solution."""
    *cells, ctx.recorded = run
    ctx.set_materialize_grads(False)  # an absent source stays absent
    ctx.save_for_backward(source, *cells, *solution)
    ctx.save_for_forward(source, *cells, *solution)


def _asked_for(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def _in_one_pass(cells: Tensor) -> bool:
    """Whether the gradients by the cells can be made by a kernel, which no more can follow."""
    return cells.device.type == "cpu" and not differentiable()


def _cell_gradients(
    source_gates: Tensor | None,
    dc: Tensor,
    dm: Tensor,
    z: Tensor,
    c: Tensor,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    fresh: Tensor | None,
) -> Gradients:
    by_kernel = _in_one_pass(cells)
    function = derivative_ops.cell_gradients if by_kernel else recurrence_steps.cell_gradients
    return function(source_gates, dc, dm, z, c, gates, cells, c0, fresh)


def _by_recurrent_weights(dz: Tensor, m: Tensor, W: Tensor, fresh: Tensor | None) -> Tensor:
    entering = cut(m[:-1], None if fresh is None else fresh[1:])
    return outer_products(dz[1:], entering, W.dtype)


def _by_input_weights(dz: Tensor, a_x: Tensor | None, V: Tensor) -> Tensor | None:
    return None if a_x is None else outer_products(dz, a_x, V.dtype)


def _folded(
    function: Any, size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule for vmap: a larger batch, or more recurrences where there are weights for each."""
    *sources, gates, cells, c0, W, V, fresh, recorded = inputs
    *source_dims, gates_dim, cells_dim, c0_dim, W_dim, V_dim, fresh_dim, _ = in_dims
    for_each = W_dim is not None or V_dim is not None
    into = 1 if for_each else 2
    folded = [fold(t, dim, size, into) for t, dim in zip(sources, source_dims, strict=True)]
    states = function.apply(
        *folded,
        fold(gates, gates_dim, size, into),
        fold(cells, cells_dim, size, into),
        fold(c0, c0_dim, size, into - 1),
        fold(W, W_dim, size, 0) if for_each else W,
        fold(V, V_dim, size, 0) if for_each else V,
        fold(fresh, fresh_dim, size, into),
        recorded,
    )
    dims = tuple(0 if t.dim() == 1 else into for t in states)  # dx is [0] where not asked for
    return tuple(
        t.unflatten(into, (size, -1)) if dim else t.expand(size, 0)
        for t, dim in zip(states, dims, strict=True)
    ), dims
