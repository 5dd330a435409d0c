"""The recurrence that the derivatives of a layer obey, forwards and transposed.

Along a run of a layer, with coefficients K, F and R that its gates give, changes a_z of what enters
the gates, a_c of the cell states and a_m of the unprojected outputs add up to the changes::

    z[t] = a_z[t] + W m[t-1]
    c[t] = a_c[t] + F[t] c[t-1] + K_i z_i[t] + K_f z_f[t] + K_g z_g[t]
    m[t] = a_m[t] + R[t] c[t] + K_o z_o[t]

``tangents`` solves this; ``adjoints`` solves the transposed system, which is backward's::

    dm[t] = b_m[t] + W^T dz[t+1]
    dc[t] = b_c[t] + F[t+1] dc[t+1] + R[t] dm[t]
    dz[t] = b_z[t] + (K_i dc, K_f dc, K_g dc, K_o dm)[t]

Each is linear in its sources and the other's transpose, so each is the other's derivative by them;
and the derivatives by the coefficients are products of the two solutions. So the pair is closed
under differentiation, forward or reverse, to any order.

Shapes, with T steps in the order of the recurrence and D recurrences: z, K [T, D, B, 4H]; c, m, F,
R [T, D, B, H]; W [D, 4H, H]. W may have 16 bits: all else is in float32, and on CUDA the products
with W are in its dtype.
``fresh`` is [T, D, B, 1] bool, or None for nowhere: where it is True, nothing passes from t - 1 to
t. A source may be None for zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad

from . import ops
from .batching import fold

States = tuple[Tensor, Tensor, Tensor]


def tangents(
    a_z: Tensor | None,
    a_c: Tensor | None,
    a_m: Tensor | None,
    K: Tensor,
    F: Tensor,
    R: Tensor,
    W: Tensor,
    fresh: Tensor | None,
) -> States:
    """z, c and m; differentiable."""
    recorded = torch.is_grad_enabled()
    states: States = _Tangents.apply(a_z, a_c, a_m, K, F, R, W, fresh, recorded)
    return states


def adjoints(
    b_z: Tensor | None,
    b_c: Tensor | None,
    b_m: Tensor | None,
    K: Tensor,
    F: Tensor,
    R: Tensor,
    W: Tensor,
    fresh: Tensor | None,
) -> States:
    """dz, dc and dm; differentiable."""
    recorded = torch.is_grad_enabled()
    states: States = _Adjoints.apply(b_z, b_c, b_m, K, F, R, W, fresh, recorded)
    return states


def product(a: Tensor, w: Tensor) -> Tensor:
    """a [T, D, B, m] times w [D, m, n], in w's dtype; the result has a's."""
    return torch.einsum("tdbm,dmn->tdbn", a.to(w.dtype), w).to(a.dtype)


def outer_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over t and b of those of a [T, D, B, m] and b [T, D, B, n], in dtype: [D, m, n]."""
    rows = (t.to(dtype).transpose(0, 1).flatten(1, 2) for t in (a, b))
    return torch.bmm(next(rows).transpose(1, 2), next(rows))


def before(states: Tensor, fresh: Tensor | None) -> Tensor:
    """The state [T, D, B, n] that enters each step; into the first and the fresh ones, zero."""
    if len(states) == 0:
        return states
    return _cut(pad(states[:-1], (0, 0, 0, 0, 0, 0, 1, 0)), fresh)


def after(states: Tensor, fresh: Tensor | None) -> Tensor:
    """The transpose of ``before``."""
    if len(states) == 0:
        return states
    return pad(_cut(states, fresh)[1:], (0, 0, 0, 0, 0, 0, 0, 1))


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None stands for zeros."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


@contextmanager
def forward_mode(ctx: Any) -> Iterator[tuple[Any, ...]]:
    """What ctx saved, as a rule for forward mode needs it.

    Such a rule is called with forward mode off, which would lose tangents of other levels, and
    with tensors that have the tangents of its own level.
    """
    with forward_ad._set_fwd_grad_enabled(True), torch.set_grad_enabled(ctx.recorded):
        saved = ctx.saved_tensors
        yield tuple(t if t is None else forward_ad.unpack_dual(t).primal for t in saved)


