"""The specification: one LSTM layer with every option, in plain differentiable torch.

Nothing here is meant to be fast. In float64 it is the truth that every kernel is tested against,
and it is what ``backend="torch"`` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import Masks, draw, zoneout_choices

# Keras 3 and torch define the hard sigmoid with slope 1/6, ONNX and Keras 2 with slope 1/5.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    # F.hardsigmoid's constants have 24 bits, in float64, too.
    "hard_sigmoid_keras": lambda z: (z / 6 + 0.5).clamp(0.0, 1.0),
    "hard_sigmoid_onnx": lambda z: (0.2 * z + 0.5).clamp(0.0, 1.0),
    "hard_tanh": F.hardtanh,
    "softsign": F.softsign,
    "identity": lambda z: z,
}
NORM_EPS = 1e-5


@dataclass(frozen=True)
class Cell:
    """What the cell computes, beyond its weights. The defaults are ``torch.nn.LSTM``'s cell.

    Args:
        forget_gate: False gives the 1997 cell, ``c_t = c_{t-1} + i g``; the forget block of the
            weights is unused.
        coupled: ``f = 1 - i`` (Greff et al. 2017); the forget block of the weights is unused.
        activation: name in ``ACTIVATIONS`` for the candidate ``g``.
        recurrent_activation: name for the gates ``i``, ``f``, ``o``.
        output_activation: name for the activation of ``c_t``; None is the same as ``activation``.
        recurrent_dropout: probability; one mask per sequence on ``h_{t-1}`` (Gal and Ghahramani
            2016).
        zoneout: probabilities for ``(h, c)`` (Krueger et al. 2017).
        weight_dropout: probability; DropConnect on ``w_hh`` (Merity et al. 2018).
        cell_clip: bound on ``|c_t|``; None is no bound.

    Raises:
        ValueError: an option is unknown or out of range, or two exclude each other.

    Attributes:
        options: the names of those that differ from the defaults.
    """

    forget_gate: bool = True
    coupled: bool = False
    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    output_activation: str | None = None
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    weight_dropout: float = 0.0
    cell_clip: float | None = None
    options: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("activation", "recurrent_activation", "output_activation"):
            _check_activation(name, getattr(self, name))
        if not isinstance(self.zoneout, (tuple, list)) or len(self.zoneout) != 2:
            raise ValueError(f"zoneout must be two probabilities (h, c); got {self.zoneout!r}")
        for name, value in (
            ("recurrent_dropout", self.recurrent_dropout),
            ("zoneout", self.zoneout[0]),
            ("zoneout", self.zoneout[1]),
            ("weight_dropout", self.weight_dropout),
        ):
            check_probability(name, value)
        if self.cell_clip is not None and (not _is_number(self.cell_clip) or self.cell_clip <= 0):
            raise ValueError(f"cell_clip must be a number above 0, or None; got {self.cell_clip!r}")
        if self.coupled and not self.forget_gate:
            raise ValueError("coupled=True makes a forget gate of i; it excludes forget_gate=False")
        changed = (f.name for f in fields(self) if f.init and getattr(self, f.name) != f.default)
        object.__setattr__(self, "options", tuple(changed))


def check_probability(name: str, value: object) -> None:
    """Raise ValueError unless the value is a number in [0, 1]."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1]; got {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_activation(name: str, value: str | None) -> None:
    if value == "hard_sigmoid":
        raise ValueError(
            f'{name}="hard_sigmoid" has two meanings: "hard_sigmoid_keras" (Keras 3, torch; slope '
            '1/6) and "hard_sigmoid_onnx" (ONNX, Keras 2; slope 1/5)'
        )
    if value not in ACTIVATIONS and not (value is None and name == "output_activation"):
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{name} must be one of {known}; got {value!r}")


PLAIN = Cell()


