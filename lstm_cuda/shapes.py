"""Shapes and dtypes of what the ops of a layer return, also for graphs, which do not run them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulation and of the cell state."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def saved_gates_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the gates are kept for backward.

    On CUDA they take the place of their pre-activations, the result of a product in x's dtype.
    """
    return x.dtype if x.device.type == "cuda" else compute_dtype(x.dtype)


def sizes(x: Tensor, w_hh: Sequence[Tensor]) -> tuple[int, int, int, int, int]:
    """T, B, D, H, P."""
    T, B, _ = x.shape
    return T, B, len(w_hh), w_hh[0].shape[0] // 4, w_hh[0].shape[1]


def layer_forward_fake(
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
    packed: Tensor | None = None,
    packed_layout: int = 0,
    before: int = 0,
    after: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, B, D, H, P = sizes(x, w_hh)
    w = w_hh[0]  # x can be in another dtype (variant_ops.py)
    return (
        w.new_empty(T, B, D * P),
        w.new_empty(D, B, P),
        w.new_empty(D, B, H, dtype=w.dtype if c0 is None else c0.dtype),
        w.new_empty((T, B, D, 4 * H) if save else 0, dtype=saved_gates_dtype(w)),
        w.new_empty((T, B, D, H) if save or cells else 0, dtype=compute_dtype(w.dtype)),
    )


def layer_backward_fake(
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
    dgates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, B, D, H, P = sizes(x, w_hh)
    w = w_hh[0]
    return (
        x.new_empty(x.shape if need_dx else 0),
        w.new_empty((D, B, P) if h0 is not None else 0),
        w.new_empty(0) if c0 is None else c0.new_empty(D, B, H),
        w.new_empty((D, *w_ih[0].shape) if need_dw and w_ih else 0),
        w.new_empty((D, 4 * H, P) if need_dw else 0),
        w.new_empty((D, 4 * H) if need_dw and w_ih else 0),
        w.new_empty((D, P, H) if need_dw and w_hr else 0),
    )