class _Tangents(torch.autograd.Function):
    """``tangents``. ``recorded``: backward may come; torch.func hides torch.no_grad from here."""

    @staticmethod
    def forward(
        a_z: Tensor | None,
        a_c: Tensor | None,
        a_m: Tensor | None,
        K: Tensor,
        F: Tensor,
        R: Tensor,
        W: Tensor,
        fresh: Tensor | None,
        recorded: bool,
    ) -> States:
        if K.device.type == "cpu":
            return ops.changes(False, a_z, a_c, a_m, K, F, R, W.to(F.dtype), fresh)
        return _tangent_steps(a_z, a_c, a_m, K, F, R, W, fresh)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: States) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *sources: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.recorded or all(source is None for source in sources):
            return (None,) * 9
        K, F, R, W, fresh, z, c, m = ctx.saved_tensors
        b_z, b_c, b_m = sources
        adjoint = adjoints(b_z, b_c, b_m, K, F, R, W, fresh)
        return _gradients(ctx, adjoint, adjoint, (z, c, m), W.dtype, fresh)

    @staticmethod
    def jvp(ctx: Any, *changes: Tensor | None) -> States:
        a_z, a_c, a_m, dK, dF, dR, dW, _, _ = changes
        with forward_mode(ctx) as (K, F, R, W, fresh, z, c, m):
            if dW is not None:
                a_z = add(a_z, product(before(m, fresh), dW.transpose(1, 2)))
            if dF is not None:
                a_c = add(a_c, dF * before(c, fresh))
            if dR is not None:
                a_m = add(a_m, dR * c)
            if dK is not None:
                i, f, g, o = (dK * z).chunk(4, 3)
                a_c, a_m = add(a_c, i + f + g), add(a_m, o)
            return tangents(a_z, a_c, a_m, K, F, R, W, fresh)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[States, tuple[int, int, int]]:
        return _folded(_Tangents, info.batch_size, in_dims, inputs)


class _Adjoints(torch.autograd.Function):
    """``adjoints``, as ``_Tangents``."""

    @staticmethod
    def forward(
        b_z: Tensor | None,
        b_c: Tensor | None,
        b_m: Tensor | None,
        K: Tensor,
        F: Tensor,
        R: Tensor,
        W: Tensor,
        fresh: Tensor | None,
        recorded: bool,
    ) -> States:
        if K.device.type == "cpu":
            return ops.changes(True, b_z, b_c, b_m, K, F, R, W.to(F.dtype), fresh)
        return _adjoint_steps(b_z, b_c, b_m, K, F, R, W, fresh)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: States) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *sources: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.recorded or all(source is None for source in sources):
            return (None,) * 9
        K, F, R, W, fresh, dz, dc, dm = ctx.saved_tensors
        a_z, a_c, a_m = sources
        tangent = tangents(a_z, a_c, a_m, K, F, R, W, fresh)
        return _gradients(ctx, tangent, (dz, dc, dm), tangent, W.dtype, fresh)

    @staticmethod
    def jvp(ctx: Any, *changes: Tensor | None) -> States:
        b_z, b_c, b_m, dK, dF, dR, dW, _, _ = changes
        with forward_mode(ctx) as (K, F, R, W, fresh, dz, dc, dm):
            if dW is not None:
                b_m = add(b_m, product(after(dz, fresh), dW))
            if dF is not None:
                b_c = add(b_c, after(dF * dc, fresh))
            if dR is not None:
                b_c = add(b_c, dR * dm)
            if dK is not None:
                b_z = add(b_z, dK * torch.cat((dc, dc, dc, dm), 3))
            return adjoints(b_z, b_c, b_m, K, F, R, W, fresh)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[States, tuple[int, int, int]]:
        return _folded(_Adjoints, info.batch_size, in_dims, inputs)


def _keep(ctx: Any, inputs: tuple[Any, ...], solution: States) -> None:
    """Keep the coefficients, ``fresh`` and the solution."""
    *coefficients, ctx.recorded = inputs[3:]
    ctx.set_materialize_grads(False)  # an absent source stays absent
    ctx.save_for_backward(*coefficients, *solution)
    ctx.save_for_forward(*coefficients, *solution)


