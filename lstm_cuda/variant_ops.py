"""The registered ops for other cells than ``torch.nn.LSTM``'s."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, shapes
from .masks import Masks
from .reference import ACTIVATIONS, Cell

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}  # enum Activation's order


def _options(cell: Cell) -> tuple[int, int, int, int, float, float, float]:
    """The options as the ops take them (csrc/recurrence.h, CellOptions)."""
    forget = 1 if not cell.forget_gate else 2 if cell.coupled else 0
    return (
        forget,
        _NUMBERS[cell.recurrent_activation],
        _NUMBERS[cell.activation],
        _NUMBERS[cell.output_activation or cell.activation],
        0.0 if cell.cell_clip is None else float(cell.cell_clip),
        float(cell.zoneout[0]),
        float(cell.zoneout[1]),
    )


def variant_forward(
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    bias: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    save: bool,
    cells: bool,
    allow_tf32: bool,
    cell: Cell,
    peephole: Tensor | None,
    norm: Tensor | None,
    masks: Masks,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``ops.layer_forward`` for another cell; the meaning is ``reference.lstm_layer``'s.

    Args:
        x: as there; without w_ih, gates_x [T, B, D*4H] in ``shapes.compute_dtype``.
        w_ih: D tensors [4H, I], or none; without them there is no bias either.
        w_hh ... allow_tf32: as there.
        cell: its options, but for ``weight_dropout``.
        peephole: [D, 3, H] (w_ci, w_cf, w_co) or None.
        norm: [D, 6, H] or None: gains of w_hh h in blocks i, f, g, o, gain of c, shift of c. Needs
            a call without w_ih.
        masks: h_scale and, where zoneout's choices are drawn, their seed.
            This and the two before are in ``shapes.compute_dtype``.

    Returns:
        As there, then normed [T, B, D, 4H] and rstd [T, B, D], both [0] unless ``norm`` and
        ``save``.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = ops.outside_autocast(
        _forward, x.device.type,
        x, w_ih or None, w_hh, bias or None, w_hr or None, h0, c0, lengths, reset, reversed, save,
        cells, allow_tf32, *_options(cell), peephole, norm, masks.h_scale, masks.seed,
        masks.first_step,
    )  # fmt: skip
    return result


def variant_backward(
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
    cell: Cell,
    peephole: Tensor | None,
    norm: Tensor | None,
    masks: Masks,
    normed: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of ``variant_forward``; arguments as there and for ``ops.layer_backward``.

    Returns:
        As ``ops.layer_backward`` (dw_ih and db are [0] without w_ih), then those of ``peephole``
        and of ``norm``, [0] without them or unless ``need_dw``.
    """
    result: tuple[Tensor, ...] = ops.outside_autocast(
        _backward, x.device.type,
        dy, dh_n, dc_n, dc, x, w_ih or None, w_hh, w_hr or None, h0, c0, lengths, reset, reversed,
        y, gates, c, need_dx, need_dw, allow_tf32, *_options(cell), peephole, norm, masks.h_scale,
        masks.seed, masks.first_step, normed, rstd,
    )  # fmt: skip
    return result


def _forward_fake(
    x: Tensor,
    w_ih: Sequence[Tensor] | None,
    w_hh: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    w_hr: Sequence[Tensor] | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    save: bool,
    cells: bool,
    allow_tf32: bool,
    forget: int,
    recurrent_activation: int,
    activation: int,
    output_activation: int,
    cell_clip: float,
    zoneout_h: float,
    zoneout_c: float,
    peephole: Tensor | None,
    norm: Tensor | None,
    h_scale: Tensor | None,
    seed: Tensor | None,
    first_step: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    result = shapes.layer_forward_fake(
        x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, reversed, save, cells, False
    )
    gates, dtype = result[3], shapes.compute_dtype(w_hh[0].dtype)
    kept = save and norm is not None
    return (
        *result,
        gates.new_empty(gates.shape if kept else 0, dtype=dtype),
        gates.new_empty(gates.shape[:3] if kept else 0, dtype=dtype),
    )


def _backward_fake(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    w_ih: Sequence[Tensor] | None,
    w_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor] | None,
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
    forget: int,
    recurrent_activation: int,
    activation: int,
    output_activation: int,
    cell_clip: float,
    zoneout_h: float,
    zoneout_c: float,
    peephole: Tensor | None,
    norm: Tensor | None,
    h_scale: Tensor | None,
    seed: Tensor | None,
    first_step: int,
    normed: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, ...]:
    result = shapes.layer_backward_fake(
        dy, dh_n, dc_n, dc, x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, reversed, y, gates, c,
        need_dx, need_dw, False,
    )  # fmt: skip
    D, H = c.shape[2:]
    return (
        *result,
        c.new_empty((D, 3, H) if need_dw and peephole is not None else 0),
        c.new_empty((D, 6, H) if need_dw and norm is not None else 0),
    )


if ops.load_error is None:
    _forward = torch.ops.lstm_cuda.variant_forward.default
    _backward = torch.ops.lstm_cuda.variant_backward.default
    torch.library.register_fake("lstm_cuda::variant_forward", _forward_fake)
    torch.library.register_fake("lstm_cuda::variant_backward", _backward_fake)
