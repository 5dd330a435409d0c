"""Derivatives of a layer beyond its first backward pass, from what its run saved.

A layer is seen here as a function of x, h0, c0 and weights that gives y, h_n, c_n, and also the
gates and the c that it saves. Its backward pass is then a differentiable function of inputs and
results, so derivatives of any order follow, in either mode, without a run being repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import ops
from .recurrence import add, adjoints, after, before, outer_products, product, tangents
from .reference import without_autocast

Maybe = Tensor | None


class Run:
    """A run of a layer, with its inputs and results in the order of the recurrences.

    Args:
        x ... reversed: as for ``ops.layer_forward``.
        y, gates, c: as returned by it with ``save=True``.
    """

    def __init__(
        self,
        x: Tensor,
        w_ih: Sequence[Tensor],
        w_hh: Sequence[Tensor],
        w_hr: Sequence[Tensor],
        h0: Maybe,
        c0: Maybe,
        lengths: Maybe,
        reset: Maybe,
        reversed: int,
        y: Tensor,
        gates: Tensor,
        c: Tensor,
    ) -> None:
        self._dtype, self._compute = x.dtype, ops.compute_dtype(x.dtype)
        self._c_dtype = x.dtype if c0 is None else c0.dtype
        self._results = y, gates
        with without_autocast(x.device.type):
            D = len(w_hh)
            self._steps = steps = _Steps(x, D, lengths, reset, reversed)
            self._x = x if steps.valid is None else torch.where(steps.valid[:, 0], x, 0)
            self._w_ih, self._w_hh = torch.stack(tuple(w_ih)), torch.stack(tuple(w_hh))
            self._w_hr = torch.stack(tuple(w_hr)) if w_hr else None
            W = self._w_hh if self._w_hr is None else self._w_hh @ self._w_hr

            h = steps.arrange(y.unflatten(2, (D, -1))).to(self._compute)
            c = steps.arrange(c)
            self._h_before, c_before = steps.entering(h, h0), steps.entering(c, c0)
            i, f, g, o = steps.arrange(gates).to(self._compute).chunk(4, 3)
            s = torch.tanh(c)
            self._m = o * s
            self._slope = torch.cat((i - i * i, f - f * f, 1 - g * g, o - o * o), 3)
            K = self._slope * torch.cat((g, c_before, i, s), 3)
            self._coefficients = K, f, o - self._m * s, W, steps.fresh

    def gradients(
        self,
        dy: Maybe,
        dh_n: Maybe,
        dc_n: Maybe,
        dgates: Maybe,
        dc: Maybe,
        need_dx: bool,
        need_dw: bool,
    ) -> tuple[Tensor, ...]:
        """What ``ops.layer_backward`` returns, also from a gradient of the saved gates.

        Differentiable by all that is given here and by the run's inputs and results.
        """
        steps, compute = self._steps, self._compute
        _, F, _, _, fresh = self._coefficients
        with without_autocast(self._x.device.type):
            b_h = None
            if dy is not None:
                b_h = steps.arrange(dy.unflatten(2, (steps.D, -1))).to(compute)
            if dh_n is not None:
                b_h = add(b_h, steps.ending(dh_n.to(compute)))
            b_c = None if dc is None else steps.arrange(dc)
            if dc_n is not None:
                b_c = add(b_c, steps.ending(dc_n.to(compute)))
            b_z = None if dgates is None else steps.arrange(dgates).to(compute) * self._slope
            b_m = b_h if b_h is None or self._w_hr is None else product(b_h, self._w_hr)
            dz, dcells, _ = adjoints(b_z, b_c, b_m, *self._coefficients)

            dh_first = product(dz[:1], self._w_hh)
            dh0 = steps.at_start(dh_first, dh_n)
            dc0 = steps.at_start(F[:1] * dcells[:1], dc_n)
            dx = dw_ih = dw_hh = db = dw_hr = dz.new_empty(0)
            dz_x = steps.restore(dz).flatten(2).to(self._dtype)
            if need_dx:
                dx = _each_input(dz_x, self._input_weights(self._w_ih))
            if need_dw:
                dw_ih = self._input_products(dz_x)
                dw_hh = outer_products(dz, self._h_before, self._dtype)
                db = dz.sum((0, 2)).to(self._dtype)
                if self._w_hr is not None:
                    dh = add(b_h, after(product(dz, self._w_hh), fresh))
                    assert dh is not None
                    dw_hr = outer_products(dh, self._m, self._dtype)
            return dx, dh0.to(self._dtype), dc0.to(self._c_dtype), dw_ih, dw_hh, db, dw_hr

    def tangents(
        self,
        x: Maybe,
        h0: Maybe,
        c0: Maybe,
        w_ih: Sequence[Maybe],
        w_hh: Sequence[Maybe],
        bias: Sequence[Maybe],
        w_hr: Sequence[Maybe],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tangents of y, h_n, c_n, gates and c for those of the inputs, None for zeros.

        Differentiable by the tangents given and by the run's inputs and results.
        """
        steps, compute = self._steps, self._compute
        y, gates = self._results
        _, F, _, _, fresh = self._coefficients
        with without_autocast(self._x.device.type):
            inputs: Maybe = None
            for rows, w in ((x, self._w_ih), (self._x, _stack(w_ih))):
                if rows is not None and w is not None:
                    of_each = _each_input(rows, self._input_weights(w).transpose(1, 2))
                    inputs = add(inputs, of_each.unflatten(2, (steps.D, -1)))
            for part in (bias[: steps.D], bias[steps.D :]):
                if (d_b := _stack(part)) is not None:
                    inputs = add(inputs, d_b.expand_as(gates))
            a_z = None if inputs is None else steps.arrange(inputs).to(compute)
            if (d_hh := _stack(w_hh)) is not None:
                a_z = add(a_z, product(self._h_before, d_hh.transpose(1, 2)))
            if h0 is not None:
                entering = torch.bmm(h0, self._w_hh.transpose(1, 2)).to(compute)
                a_z = add(a_z, steps.beginning(entering))
            dh = None
            if (d_hr := _stack(w_hr)) is not None:
                dh = product(self._m, d_hr.transpose(1, 2))
                a_z = add(a_z, product(before(dh, fresh), self._w_hh.transpose(1, 2)))
            a_c = None
            if c0 is not None:
                a_c = F * steps.beginning(c0.to(compute))
            dz, dc, dm = tangents(a_z, a_c, None, *self._coefficients)

            dh = dm if self._w_hr is None else add(dh, product(dm, self._w_hr.transpose(1, 2)))
            assert dh is not None
            dy = steps.restore(dh).flatten(2).to(y.dtype)
            dgates = steps.restore(steps.mask(dz * self._slope)).to(gates.dtype)
            dh_n, dc_n = steps.last(dh, h0), steps.last(dc, c0)
            return dy, dh_n.to(y.dtype), dc_n.to(self._c_dtype), dgates, steps.restore(dc)

    def _input_weights(self, w_ih: Tensor) -> Tensor:
        """w_ih [D, 4H, I] as [n, D/n * 4H, I], for the n inputs that x holds side by side."""
        features = w_ih.shape[2]
        count = self._x.shape[2] // features if features > 0 else 1
        return w_ih.unflatten(0, (count, -1)).flatten(1, 2)

    def _input_products(self, dz: Tensor) -> Tensor:
        """dz^T x [D, 4H, I] over all rows, each recurrence's with its input."""
        count = self._input_weights(self._w_ih).shape[0]
        rows = (t.flatten(0, 1).unflatten(1, (count, -1)).transpose(0, 1) for t in (dz, self._x))
        return torch.bmm(next(rows).transpose(1, 2), next(rows)).view(self._w_ih.shape)


