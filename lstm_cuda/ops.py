"""The registered ops: loading, typed wrappers, and the shapes they give (fake implementations)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_HOW_TO_BUILD = "build it with `pip install --no-build-isolation -v .` in a checkout"

load_error: str | None = None
try:
    _C: Any = importlib.import_module("lstm_cuda._C")
except ImportError as error:
    load_error = (
        f"lstm_cuda's compiled part could not be loaded under torch {torch.__version__} ({error}); "
        f'{_HOW_TO_BUILD}. backend="torch" works without it.'
    )


def build_info() -> dict[str, object]:
    """What this build was made of and for.

    Returns:
        ``torch_version`` it was built with, ``cuda`` (kernels compiled in), ``cpu_capabilities``
        compiled in, ``compiler``, and ``cpu_capability``, the one in use.

    Raises:
        RuntimeError: the compiled part is missing or does not fit this torch.
    """
    require("cpu")
    return {**_C.build_info(), "cpu_capability": _C.cpu_capability()}


def plan(
    T: int, B: int, D: int, features: int, H: int, P: int, dtype: torch.dtype, backward: bool
) -> dict[str, object]:
    """What the CPU path does for a layer of these sizes, with torch's number of threads."""
    require("cpu")
    name = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    result: dict[str, object] = _C.plan(T, B, D, features, H, P, name, threads, backward)
    return result


def require(device_type: str) -> None:
    """Raise unless the fused op can run on a device of this type.

    Raises:
        RuntimeError: the compiled part is missing, or was built without kernels for the device.
    """
    if load_error is not None:
        raise RuntimeError(load_error)
    if device_type == "cuda" and not _C.build_info()["cuda"]:
        raise RuntimeError(
            "this build of lstm_cuda has no CUDA kernels; with a CUDA toolkit and a CUDA build of "
            f"torch, {_HOW_TO_BUILD} (LSTM_CUDA_BUILD=cuda insists on it). "
            'backend="torch" runs on any device.'
        )
    if device_type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(
            f"lstm_cuda has no kernels for {device_type} tensors; "
            'backend="torch" runs on any device.'
        )


def layer_forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer of D recurrences; the meaning is ``reference.lstm_layer``'s.

    Args:
        x: [T, B, I], any strides.
        w_ih: D tensors [4H, I].
        w_hh: D tensors [4H, P].
        bias: none, or 2D tensors [4H]: ``b_ih`` of each recurrence, then ``b_hh`` of each.
        w_hr: none (then P = H), or D tensors [P, H].
        h0: [D, B, P] or None for zeros.
        c0: [D, B, H] or None for zeros.
        lengths: [B] int64 on x's device, or None.
        reset: [T, B] bool, or None.
        reversed: bit d set: recurrence d runs backwards in time.
        save: keep what backward needs.
        cells: keep c.

    Returns:
        y [T, B, D*P] contiguous, h_n [D, B, P], c_n [D, B, H] in x's dtype; gates [T, B, D, 4H]
        (activated i, f, g, o; [0] unless ``save``) and c [T, B, D, H] ([0] unless ``save`` or
        ``cells``) in the compute dtype, float32 for 16-bit x.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _forward(
        x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, reversed, save, cells
    )
    return result


def layer_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``layer_forward``; what it saved is only read.

    Args:
        dy, dh_n, dc_n, dc: gradients of y, h_n, c_n and c; None where there is none.
        x ... reversed: as given to ``layer_forward``.
        y, gates, c: as returned by it with ``save=True``.
        need_dx: compute dx.
        need_dw: compute the gradients of the weights.

    Returns:
        dx [T, B, I] ([0] unless ``need_dx``), dh0 [D, B, P] and dc0 [D, B, H] ([0] without h0, c0),
        dw_ih [D, 4H, I], dw_hh [D, 4H, P], db [D, 4H] (of either bias), dw_hr [D, P, H] ([0]
        without projection); the last four are [0] unless ``need_dw``. All in x's dtype.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = _backward(
        dy, dh_n, dc_n, dc, x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, reversed, y, gates, c,
        need_dx, need_dw,
    )  # fmt: skip
    return result


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulation and of the cell state."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _sizes(x: Tensor, w_hh: Sequence[Tensor]) -> tuple[int, int, int, int, int]:
    T, B, _ = x.shape
    return T, B, len(w_hh), w_hh[0].shape[0] // 4, w_hh[0].shape[1]


def _layer_forward_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, B, D, H, P = _sizes(x, w_hh)
    saved = compute_dtype(x.dtype)
    return (
        x.new_empty(T, B, D * P),
        x.new_empty(D, B, P),
        x.new_empty(D, B, H),
        x.new_empty((T, B, D, 4 * H) if save else 0, dtype=saved),
        x.new_empty((T, B, D, H) if save or cells else 0, dtype=saved),
    )


def _layer_backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, B, D, H, P = _sizes(x, w_hh)
    features = x.shape[2]
    return (
        x.new_empty((T, B, features) if need_dx else 0),
        x.new_empty((D, B, P) if h0 is not None else 0),
        x.new_empty((D, B, H) if c0 is not None else 0),
        x.new_empty((D, 4 * H, features) if need_dw else 0),
        x.new_empty((D, 4 * H, P) if need_dw else 0),
        x.new_empty((D, 4 * H) if need_dw else 0),
        x.new_empty((D, P, H) if need_dw and w_hr else 0),
    )


if load_error is None:
    # Looked up once: the three lookups by name cost as much as a check of all arguments.
    _forward = torch.ops.lstm_cuda.layer_forward.default
    _backward = torch.ops.lstm_cuda.layer_backward.default
    torch.library.register_fake("lstm_cuda::layer_forward", _layer_forward_fake)
    torch.library.register_fake("lstm_cuda::layer_backward", _layer_backward_fake)
