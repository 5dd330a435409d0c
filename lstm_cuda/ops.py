"""The compiled part: its loading, the plans that it makes, and the registered ops of a layer."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import shapes

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


def max_recurrences() -> int:
    """D of one call is at most this."""
    count: int = _C.max_recurrences
    return count


def plan_cpu(
    T: int, B: int, D: int, features: int, H: int, P: int, dtype: torch.dtype, backward: bool
) -> dict[str, object]:
    """What the CPU path does for a layer of these sizes, with torch's number of threads."""
    require("cpu")
    name = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    result: dict[str, object] = _C.plan_cpu(T, B, D, features, H, P, name, threads, backward)
    return result


@dataclass(frozen=True)
class CudaDevice:
    """What the choice of a kernel depends on.

    Attributes:
        architecture: ten times the compute capability: 80, 86, 89, 90, 100, 120.
        multiprocessors: their number.
        shared_bytes: shared memory that one block may ask for.
        index: torch's number of the device; refusals of kernels are remembered by it.
    """

    architecture: int
    multiprocessors: int
    shared_bytes: int
    index: int = 0

    @classmethod
    def of(cls, device: torch.device) -> CudaDevice:
        """The properties of a device of this machine."""
        return cls._of(torch.cuda.current_device() if device.index is None else device.index)

    @classmethod
    @functools.cache
    def _of(cls, index: int) -> CudaDevice:
        found = torch.cuda.get_device_properties(index)
        return cls(
            10 * found.major + found.minor,
            found.multi_processor_count,
            found.shared_memory_per_block_optin,  # type: ignore[attr-defined]
            index,
        )


def plan_cuda(
    T: int,
    B: int,
    D: int,
    features: int,
    H: int,
    P: int,
    dtype: torch.dtype,
    backward: bool,
    allow_tf32: bool,
    device: CudaDevice,
    cell: str = "plain",
    large_h: bool = False,
) -> dict[str, object]:
    """Which kernel family a layer of these sizes gets on a CUDA device, its parameters, and why.

    Needs neither a GPU nor a build with CUDA.

    Args:
        cell: ``plain``, ``torch.nn.LSTM``'s; ``options``, another; ``norm``, with layer norm.
        large_h: h may be larger than 1 where w_hh meets it.

    Returns:
        ``kernel``, the family; ``possible``, whether it can run the layer; ``arithmetic`` of
        products; ``because``, in words. If it is possible, ``estimated_us``, what the whole
        recurrence is expected to take; ``folds_projection`` (True) if the projection is folded into
        its weights; and

        * ``rec_cta``: ``padded_hidden``, the compiled size that holds H
        * ``rec_cluster``, ``rec_group``: the same, and ``blocks`` of a cluster or group, ``warps``
          of a block, ``columns``, the batch rows of a cluster or group, and ``turns`` in which a
          step takes them; ``groups`` of a launch; ``packs_beside``, whether weights are packed
          while inputs are multiplied
        * ``rec_step``: ``tile`` of its products, ``launches_overlap``
    """
    require("cpu")
    name = str(dtype).removeprefix("torch.")
    result: dict[str, object] = _C.plan_cuda(
        T, B, D, features, H, P, name, backward, allow_tf32, device.architecture,
        device.multiprocessors, device.shared_bytes, device.index, cell, large_h,
    )  # fmt: skip
    return result


def wavefront_chunks(
    layers: int,
    T: int,
    B: int,
    H: int,
    P: int,
    dtype: torch.dtype,
    allow_tf32: bool,
    device: CudaDevice,
) -> int:
    """Into how many chunks of time a stack of such layers is cut on a CUDA device; 1 is none.

    Needs neither a GPU nor a build with CUDA.
    """
    require("cpu")
    name = str(dtype).removeprefix("torch.")
    chunks: int = _C.wavefront_chunks(
        layers, T, B, H, P, name, allow_tf32, device.architecture, device.multiprocessors,
        device.shared_bytes, device.index,
    )  # fmt: skip
    return chunks


def packed_layout(x: Tensor, D: int, H: int, P: int, allow_tf32: bool) -> int:
    """How ``layer_forward`` would pack w_hh for this input; 0 if it would not."""
    if x.device.type != "cuda":
        return 0
    device = CudaDevice.of(x.device)
    T, B, _ = x.shape
    layout: int = _C.packed_layout(
        T, B, D, H, P, str(x.dtype).removeprefix("torch."), allow_tf32, device.architecture,
        device.multiprocessors, device.shared_bytes, device.index,
    )  # fmt: skip
    return layout


def pack_weights(w_hh: Sequence[Tensor], w_hr: Sequence[Tensor], layout: int) -> Tensor:
    """w_hh of D recurrences packed for ``layer_forward``, with any projections folded in.

    Args:
        w_hh: D tensors [4H, P].
        w_hr: none (then P = H), or D tensors [P, H].
        layout: as ``packed_layout`` gave it.
    """
    packed: Tensor = _pack(w_hh, w_hr, layout)
    return packed