def _each_input(rows: Tensor, w: Tensor) -> Tensor:
    """rows [T, B, n*K] w [n, K, N], part by part: [T, B, n*N]."""
    if w.shape[0] == 1:
        return rows @ w[0]
    return torch.einsum("tbnk,nkm->tbnm", rows.unflatten(2, (w.shape[0], -1)), w).flatten(2)


def _stack(changes: Sequence[Maybe]) -> Maybe:
    """One tensor of those for each recurrence, zeros where there is none; None if there is none."""
    some = next((change for change in changes if change is not None), None)
    if some is None:
        return None
    zeros = torch.zeros_like(some)
    return torch.stack([zeros if change is None else change for change in changes])


class _Steps:
    """The steps of D recurrences in their own order: each row of each of them begins at step 0.

    Attributes:
        D: the number of recurrences.
        valid: [T, 1, B, 1], False past a row's end; None: nowhere.
        fresh: [T, D, B, 1], True where no state enters; None: nowhere.
    """

    def __init__(self, x: Tensor, D: int, lengths: Maybe, reset: Maybe, reversed: int) -> None:
        self._T, B, _ = x.shape
        self.D, self._reversed = D, reversed
        self.valid: Maybe = None
        self.fresh: Maybe = None
        self._lengths: Maybe = None
        if lengths is not None:
            self._lengths = lengths = lengths.clamp(0, self._T)
            step = torch.arange(self._T, device=x.device)[:, None]
            valid = step < lengths
            self.valid = valid[:, None, :, None]
            # When a step of a reversed recurrence happens, and at which step what happens when.
            self._times = torch.where(valid, lengths - 1 - step, step)
            self._rows = torch.arange(B, device=x.device)
        if reset is not None:
            # Backwards, the boundary before a step is the one marked at the step before it.
            turned = self._turn(reset)
            turned = torch.cat((torch.zeros_like(turned[:1]), turned[:-1]))
            rows = [turned if reversed >> d & 1 else reset for d in range(D)]
            self.fresh = torch.stack(rows, 1)[..., None]

    def arrange(self, t: Tensor) -> Tensor:
        """t [T, B, D, n], in time, as [T, D, B, n] in the steps' order, zero past a row's end."""
        return self.mask(self._turn_reversed(t.transpose(1, 2)))

    def restore(self, t: Tensor) -> Tensor:
        """The inverse of ``arrange``."""
        return self._turn_reversed(t).transpose(1, 2)

    def mask(self, t: Tensor) -> Tensor:
        """t [T, D, B, n], zero past a row's end."""
        return t if self.valid is None else torch.where(self.valid, t, 0)

    def entering(self, states: Tensor, initial: Maybe) -> Tensor:
        """The states [T, D, B, n] that enter the steps, ``initial`` [D, B, n] the first one."""
        entering = before(states, None)
        if initial is not None:
            first = initial[None].to(states.dtype)
            entering = torch.cat((first, states[:-1]))[: self._T]
        return self._usable(entering, slice(None))

    def beginning(self, initial: Tensor) -> Tensor:
        """[T, D, B, n]: ``initial`` [D, B, n] where it enters, else zeros."""
        return self._usable(pad(initial[None], (0, 0, 0, 0, 0, 0, 0, self._T - 1)), slice(None))

    def at_start(self, first: Tensor, final: Maybe) -> Tensor:
        """The gradient of an initial state.

        From ``first`` [1, D, B, n], or [0, ...] if T is 0, what arrives before the first step, and
        ``final``, the gradient of the final state, of those rows that have no step.
        """
        start = self._usable(first, slice(1)).sum(0)
        if final is None or (self._lengths is None and self._T > 0):
            return start
        return start + (final if self._lengths is None else torch.where(self._no_step(), final, 0))

    def ending(self, final: Tensor) -> Tensor:
        """[T, D, B, n]: ``final`` [D, B, n] at each row's last step, else zeros."""
        if self._lengths is None:
            return pad(final[None], (0, 0, 0, 0, 0, 0, self._T - 1, 0))
        step = torch.arange(self._T, device=final.device)[:, None]
        return torch.where((step == self._lengths - 1)[:, None, :, None], final, 0)

    def last(self, states: Tensor, initial: Maybe) -> Tensor:
        """[D, B, n]: the states at each row's last step, ``initial`` if it has none."""
        if self._T == 0:
            return states.sum(0) if initial is None else initial
        if self._lengths is None:
            return states[-1]
        last = states[(self._lengths - 1).clamp(min=0), :, self._rows].transpose(0, 1)
        return torch.where(self._no_step(), 0 if initial is None else initial, last)

    def _no_step(self) -> Tensor:
        assert self._lengths is not None
        return (self._lengths == 0)[:, None]

    def _usable(self, t: Tensor, steps: slice) -> Tensor:
        """t of these steps, zero where no state enters."""
        if self.valid is not None:
            t = torch.where(self.valid[steps], t, 0)
        return t if self.fresh is None else t.masked_fill(self.fresh[steps], 0)

    def _turn_reversed(self, t: Tensor) -> Tensor:
        """t [T, D, B, n] with those recurrences turned that run backwards."""
        if self._reversed == 0:
            return t
        parts = enumerate(t.unbind(1))
        return torch.stack([self._turn(p) if self._reversed >> d & 1 else p for d, p in parts], 1)

    def _turn(self, t: Tensor) -> Tensor:
        """t [T, B, ...] with the steps of each row in the opposite order."""
        return t.flip(0) if self._lengths is None else t[self._times, self._rows]
