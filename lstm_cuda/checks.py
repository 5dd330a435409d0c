"""The arguments of ``fused_lstm``, one by one: what was wanted, what came, what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .heads import check_heads

BACKENDS = ("auto", "cuda", "cpu", "torch")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_ROWS = {
    2: ("w_ih", "w_hh"),
    3: ("w_ih", "w_hh", "w_hr"),
    4: ("w_ih", "w_hh", "b_ih", "b_hh"),
    5: ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"),
}


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}"
        )


def check_checkpoint(backend: str) -> None:
    """Raise ValueError where all steps would be kept."""
    if backend == "torch":
        raise ValueError(
            'checkpoint is for the fused op, and backend="torch" runs on the reference; put '
            "torch.utils.checkpoint around the call"
        )


def check_pair(hx: object) -> tuple[Tensor, Tensor]:
    """hx, if it is a pair of tensors; else raise TypeError."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        what = f"{len(hx)} items" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"hx must be a pair (h_0, c_0); got {what}")
    for k, t in enumerate(hx):
        if not isinstance(t, Tensor):
            raise TypeError(f"hx[{k}] must be a tensor; got {type(t).__name__}")
    return hx[0], hx[1]


def bad_input(x: object, batch_first: bool) -> Exception:
    """What is wrong with an input that is no tensor of three dimensions."""
    if not isinstance(x, Tensor):
        return TypeError(f"input must be a tensor; got {type(x).__name__}")
    layout = "[batch, time, input_size]" if batch_first else "[time, batch, input_size]"
    return ValueError(f"input must be {layout}, 3-D; got {x.dim()}-D, {list(x.shape)}")


def check_weights(
    x: Tensor, weights: Sequence[Sequence[Tensor]], D: int, heads: int
) -> tuple[int, int]:
    """H and P, once every weight fits x and the others."""
    if len(weights) == 0 or len(weights) % D != 0:
        raise ValueError(
            f"weights must have num_layers * {D} rows, one for each layer and direction; "
            f"got {len(weights)}"
        )
    dtype, device, per = x.dtype, x.device, len(weights[0])
    if dtype not in _DTYPES:
        raise TypeError(f"input must be float64, float32, float16 or bfloat16; got {dtype}")
    if per not in _ROWS:
        raise ValueError(
            "weights[0] must be [w_ih, w_hh], then b_ih and b_hh if there are biases, then w_hr if "
            f"there is a projection; got {per} tensors"
        )
    w_hh = weights[0][1]
    if w_hh.dim() != 2 or w_hh.shape[0] % 4 != 0 or w_hh.shape[0] == 0:
        raise ValueError(
            f"weights[0][1] (w_hh) must be [4 * hidden_size, output_size]; got {list(w_hh.shape)}"
        )
    G, p = w_hh.shape
    H = G // 4
    check_heads(heads, H)
    h, P = H // heads, p * heads
    features = x.shape[2]
    if weights[0][0].dim() == 2 and weights[0][0].shape[1] != features:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {weights[0][0].shape[1]}, got {features}"
        )
    bias = ((G,), (G,)) if per >= 4 else ()
    projection = ((P, h),) if per in (3, 5) else ()
    if not projection and P != H:
        raise ValueError(
            f"weights[0][1] (w_hh) must be [{G}, {h}] without a projection w_hr; got {[G, p]}"
        )
    for k, row in enumerate(weights):
        shapes = ((G, features if k < D else D * P), (G, p), *bias, *projection)
        if len(row) != per:
            raise ValueError(f"weights[{k}] must have {per} tensors, as weights[0]; got {len(row)}")
        for j, w in enumerate(row):
            if w.shape != shapes[j] or w.dtype != dtype or w.device != device:
                raise _bad_tensor(f"weights[{k}][{j}] ({_ROWS[per][j]})", w, shapes[j], x)
    return H, P


def check_hx(
    hx: tuple[Tensor, Tensor], x: Tensor, LD: int, B: int, H: int, P: int, c_dtype: torch.dtype
) -> None:
    """Raise unless h_0 and c_0 fit x."""
    for k, (t, size, dtype) in enumerate(zip(hx, (P, H), (x.dtype, c_dtype), strict=True)):
        if t.shape != (LD, B, size) or t.dtype != dtype or t.device != x.device:
            name = "hidden_size" if k or P == H else "proj_size"
            raise _bad_tensor(
                f"hx[{k}]", t, (LD, B, size), x, f" (num_layers * num_directions, batch, {name})"
            )