@contextmanager
def force_kernel(name: str, columns: int = 0, turns: int = 0) -> Iterator[None]:
    """Run every layer on CUDA with one kernel family, for tests and measurements.

    The environment variable ``LSTM_CUDA_KERNEL`` does the same for a whole process. It holds for
    all threads. A layer that the family cannot run raises.

    Args:
        name: ``"rec_cta"``, ``"rec_cluster"``, ``"rec_group"`` or ``"rec_step"``; ``""`` for the
            free choice.
        columns: batch rows of a cluster or group, 8, 16 or 32; 0 for the free choice.
        turns: in which a cluster takes these rows, 1 or 2; 0 for the free choice.

    Raises:
        ValueError: there is no such family, or it never has so many columns or turns.
    """
    require("cpu")
    before = _C.forced_kernel()
    for argument, value, values in (("columns", columns, (8, 16, 32)), ("turns", turns, (1, 2))):
        if value != 0 and (value not in values or name not in ("rec_cluster", "rec_group")):
            raise ValueError(
                f"{argument} must be 0 or, for rec_cluster and rec_group, one of {values}; "
                f"got {value} for {name!r}"
            )
    _force_kernel("name", name, columns, turns)
    try:
        yield
    finally:
        _C.force_kernel(*before)


def _force_kernel(argument: str, name: str, columns: int = 0, turns: int = 0) -> None:
    families = _C.kernel_families()
    if name not in ("", *families):
        raise ValueError(f"{argument} must be one of {', '.join(families)}; got {name!r}")
    _C.force_kernel(name, columns, turns)


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
    allow_tf32: bool,
    packed: Tensor | None = None,
    packed_layout: int = 0,
    before: int = 0,
    after: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer of D recurrences; the meaning is ``reference.lstm_layer``'s.

    Args:
        x: [T, B, n*I], any strides: n inputs side by side, each for D/n recurrences in a row. The
            directions of one layer share one; members of an ensemble have each their own.
        w_ih: D tensors [4H, I].
        w_hh: D tensors [4H, P].
        bias: none, or 2D tensors [4H]: ``b_ih`` of each recurrence, then ``b_hh`` of each.
        w_hr: none (then P = H), or D tensors [P, H].
        h0: [D, B, P] or None for zeros.
        c0: [D, B, H] or None for zeros; in x's dtype or in ``shapes.compute_dtype``, so that a
            sequence in chunks of time loses nothing between them.
        lengths: [B] int64 on x's device, or None.
        reset: [T, B] bool, or None.
        reversed: bit d set: recurrence d runs backwards in time.
        save: keep what backward needs.
        cells: keep c.
        allow_tf32: float32 products may round operands to TF32 (CUDA only).
        packed: w_hh and w_hr as ``pack_weights`` gave them, or None.
        packed_layout: its layout; where the call's is another, w_hh is packed anew.
        before, after: steps of the same sequence that other calls run before and after these, in
            the order of the recurrences. On CPUs results are then, to the bit, those of one call.

    Returns:
        y [T, B, D*P] contiguous and h_n [D, B, P] in x's dtype; c_n [D, B, H] in c0's, or x's
        without c0; gates [T, B, D, 4H] (activated i, f, g, o; [0] unless ``save``) in
        ``shapes.saved_gates_dtype``; c [T, B, D, H] ([0] unless ``save`` or ``cells``) in
        ``shapes.compute_dtype``.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = outside_autocast(
        _forward, x.device.type,
        x, w_ih, w_hh, bias or None, w_hr or None, h0, c0, lengths, reset, reversed, save, cells,
        allow_tf32, packed, packed_layout, before, after,
    )  # fmt: skip
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
    allow_tf32: bool,
    dgates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``layer_forward``; what it saved is only read.

    Args:
        dy, dh_n, dc_n, dc: gradients of y, h_n, c_n and c; None where there is none.
        x ... reversed: as given to ``layer_forward``.
        y, gates, c: as returned by it with ``save=True``.
        need_dx: compute dx.
        need_dw: compute the gradients of the weights.
        allow_tf32: as for ``layer_forward``.
        dgates: gradient of the saved gates, if ``takes_dgates``.

    Returns:
        dx [T, B, n*I] ([0] unless ``need_dx``), dh0 [D, B, P] and dc0 [D, B, H] ([0] without h0,
        c0), dw_ih [D, 4H, I], dw_hh [D, 4H, P], db [D, 4H] (of either bias), dw_hr [D, P, H] ([0]
        without projection); the last four are [0] unless ``need_dw``. dc0 in c0's dtype, which is
        dc_n's, too; all others in x's.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = outside_autocast(
        _backward, x.device.type,
        dy, dh_n, dc_n, dc, x, w_ih, w_hh, w_hr or None, h0, c0, lengths, reset, reversed, y,
        gates, c, need_dx, need_dw, allow_tf32, dgates,
    )  # fmt: skip
    return result


def takes_dgates(x: Tensor) -> bool:
    """Whether ``layer_backward`` can start from a gradient of the saved gates."""
    return x.device.type == "cpu"


def outside_autocast(op: Any, device_type: str, *arguments: Any) -> Any:
    """Call an op whose own products autocast must leave alone: dtypes are settled before it."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return op(*arguments)  # meta has no autocast
    with torch.autocast(device_type, enabled=False):
        return op(*arguments)


if load_error is None:
    _force_kernel("LSTM_CUDA_KERNEL", os.environ.get("LSTM_CUDA_KERNEL", ""))
    # Looked up once: the three lookups by name cost as much as a check of all arguments.
    _forward = torch.ops.lstm_cuda.layer_forward.default
    _backward = torch.ops.lstm_cuda.layer_backward.default
    _pack = torch.ops.lstm_cuda.pack_weights.default
    torch.library.register_fake("lstm_cuda::layer_forward", shapes.layer_forward_fake)
    torch.library.register_fake("lstm_cuda::layer_backward", shapes.layer_backward_fake)