def _gradients(
    ctx: Any,
    by_sources: States,
    adjoint: States,
    tangent: States,
    dtype: torch.dtype,
    fresh: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of either system's inputs, W of this dtype, from its and the other's states."""
    needs_sources, needs = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:]
    (dz, dc, dm), (z, c, m) = adjoint, tangent
    return (
        *(by if need else None for by, need in zip(by_sources, needs_sources, strict=True)),
        torch.cat((dc, dc, dc, dm), 3) * z if needs[0] else None,
        dc * before(c, fresh) if needs[1] else None,
        dm * c if needs[2] else None,
        outer_products(dz, before(m, fresh), dtype) if needs[3] else None,
        None,
        None,
    )


def _folded(
    function: Any, size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]
) -> tuple[States, tuple[int, int, int]]:
    """The rule for vmap: a larger batch, or more recurrences where there is a W for each."""
    W_dim = in_dims[6]
    into = 2 if W_dim is None else 1
    folded = [fold(inputs[k], in_dims[k], size, into) for k in (0, 1, 2, 3, 4, 5, 7)]
    W = inputs[6] if W_dim is None else fold(inputs[6], W_dim, size, 0)
    states = function.apply(*folded[:6], W, folded[6], inputs[8])
    z, c, m = (t.unflatten(into, (size, -1)) for t in states)
    return (z, c, m), (into, into, into)


def _cut(states: Tensor, fresh: Tensor | None) -> Tensor:
    """Zeros where fresh; a product would keep a NaN."""
    return states if fresh is None else states.masked_fill(fresh, 0)


def _tangent_steps(
    a_z: Tensor | None,
    a_c: Tensor | None,
    a_m: Tensor | None,
    K: Tensor,
    F: Tensor,
    R: Tensor,
    W: Tensor,
    fresh: Tensor | None,
) -> States:
    """``tangents`` by torch's ops, for devices without a kernel."""
    T, H = F.shape[0], F.shape[3]
    w = W.transpose(1, 2)
    a_zs, a_cs, a_ms, cuts = (_steps(t, T) for t in (a_z, a_c, a_m, fresh))
    K_is, K_fs, K_gs, K_os = (part.unbind(0) for part in K.split(H, 3))
    Fs, Rs = F.unbind(0), R.unbind(0)
    zs: list[Tensor] = []
    cs: list[Tensor] = []
    ms: list[Tensor] = []
    for t in range(T):
        z = a_zs[t]
        if t > 0:
            z = _add_product(z, _cut(ms[-1], cuts[t]), w)
        elif z is None:
            z = torch.zeros_like(K[0])
        z_i, z_f, z_g, z_o = z.split(H, 2)
        c = _add_scaled(a_cs[t], K_is[t], z_i).addcmul(K_fs[t], z_f).addcmul(K_gs[t], z_g)
        if t > 0:
            c = c.addcmul(Fs[t], _cut(cs[-1], cuts[t]))
        m = _add_scaled(a_ms[t], Rs[t], c).addcmul(K_os[t], z_o)
        zs.append(z)
        cs.append(c)
        ms.append(m)
    return _stack(zs, K), _stack(cs, F), _stack(ms, F)


def _adjoint_steps(
    b_z: Tensor | None,
    b_c: Tensor | None,
    b_m: Tensor | None,
    K: Tensor,
    F: Tensor,
    R: Tensor,
    W: Tensor,
    fresh: Tensor | None,
) -> States:
    """``adjoints``, likewise."""
    T = F.shape[0]
    b_zs, b_cs, b_ms, cuts = (_steps(t, T) for t in (b_z, b_c, b_m, fresh))
    Ks, Fs, Rs = K.unbind(0), F.unbind(0), R.unbind(0)
    dzs: list[Tensor] = []
    dcs: list[Tensor] = []
    dms: list[Tensor] = []
    for t in reversed(range(T)):
        dm, dc = b_ms[t], b_cs[t]
        if t + 1 < T:
            dm = _add_product(dm, _cut(dzs[-1], cuts[t + 1]), W)
            dc = _add_scaled(dc, Fs[t + 1], _cut(dcs[-1], cuts[t + 1]))
        elif dm is None:
            dm = torch.zeros_like(Rs[t])
        dc = _add_scaled(dc, Rs[t], dm)
        dz = _add_scaled(b_zs[t], Ks[t], torch.cat((dc, dc, dc, dm), 2))
        dzs.append(dz)
        dcs.append(dc)
        dms.append(dm)
    return _stack(dzs[::-1], K), _stack(dcs[::-1], F), _stack(dms[::-1], F)


def _steps(t: Tensor | None, T: int) -> tuple[Any, ...]:
    """Each step of t [T, ...], or None as often."""
    return (None,) * T if t is None else t.unbind(0)


def _stack(steps: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(steps) if steps else torch.zeros_like(like)


def _add_product(a: Tensor | None, b: Tensor, w: Tensor) -> Tensor:
    """a [D, B, n] + b [D, B, m] w [D, m, n]."""
    if a is None:
        return torch.bmm(b.to(w.dtype), w).to(b.dtype)
    if b.dtype == w.dtype:
        return torch.baddbmm(a, b, w)
    return a + torch.bmm(b.to(w.dtype), w)


def _add_scaled(a: Tensor | None, b: Tensor, c: Tensor) -> Tensor:
    """a + b c, elementwise."""
    return b * c if a is None else torch.addcmul(a, b, c)