def lstm_layer(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reversed: int = 0,
    cell: Cell = PLAIN,
    peephole: Sequence[Sequence[Tensor]] | None = None,
    layer_norm: Sequence[Sequence[Tensor]] | None = None,
    training: bool = False,
    truncate: int | None = None,
    masks: Masks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer of D independent recurrences over the same input.

    With ``z = w_ih x_t + b_ih + w_hh h_{t-1} + b_hh`` in blocks i, f, g, o (Hochreiter and
    Schmidhuber 1997, Gers et al. 2000)::

        i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)
        c_t = f c_{t-1} + i g                                   h_t = w_hr (o tanh(c_t))

    Projection ``w_hr``: Sak et al. 2014. Peepholes (Gers and Schmidhuber 2000): ``z_i += w_ci
    c_{t-1}``, ``z_f += w_cf c_{t-1}``, ``z_o += w_co c_t``. Layer normalisation (Ba et al. 2016,
    equations 20 to 22): ``z = LN(w_ih x_t) + LN(w_hh h_{t-1}) + b_ih + b_hh`` over all 4H, and
        ``tanh(LN(c_t))``.
    Zoneout keeps ``h_{t-1}`` and ``c_{t-1}`` at random; ``h_t``'s candidate sees the new ``c``, not
    the kept one.

    Args:
        x: [T, B, I].
        weights: for each recurrence ``[w_ih [4H, I], w_hh [4H, P], b_ih [4H], b_hh [4H], w_hr [P,
            H]]``, without the biases or the projection where there are none. Where w_ih is None,
            x is [T, B, D*4H], what it and the biases would bring.
        h0: [D, B, P], or None for zeros.
        c0: [D, B, H], or None for zeros; in x's dtype or the compute dtype.
        lengths: [B] int64. Row b stops after ``lengths[b]`` steps: outputs past them are 0, the
            final state is that of the last step, a reversed recurrence starts there.
        reset: [T, B] bool. True at t: no state passes between t-1 and t, in either direction of
            time.
        reversed: bit d set: recurrence d runs backwards in time.
        cell: the variant of the cell.
        peephole: for each recurrence ``[w_ci, w_cf, w_co]``, each [H].
        layer_norm: for each recurrence the gains ``[ih [4H], hh [4H], c [H]]`` and, optionally, the
            shift of c [H].
        training: draw the random masks; otherwise dropout is off and zoneout takes its expectation.
        truncate: no gradient of the state passes between t-1 and t where t is a multiple of it, in
            either direction of time; the state itself does.
        masks: what ``training`` would draw, drawn before, and w_hh have been through
            ``weight_dropout``.

    Returns:
        y [T, B, D*P] and h_n [D, B, P] in x's dtype; c_n [D, B, H] in c0's, or x's without c0;
        cells [T, B, D, H] in the compute dtype (float32 for 16-bit x), 0 past a row's length.
    """
    dtype = weights[0][1].dtype
    compute = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    D = len(weights)
    if training and masks is None:
        weights, masks = draw(cell, weights, x.shape[1], compute)
    valid = None
    if lengths is not None:
        valid = valid_steps(x, lengths)
        x = without_padding(x, valid)
    with without_autocast(x.device.type):
        keeps = [_zoneout(cell, which, masks, x, weights) for which in (0, 1)]
        results = [
            _recurrence(
                input_gates(
                    x if row[0] is not None else x.chunk(D, -1)[d],
                    row,
                    None if layer_norm is None else layer_norm[d][0],
                    compute,
                ),
                row[1].to(compute),
                row[-1].to(compute) if len(row) in (3, 5) else None,
                None if h0 is None else h0[d].to(compute),
                None if c0 is None else c0[d].to(compute),
                valid,
                reset,
                bool(reversed >> d & 1),
                cell,
                None if peephole is None else [w.to(compute) for w in peephole[d]],
                None if layer_norm is None else [w.to(compute) for w in layer_norm[d][1:]],
                None if masks is None or masks.h_scale is None else masks.h_scale[d],
                [None if keep is None else keep[:, :, d].to(compute) for keep in keeps],
                truncate,
            )
            for d, row in enumerate(weights)
        ]
    y, h_n, c_n, cells = zip(*results, strict=True)
    return (
        torch.cat(y, -1).to(dtype),
        torch.stack(h_n).to(dtype),
        torch.stack(c_n).to(dtype if c0 is None else c0.dtype),
        torch.stack(cells, 2),
    )


def valid_steps(x: Tensor, lengths: Tensor) -> Tensor:
    """Which steps of x [T, B, I] are within their row's length: [T, B] bool."""
    T = x.shape[0]
    return torch.arange(T, device=x.device)[:, None] < lengths.clamp(0, T)


def without_padding(x: Tensor, valid: Tensor) -> Tensor:
    """x with zeros elsewhere: what stands there, NaN included, stays out of every product."""
    return torch.where(valid[:, :, None], x, 0)


