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

from .products import add, outer_products, product
from .recurrence import adjoints, tangents
from .recurrence_steps import after, before, entering, slopes
from .reference import without_autocast
from .shapes import compute_dtype

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
        self._dtype, self._compute = x.dtype, compute_dtype(x.dtype)
        self._c_dtype = x.dtype if c0 is None else c0.dtype
        self._y, self._gates, self._h0, self._c0 = y, gates, h0, c0
        with without_autocast(x.device.type):
            D = len(w_hh)
            self._steps = steps = _Steps(x, D, lengths, reset, reversed)
            self._x = x if steps.valid is None else torch.where(steps.valid[:, 0], x, 0)
            self._w_ih, self._w_hh = torch.stack(tuple(w_ih)), torch.stack(tuple(w_hh))
            self._w_hr = torch.stack(tuple(w_hr)) if w_hr else None
            features = self._w_ih.shape[2]  # x holds so many inputs side by side:
            self._count = x.shape[2] // features if features > 0 else 1
            W = self._w_hh if self._w_hr is None else self._w_hh @ self._w_hr
            self._run = (
                steps.arrange(gates).to(self._compute),
                steps.arrange(c),
                None if c0 is None else c0.to(self._compute),
                W,
            )

    def _inputs(self, x: Tensor) -> Tensor:
        """x [T, B, n*I] as every recurrence takes it: [T, D, B, I]."""
        D, features = self._w_ih.shape[0], self._w_ih.shape[2]
        each = x.unflatten(2, (self._count, 1, features)).expand(-1, -1, -1, D // self._count, -1)
        return self._steps.arrange(each.flatten(2, 3))

    def _each_input(self, dx: Tensor) -> Tensor:
        """The gradient [T, B, n*I] of x, from what each recurrence [T, B, D, I] gives it."""
        if self._count < self._steps.D:
            dx = dx.unflatten(2, (self._count, -1)).sum(3)
        return dx.flatten(2)

    def _h_before(self) -> Tensor:
        """h that enters each step, in y's dtype."""
        return entering(self._steps.by_recurrence(self._y), self._h0, self._steps.fresh)

    def _outputs(self) -> Tensor:
        """The unprojected output m."""
        gates, c, *_ = self._run
        return gates.chunk(4, 3)[3] * torch.tanh(c)

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
        gates, fresh = self._run[0], steps.fresh
        with without_autocast(self._x.device.type):
            b_h = None if dy is None else steps.by_recurrence(dy).to(compute)
            if dh_n is not None:
                b_h = add(b_h, steps.ending(dh_n.to(compute)))
            b_c = None if dc is None else steps.arrange(dc)
            if dc_n is not None:
                b_c = add(b_c, steps.ending(dc_n.to(compute)))
            b_gates = None if dgates is None else steps.arrange(dgates).to(compute)
            b_m = b_h if b_h is None or self._w_hr is None else product(b_h, self._w_hr)
            V = self._w_ih if need_dx else None
            dx, dz, dcells, _ = adjoints(None, b_gates, b_c, b_m, *self._run, V, fresh)

            dh0 = dc0 = dw_ih = dw_hh = db = dw_hr = dz.new_empty(0)
            if self._h0 is not None:
                dh0 = steps.at_start(product(dz[:1], self._w_hh), dh_n)
            if self._c0 is not None:
                f = gates.chunk(4, 3)[1]
                dc0 = steps.at_start(f[:1] * dcells[:1], dc_n)
            if need_dx:
                dx = self._each_input(steps.restore(dx))
            if need_dw:
                dw_ih = outer_products(dz, self._inputs(self._x), self._dtype)
                dw_hh = outer_products(dz, self._h_before(), self._dtype)
                db = dz.sum((0, 2)).to(self._dtype)
                if self._w_hr is not None:
                    dh = add(b_h, after(product(dz, self._w_hh), fresh))
                    assert dh is not None
                    dw_hr = outer_products(dh, self._outputs(), self._dtype)
            dtype = self._dtype
            return dx.to(dtype), dh0.to(dtype), dc0.to(self._c_dtype), dw_ih, dw_hh, db, dw_hr

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
        steps, compute, y = self._steps, self._compute, self._y
        gates, fresh = self._run[0], steps.fresh
        with without_autocast(self._x.device.type):
            a_x = None if x is None else self._inputs(x).to(compute)
            a_z: Maybe = None
            if (d_ih := _stack(w_ih)) is not None:
                a_z = product(self._inputs(self._x).to(compute), d_ih.transpose(1, 2))
            for part in (bias[: steps.D], bias[steps.D :]):
                if (d_b := _stack(part)) is not None:
                    a_z = add(a_z, steps.mask(d_b.to(compute)[:, None].expand_as(gates)))
            if (d_hh := _stack(w_hh)) is not None:
                a_z = add(a_z, product(self._h_before().to(compute), d_hh.transpose(1, 2)))
            if h0 is not None:
                entering = torch.bmm(h0, self._w_hh.transpose(1, 2)).to(compute)
                a_z = add(a_z, steps.beginning(entering))
            dh = None
            if (d_hr := _stack(w_hr)) is not None:
                dh = product(self._outputs(), d_hr.transpose(1, 2))
                a_z = add(a_z, product(before(dh, fresh), self._w_hh.transpose(1, 2)))
            a_c = None
            if c0 is not None:
                a_c = gates.chunk(4, 3)[1] * steps.beginning(c0.to(compute))
            dz, dc, dm = tangents(a_x, a_z, a_c, None, *self._run, self._w_ih, fresh)

            dh = dm if self._w_hr is None else add(dh, product(dm, self._w_hr.transpose(1, 2)))
            assert dh is not None
            dy = steps.restore(dh).flatten(2).to(y.dtype)
            dgates = steps.restore(steps.mask(dz * slopes(gates))).to(self._gates.dtype)
            dh_n, dc_n = steps.last(dh, h0), steps.last(dc, c0)
            return dy, dh_n.to(y.dtype), dc_n.to(self._c_dtype), dgates, steps.restore(dc)


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
        fresh: [T, D, B, 1], True where no state enters, past a row's end too; None: nowhere.
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
        if self.valid is not None:
            past = ~self.valid
            self.fresh = past.expand(-1, D, -1, -1) if self.fresh is None else self.fresh | past

    def arrange(self, t: Tensor) -> Tensor:
        """t [T, B, D, n], in time, as [T, D, B, n] in the steps' order, zero past a row's end."""
        return self.mask(self._turn_reversed(t.transpose(1, 2)))

    def by_recurrence(self, y: Tensor) -> Tensor:
        """``arrange`` for y [T, B, D*n]."""
        return self.arrange(y.unflatten(2, (self.D, -1)))

    def restore(self, t: Tensor) -> Tensor:
        """The inverse of ``arrange``."""
        return self._turn_reversed(t).transpose(1, 2)

    def mask(self, t: Tensor) -> Tensor:
        """t [T, D, B, n], zero past a row's end."""
        return t if self.valid is None else torch.where(self.valid, t, 0)

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
