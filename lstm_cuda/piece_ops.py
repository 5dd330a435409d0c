"""The registered op for the backward pass of a layer in pieces of a sequence, on CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .shapes import compute_dtype, sizes


def in_pieces(x: Tensor) -> bool:
    """Whether ``piece_backward`` is there for x's device."""
    return x.device.type == "cpu"


def piece_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    y: Tensor,
    gates: Tensor,
    c: Tensor,
    need_dx: bool,
    need_dw: bool,
    before: int,
    after: int,
    carry: Tensor | None,
    sums: Tensor,
) -> tuple[Tensor, ...]:
    """``ops.layer_backward`` on CPUs for a piece of a sequence, the last piece first.

    What the pieces give, together, is to the bit what a call for all steps gives.

    Args:
        dy ... need_dw: as for ``ops.layer_backward``, c0 and so dc_n in ``shapes.compute_dtype``;
            dh_n for rows whose last step or only state is here, zeros for all others.
        before, after: as for ``ops.layer_forward``.
        carry: what the last call returned; None for the first.
        sums: from ``piece_sums``, written by each call and read by the next.

    Returns:
        As ``ops.layer_backward`` and carry [D, B, 4H], what crosses to the steps before, all in
        ``shapes.compute_dtype``. Unless ``before`` is 0, dh0 and the gradients of the weights,
        those of all pieces, are [0]; if it is, carry.
    """
    result: tuple[Tensor, ...] = _piece_backward(
        dy, dh_n, dc_n, dc, x, w_ih, w_hh, w_hr or None, h0, c0, lengths, reset, reversed, y,
        gates, c, need_dx, need_dw, before, after, carry, sums,
    )  # fmt: skip
    return result


def piece_sums(
    x: Tensor, w_ih: Sequence[Tensor], w_hh: Sequence[Tensor], w_hr: Sequence[Tensor]
) -> Tensor:
    """Room for the ``sums`` of ``piece_backward``, x being that of the whole sequence."""
    T, B, D, H, P = sizes(x, w_hh)
    parts: Any = ops.plan_cpu(T, B, D, x.shape[2], H, P, x.dtype, True)["parts"]
    weights = sum(w.numel() for w in (*w_ih, *w_hh, *w_hr)) + 4 * H * D
    return x.new_empty(2 * parts * weights, dtype=compute_dtype(x.dtype))


if ops.load_error is None:
    _piece_backward = torch.ops.lstm_cuda.piece_backward.default
