"""The registered ops: loading, typed wrappers, and the shapes they give (fake implementations)."""

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
        c0: [D, B, H] or None for zeros; in x's dtype or in ``compute_dtype``, so that a sequence
            in chunks of time loses nothing between them.
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
        ``saved_gates_dtype``; c [T, B, D, H] ([0] unless ``save`` or ``cells``) in
        ``compute_dtype``.
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
    """``layer_backward`` on CPUs for a piece of a sequence, the last piece first.

    What the pieces give, together, is to the bit what a call for all steps gives.

    Args:
        dy ... need_dw: as for ``layer_backward``, c0 and so dc_n in ``compute_dtype``; dh_n for
            rows whose last step or only state is here, zeros for all others.
        before, after: as for ``layer_forward``.
        carry: what the last call returned; None for the first.
        sums: from ``piece_sums``, written by each call and read by the next.

    Returns:
        As ``layer_backward`` and carry [D, B, 4H], what crosses to the steps before, all in
        ``compute_dtype``. Unless ``before`` is 0, dh0 and the gradients of the weights, those of
        all pieces, are [0]; if it is, carry.
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
    T, B, D, H, P = _sizes(x, w_hh)
    parts: Any = plan_cpu(T, B, D, x.shape[2], H, P, x.dtype, True)["parts"]
    weights = sum(w.numel() for w in (*w_ih, *w_hh, *w_hr)) + 4 * H * D
    return x.new_empty(2 * parts * weights, dtype=compute_dtype(x.dtype))


def outside_autocast(op: Any, device_type: str, *arguments: Any) -> Any:
    """Call an op whose own products autocast must leave alone: dtypes are settled before it."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return op(*arguments)  # meta has no autocast
    with torch.autocast(device_type, enabled=False):
        return op(*arguments)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulation and of the cell state."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def saved_gates_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the gates are kept for backward.

    On CUDA they take the place of their pre-activations, the result of a product in x's dtype.
    """
    return x.dtype if x.device.type == "cuda" else compute_dtype(x.dtype)


def _sizes(x: Tensor, w_hh: Sequence[Tensor]) -> tuple[int, int, int, int, int]:
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
    T, B, D, H, P = _sizes(x, w_hh)
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
    _, B, D, H, P = _sizes(x, w_hh)
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


if load_error is None:
    _force_kernel("LSTM_CUDA_KERNEL", os.environ.get("LSTM_CUDA_KERNEL", ""))
    # Looked up once: the three lookups by name cost as much as a check of all arguments.
    _forward = torch.ops.lstm_cuda.layer_forward.default
    _backward = torch.ops.lstm_cuda.layer_backward.default
    _piece_backward = torch.ops.lstm_cuda.piece_backward.default
    _pack = torch.ops.lstm_cuda.pack_weights.default
    torch.library.register_fake("lstm_cuda::layer_forward", layer_forward_fake)
    torch.library.register_fake("lstm_cuda::layer_backward", layer_backward_fake)
