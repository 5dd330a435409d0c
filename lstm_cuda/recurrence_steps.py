"""The recurrence of ``recurrence.py`` in torch's ops: for devices without a kernel, and
differentiable, for derivatives of any order.

Shapes are those there. K, F and R are the coefficients that the cells of a run give::

    c[t] = a_c[t] + F[t] c[t-1] + K_i z_i[t] + K_f z_f[t] + K_g z_g[t]
    m[t] = a_m[t] + R[t] c[t] + K_o z_o[t]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

States = tuple[Tensor, Tensor, Tensor]


class Coefficients(NamedTuple):
    """Of changes of pre-activations: ``slope`` [T, D, B, 4H] in gates, and K, F, R."""

    slope: Tensor
    K: Tensor
    F: Tensor
    R: Tensor


def coefficients(
    gates: Tensor, cells: Tensor, c0: Tensor | None, fresh: Tensor | None
) -> Coefficients:
    """From the cells of a run."""
    i, f, g, o = gates.chunk(4, 3)
    s = torch.tanh(cells)
    slope = slopes(gates)
    K = slope * torch.cat((g, entering(cells, c0, fresh), i, s), 3)
    return Coefficients(slope, K, f, o * (1 - s * s))


def slopes(gates: Tensor) -> Tensor:
    """The derivatives of activated gates by what they were before."""
    i, f, g, o = gates.chunk(4, 3)
    return torch.cat((i - i * i, f - f * f, 1 - g * g, o - o * o), 3)


def coefficient_changes(
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    fresh: Tensor | None,
    dgates: Tensor | None,
    dcells: Tensor | None,
    dc0: Tensor | None,
) -> Coefficients:
    """The changes of ``coefficients`` with those of its inputs, None for zeros."""
    dgates = torch.zeros_like(gates) if dgates is None else dgates
    dcells = torch.zeros_like(cells) if dcells is None else dcells
    i, _, g, o = gates.chunk(4, 3)
    di, df, dg, do = dgates.chunk(4, 3)
    s = torch.tanh(cells)
    ds = (1 - s * s) * dcells
    dslope = _second_slopes(gates) * dgates
    dK = dslope * torch.cat((g, entering(cells, c0, fresh), i, s), 3)
    dK = dK + slopes(gates) * torch.cat((dg, entering(dcells, dc0, fresh), di, ds), 3)
    return Coefficients(dslope, dK, df, do * (1 - s * s) - 2 * o * s * ds)


def cell_gradients(
    source_gates: Tensor | None,
    dc: Tensor,
    dm: Tensor,
    z: Tensor,
    change_c: Tensor,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients, by gates, cells and c0, of what is linear in tangents and in adjoints.

    Args:
        source_gates: that of the adjoints.
        dc, dm: the adjoints.
        z, change_c: the tangents.
        gates, cells, c0, fresh: of the run.
    """
    i, _, g, o = gates.chunk(4, 3)
    s = torch.tanh(cells)
    z_i, z_f, z_g, z_o = (slopes(gates) * z).chunk(4, 3)
    by_gates = torch.cat((g * dc, entering(cells, c0, fresh) * dc, i * dc, s * dm), 3)
    if source_gates is not None:
        by_gates = by_gates + source_gates
    through_tanh = dm * (1 - s * s)
    by_coefficients = (dc * z_g, dc * before(change_c, fresh), dc * z_i, through_tanh * change_c)
    dgates = by_gates * _second_slopes(gates) * z + torch.cat(by_coefficients, 3)
    dcells = through_tanh * (z_o - 2 * s * o * change_c) + after(dc * z_f, fresh)
    dc0 = None if c0 is None else cut((dc * z_f)[:1], None if fresh is None else fresh[:1]).sum(0)
    return dgates, dcells, dc0


def _second_slopes(gates: Tensor) -> Tensor:
    """The derivatives of ``slopes`` by the gates."""
    i, f, g, o = gates.chunk(4, 3)
    return torch.cat((1 - 2 * i, 1 - 2 * f, -2 * g, 1 - 2 * o), 3)


def before(states: Tensor, fresh: Tensor | None) -> Tensor:
    """The state [T, D, B, n] that enters each step; into the first and the fresh ones, zero."""
    return entering(states, None, fresh)


def entering(states: Tensor, initial: Tensor | None, fresh: Tensor | None) -> Tensor:
    """The same, with ``initial`` [D, B, n] into the first step."""
    if len(states) == 0:
        return states
    if initial is None:
        return cut(pad(states[:-1], (0, 0, 0, 0, 0, 0, 1, 0)), fresh)
    return cut(torch.cat((initial[None], states[:-1])), fresh)


def after(states: Tensor, fresh: Tensor | None) -> Tensor:
    """The transpose of ``before``."""
    if len(states) == 0:
        return states
    return pad(cut(states, fresh)[1:], (0, 0, 0, 0, 0, 0, 0, 1))


def cut(states: Tensor, fresh: Tensor | None) -> Tensor:
    """Zeros where fresh; a product would keep a NaN."""
    return states if fresh is None else states.masked_fill(fresh, 0)


def tangent_steps(
    a_z: Tensor | None,
    a_c: Tensor | None,
    a_m: Tensor | None,
    K: Tensor,
    F: Tensor,
    R: Tensor,
    W: Tensor,
    fresh: Tensor | None,
) -> States:
    """z, c and m of ``recurrence.tangents``."""
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
            z = _add_product(z, cut(ms[-1], cuts[t]), w)
        elif z is None:
            z = torch.zeros_like(K[0])
        z_i, z_f, z_g, z_o = z.split(H, 2)
        c = _add_scaled(a_cs[t], K_is[t], z_i).addcmul(K_fs[t], z_f).addcmul(K_gs[t], z_g)
        if t > 0:
            c = c.addcmul(Fs[t], cut(cs[-1], cuts[t]))
        m = _add_scaled(a_ms[t], Rs[t], c).addcmul(K_os[t], z_o)
        zs.append(z)
        cs.append(c)
        ms.append(m)
    return _stack(zs, K), _stack(cs, F), _stack(ms, F)


def adjoint_steps(
    b_z: Tensor | None,
    b_c: Tensor | None,
    b_m: Tensor | None,
    K: Tensor,
    F: Tensor,
    R: Tensor,
    W: Tensor,
    fresh: Tensor | None,
) -> States:
    """dz, dc and dm of ``recurrence.adjoints``, its source for the gates being part of b_z."""
    T = F.shape[0]
    b_zs, b_cs, b_ms, cuts = (_steps(t, T) for t in (b_z, b_c, b_m, fresh))
    Ks, Fs, Rs = K.unbind(0), F.unbind(0), R.unbind(0)
    dzs: list[Tensor] = []
    dcs: list[Tensor] = []
    dms: list[Tensor] = []
    for t in reversed(range(T)):
        dm, dc = b_ms[t], b_cs[t]
        if t + 1 < T:
            dm = _add_product(dm, cut(dzs[-1], cuts[t + 1]), W)
            dc = _add_scaled(dc, Fs[t + 1], cut(dcs[-1], cuts[t + 1]))
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