def check_extra(
    name: str,
    rows: Sequence[Sequence[Tensor]],
    shapes: tuple[tuple[int, ...], ...],
    x: Tensor,
    LD: int,
) -> None:
    """Raise unless the rows of ``peephole`` or ``layer_norm`` have these shapes and fit x."""
    if len(rows) != LD:
        raise ValueError(
            f"{name} must have {LD} rows, one for each layer and direction; got {len(rows)}"
        )
    counts = (3, 4) if name == "layer_norm" else (3,)  # the shift of layer_norm's c is optional
    for k, row in enumerate(rows):
        if len(row) not in counts:
            wanted = " or ".join(map(str, counts))
            raise ValueError(f"{name}[{k}] must have {wanted} tensors; got {len(row)}")
        for j, w in enumerate(row):
            if w.shape != shapes[j] or w.dtype != x.dtype or w.device != x.device:
                raise _bad_tensor(f"{name}[{k}][{j}]", w, shapes[j], x)


def _bad_tensor(
    name: str, t: Tensor, shape: tuple[int, ...], x: Tensor, meaning: str = ""
) -> Exception:
    """What is wrong with a tensor that has not the given shape or not x's dtype or device."""
    if t.device != x.device:
        return RuntimeError(f"{name} must be on the input's device, {x.device}; got {t.device}")
    if t.dtype != x.dtype:
        hint = ", or use autocast"
        if torch.float64 in (x.dtype, t.dtype):
            hint = "; autocast leaves float64 as it is"
        return ValueError(
            f"{name} must have the input's dtype, {x.dtype}; got {t.dtype}. "
            f"Convert one to the other's{hint}."
        )
    return RuntimeError(f"{name} must be {list(shape)}{meaning}; got {list(t.shape)}")


def check_lengths(lengths: Tensor | Sequence[int], T: int, B: int, device: torch.device) -> Tensor:
    """lengths as [B] int64 on the device."""
    if not isinstance(lengths, Tensor):
        if not isinstance(lengths, (list, tuple)) or not all(isinstance(n, int) for n in lengths):
            raise TypeError(
                "lengths must be an integer tensor or a sequence of ints; "
                f"got {type(lengths).__name__}"
            )
        lengths = torch.tensor(lengths, dtype=torch.int64)
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"lengths must have an integer dtype; got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"lengths must be [{B}] (batch); got {list(lengths.shape)}")
    # On another device the kernels clamp instead: a look at the values would wait for the device.
    if lengths.device.type == "cpu" and B > 0 and _can_look():
        low, high = (int(n) for n in lengths.aminmax())
        if low < 0 or high > T:
            bad = low if low < 0 else high
            raise ValueError(f"lengths must be between 0 and {T} (time); got {bad}")
    return lengths.to(device, torch.int64)


def _can_look() -> bool:
    """Whether tensors have values here: no graph is made of them, and no vmap hides members."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def check_reset(reset: Tensor, T: int, B: int, batch_first: bool, device: torch.device) -> Tensor:
    """reset as [T, B] bool."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a tensor; got {type(reset).__name__}")
    shape, meaning = ((B, T), "batch, time") if batch_first else ((T, B), "time, batch")
    if reset.shape != shape:
        raise ValueError(f"reset must be {list(shape)} ({meaning}); got {list(reset.shape)}")
    if reset.device != device:
        raise RuntimeError(f"reset must be on the input's device, {device}; got {reset.device}")
    if reset.dtype != torch.bool:
        if reset.dtype != torch.uint8 and not reset.is_floating_point():
            raise TypeError(f"reset must be bool, or uint8 or float 0/1; got {reset.dtype}")
        # Probabilities passed by mistake would all count as True; looking costs too much in an
        # optimised run.
        if __debug__ and reset.device.type == "cpu" and _can_look():
            odd = reset[(reset != 0) & (reset != 1)]
            if odd.numel() > 0:
                raise ValueError(f"reset must be 0 or 1 everywhere; got {odd[0].item()}")
        reset = reset != 0
    return reset.transpose(0, 1) if batch_first else reset