def input_gates(
    x: Tensor, row: Sequence[Tensor], gain: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The part of the pre-activations that the input and the biases bring, [T, B, 4H].

    Without w_ih (None), x is that.
    """
    if row[0] is None:
        return x
    bias = None if len(row) < 4 else row[2].to(dtype) + row[3].to(dtype)
    w_ih = row[0].to(dtype)
    if gain is None:
        return F.linear(x.to(dtype), w_ih, bias)
    gates_x = F.linear(x.to(dtype), w_ih)
    return F.layer_norm(gates_x, gates_x.shape[-1:], gain.to(dtype), bias, NORM_EPS)


def _recurrence(
    gates_x: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    valid: Tensor | None,
    reset: Tensor | None,
    backwards: bool,
    cell: Cell,
    peephole: Sequence[Tensor] | None,
    layer_norm: Sequence[Tensor] | None,
    h_scale: Tensor | None,
    keeps: Sequence[Tensor | None],
    truncate: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One recurrence of ``lstm_layer``: y [T, B, P], h_n [B, P], c_n [B, H], cells [T, B, H]."""
    T, B, _ = gates_x.shape
    H, P = w_hh.shape[0] // 4, w_hh.shape[1]
    h = gates_x.new_zeros(B, P) if h is None else h
    c = gates_x.new_zeros(B, H) if c is None else c
    keep_h, keep_c = keeps

    ys: list[Tensor] = [gates_x.new_zeros(B, P)] * T
    cells: list[Tensor] = [gates_x.new_zeros(B, H)] * T
    gates_x_t = gates_x.unbind(0)
    for t in range(T - 1, -1, -1) if backwards else range(T):
        # The boundary that a step crosses is reset[t] forwards in time; backwards it is reset[t +
        # 1], if the row has that step.
        cut = None
        if reset is not None and not backwards:
            cut = reset[t]
        elif reset is not None and t + 1 < T:
            cut = reset[t + 1] if valid is None else reset[t + 1] & valid[t + 1]
        h_prev, c_prev = (h, c) if cut is None else (_zero(h, cut), _zero(c, cut))
        after = t + 1 if backwards else t
        if truncate is not None and after % truncate == 0 and 0 < after < T:
            rows = None if valid is None else valid[after]
            h_prev, c_prev = _without_gradient(h_prev, rows), _without_gradient(c_prev, rows)
        gates_h = F.linear(h_prev if h_scale is None else h_prev * h_scale, w_hh)
        if layer_norm is not None:
            gates_h = F.layer_norm(gates_h, (4 * H,), layer_norm[0], None, NORM_EPS)
        h_t, c_t = _step(gates_x_t[t] + gates_h, c_prev, w_hr, cell, peephole, layer_norm)
        if keep_h is not None:
            h_t = keep_h[t] * h_prev + (1 - keep_h[t]) * h_t
        if keep_c is not None:
            c_t = keep_c[t] * c_prev + (1 - keep_c[t]) * c_t
        if valid is None:
            h, c = ys[t], cells[t] = h_t, c_t
        else:
            ended = ~valid[t]
            ys[t], cells[t] = _zero(h_t, ended), _zero(c_t, ended)
            # h, not h_prev: a row that has ended keeps its state whatever stands in reset past its
            # length.
            h = torch.where(ended[:, None], h, h_t)
            c = torch.where(ended[:, None], c, c_t)
    if T == 0:  # empty, but differentiable as ever
        return gates_x[..., :P], h, c, gates_x[..., :H]
    return torch.stack(ys), h, c, torch.stack(cells)


def _step(
    z: Tensor,
    c_prev: Tensor,
    w_hr: Tensor | None,
    cell: Cell,
    peephole: Sequence[Tensor] | None,
    layer_norm: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """h_t [B, P] and c_t [B, H] of one recurrence, from pre-activations z [B, 4H] and c_{t-1}."""
    gate = ACTIVATIONS[cell.recurrent_activation]
    z_i, z_f, z_g, z_o = z.chunk(4, 1)
    if peephole is not None:
        z_i = z_i + peephole[0] * c_prev
        z_f = z_f + peephole[1] * c_prev
    i = gate(z_i)
    added = i * ACTIVATIONS[cell.activation](z_g)
    if not cell.forget_gate:
        c = c_prev + added
    else:
        c = (1 - i if cell.coupled else gate(z_f)) * c_prev + added
    if cell.cell_clip is not None:
        c = c.clamp(-cell.cell_clip, cell.cell_clip)
    if peephole is not None:
        z_o = z_o + peephole[2] * c
    shown = c
    if layer_norm is not None:
        shift = layer_norm[2] if len(layer_norm) == 3 else None
        shown = F.layer_norm(c, c.shape[-1:], layer_norm[1], shift, NORM_EPS)
    h = gate(z_o) * ACTIVATIONS[cell.output_activation or cell.activation](shown)
    return (h if w_hr is None else F.linear(h, w_hr)), c


def _zoneout(
    cell: Cell,
    which: int,
    masks: Masks | None,
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
) -> Tensor | None:
    """How much of the previous h (0) or c (1) to keep, [T, B, D, n]: 0 or 1, or the mean."""
    probability = cell.zoneout[which]
    if probability == 0:
        return None
    T, B, _ = x.shape
    G, P = weights[0][1].shape
    shape = (T, B, len(weights), (P, G // 4)[which])
    if masks is None or masks.seed is None:
        return x.new_full(shape, probability)
    return zoneout_choices(masks.seed, which, shape, probability, masks.first_step)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """The dtypes in here are chosen; autocast would choose again."""
    if device_type == "meta":  # has no autocast
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _zero(state: Tensor, rows: Tensor) -> Tensor:
    """The state [B, n] with the marked rows [B] at 0. A product would keep a NaN."""
    return torch.where(rows[:, None], 0, state)


def _without_gradient(state: Tensor, rows: Tensor | None) -> Tensor:
    """The state [B, n], detached in the marked rows [B]; None: in all."""
    return state.detach() if rows is None else torch.where(rows[:, None], state.detach(), state)
