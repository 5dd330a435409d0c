"""``fused_lstm``: an LSTM stack as a function of its weights, all checked before any work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import heads as blocks
from . import ops, reference
from .layer import fused_layer
from .masks import Masks, draw
from .packed import PackedWeights
from .reference import PLAIN, Cell, check_probability
from .segments import check_segments, segmented_layer
from .shapes import compute_dtype
from .stack import run_stack, wavefront_chunks
from .variant import variant_layer
from .variant_segments import segmented_variant_layer

_Rows = Sequence[Sequence[Tensor]] | None

BACKENDS = ("auto", "cuda", "cpu", "torch")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_ROWS = {
    2: ("w_ih", "w_hh"),
    3: ("w_ih", "w_hh", "w_hr"),
    4: ("w_ih", "w_hh", "b_ih", "b_hh"),
    5: ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr"),
}


def fused_lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Sequence[Tensor]],
    *,
    batch_first: bool = False,
    bidirectional: bool = False,
    reverse: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    return_cells: bool = False,
    cell: Cell = PLAIN,
    peephole: Sequence[Sequence[Tensor]] | None = None,
    layer_norm: Sequence[Sequence[Tensor]] | None = None,
    backend: str = "auto",
    checkpoint: int | None = None,
    truncate: int | None = None,
    packed: Sequence[PackedWeights] | None = None,
    wide_c: bool = False,
    heads: int = 1,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """A stack of L LSTM layers with D directions, as a function of its weights.

    Each direction of a layer computes (Hochreiter and Schmidhuber 1997, Gers et al. 2000, as
    ``torch.nn.LSTM``)::

        i, f, g, o = split(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh)
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
        h_t = sigmoid(o) tanh(c_t)                 (then w_hr h_t with a projection, Sak et al.
        2014)

    T, B, I, H, P are time, batch, input, hidden and output size; P is H without a projection.

    Args:
        x: [T, B, I], or [B, T, I] with ``batch_first``; float64, float32, float16 or bfloat16; any
            strides.
        hx: (h_0 [L*D, B, P], c_0 [L*D, B, H]) in x's dtype, or None for zeros.
        weights: L*D rows as ``torch.nn.LSTM.all_weights`` lists them, layer by layer and direction
            by direction: ``[w_ih [4H, I], w_hh [4H, P], b_ih [4H], b_hh [4H], w_hr [P, H]]``,
                without the biases or the
            projection where there are none. In layers after the first, I is D*P. In x's dtype.
        batch_first: x, ``reset``, the output and the cells have the batch first; hx and the final
            states do not.
        bidirectional: D is 2, the second direction of each layer running backwards in time.
        reverse: the one direction runs backwards in time.
        dropout: probability of zeroing an element between layers, in training.
        training: draw the random masks of ``dropout`` and of the cell's options. Nothing else
            depends on it.
        lengths: [B], any integer dtype, any device, any order; or a sequence of ints. Row b stops
            after ``lengths[b]`` steps: its outputs past them are 0, its final state is that of its
            last step, its reverse direction starts there, and what x holds past them reaches
            neither outputs nor gradients. Values outside 0..T raise if on the CPU and are clamped
            if on another device (looking at them would wait for it).
        reset: [T, B] ([B, T] with ``batch_first``), bool, or uint8 or float 0/1. True at t: no
            state passes between t-1 and t, in either direction of time; at t = 0, ``hx`` is ignored
            for that row.
        return_cells: also return c_t of the last layer.
        cell: options of the cell.
        peephole: L*D rows ``[w_ci, w_cf, w_co]``, each [H].
        layer_norm: L*D rows of gains ``[ih [4H], hh [4H], c [H]]`` and, optionally, the shift of c
            [H].
        backend: "auto" (by x's device), "cpu", "cuda", or "torch" for the reference: slow, any
            device, any transform.
        checkpoint: to save memory in training, keep for backward the state before every k-th step
            instead of the gates of all steps, and run k steps at a time again in backward. On CPUs
            results and gradients are those without it to the bit (docs/memory.md has the
            exceptions); on CUDA they differ by rounding. Without gradients it does nothing. The
            reference cannot do it.
        truncate: no gradient of the state passes between t-1 and t where t is a multiple of k
            (truncated backpropagation), in either direction of time; the state itself does, so
            outputs do not change. The final state of a row that has ended before t keeps its
            gradient. With ``checkpoint``, a multiple of that.
        packed: L places where calls without gradients keep packed weights, as
            ``FusedLSTM.freeze`` makes them.
        wide_c: under autocast, take c_0 and give c_n in float32, so that nothing of c is lost
            between calls.
        heads: n blocks of H/n units, each of which sees only its own h: a block-diagonal
            recurrence. ``w_hh`` is [4H, P/n] and ``w_hr`` [P, H/n], of whose rows those of head k,
            the k-th of n parts of each gate or of P, meet the h and the units of head k. All else
            keeps its shape; ``layer_norm`` normalises each head by itself.

    Returns:
        output [T, B, D*P] ([B, T, D*P] with ``batch_first``), (h_n [L*D, B, P], c_n [L*D, B, H])
        and, with ``return_cells``, cells [T, B, D*H] (or [B, T, D*H]). All in x's dtype, or in the
        autocast dtype, but for ``wide_c``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is wrong; the message says which, what was
            wanted, what came.
        NotImplementedError: with ``checkpoint`` or ``truncate``, under vmap; with ``truncate``,
            under forward-mode differentiation; unless ``backend="torch"``.
    """
    D = 2 if bidirectional else 1
    if not isinstance(x, Tensor) or x.dim() != 3:
        raise _bad_input(x, batch_first)
    if hx is not None:
        hx = check_pair(hx)
    dtype, c_dtype = autocast_dtype(x.device.type), None
    if dtype is not None:
        x = _cast(x, dtype)
        if wide_c:
            c_dtype = compute_dtype(x.dtype)
        hx = None if hx is None else (_cast(hx[0], dtype), _cast(hx[1], c_dtype or dtype))
        weights = [[_cast(w, dtype) for w in row] for row in weights]
        if peephole is not None:
            peephole = [[_cast(w, dtype) for w in row] for row in peephole]
        if layer_norm is not None:
            layer_norm = [[_cast(w, dtype) for w in row] for row in layer_norm]
    B, T = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
    H, P = _check_weights(x, weights, D, heads)
    L = len(weights) // D
    if bidirectional and reverse:
        raise ValueError("reverse=True is for one direction; bidirectional=True has both")
    if dropout != 0:
        check_probability("dropout", dropout)
    if hx is not None:
        _check_hx(hx, x, L * D, B, H, P, c_dtype or x.dtype)
    check_segments(checkpoint, truncate)
    h0, c0 = (None, None) if hx is None else hx
    if c0 is None and c_dtype is not None:
        c0 = x.new_zeros(L * D, B, H, dtype=c_dtype)
    if lengths is not None:
        lengths = _check_lengths(lengths, T, B, x.device)
    if reset is not None:
        reset = _check_reset(reset, T, B, batch_first, x.device)
    extras = cell.options
    if peephole is not None:
        extras += ("peephole",)
        _check_extra("peephole", peephole, ((H,), (H,), (H,)), x, L * D)
    if layer_norm is not None:
        extras += ("layer_norm",)
        _check_extra("layer_norm", layer_norm, ((4 * H,), (4 * H,), (H,), (H,)), x, L * D)
    if checkpoint is not None:
        check_checkpoint(backend)
    fused = _choose_fused(backend, x.device.type)
    in_segments = fused and (checkpoint is not None or truncate is not None)

    if batch_first:
        x = x.transpose(0, 1)
    reversed = 2 if bidirectional else int(reverse)
    kept = packed if dtype is None else None
    if heads > 1:  # each is a recurrence, and so are all directions of it
        if fused:
            blocks.check_recurrences(heads, D)
        weights = blocks.split_rows(weights, heads, len(weights[0]) // 2 * 2)  # all but w_hr
        peephole = None if peephole is None else blocks.split_rows(peephole, heads, 0)
        layer_norm = None if layer_norm is None else blocks.split_rows(layer_norm, heads, 2)
        h0, c0 = blocks.split_states(h0, heads), blocks.split_states(c0, heads)
        reversed = blocks.split_directions(reversed, D, heads)
        D *= heads
        kept = None  # these weights are made anew in each call

    def between(y: Tensor) -> Tensor:
        return F.dropout(y, dropout) if training and dropout > 0 else y

    def own(k: int) -> tuple[_Rows, _Rows]:
        mine = slice(k * D, k * D + D)
        return (
            None if peephole is None else peephole[mine],
            None if layer_norm is None else layer_norm[mine],
        )

    def layer(
        k: int,
        x: Tensor,
        rows: Sequence[Sequence[Tensor]],
        h: Tensor | None,
        c: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted = return_cells and k == L - 1
        if fused and extras:
            masks = Masks()
            if training:
                rows, masks = draw(cell, rows, x.shape[1], compute_dtype(x.dtype))
            given = x, rows, h, c, lengths, reset, reversed, cell, *own(k), masks, wanted
            if in_segments:
                return segmented_variant_layer(*given, checkpoint, truncate)
            return variant_layer(*given)
        if fused:
            places = None if kept is None else kept[k]
            if in_segments:
                return segmented_layer(
                    x, rows, h, c, lengths, reset, reversed, wanted, checkpoint, truncate, places
                )
            return fused_layer(x, rows, h, c, lengths, reset, reversed, wanted, places)
        return reference.lstm_layer(
            x, rows, h, c, lengths, reset, reversed, cell, *own(k), training, truncate
        )

    # A wavefront has boundaries of its own.
    plain = fused and not in_segments and not extras
    chunks = wavefront_chunks(x, weights, D, reversed) if plain else 1
    x, h_n, c_n, cells = run_stack(
        layer, x, weights, h0, c0, lengths, reset, D, return_cells, between, chunks
    )
    output = x.transpose(0, 1) if batch_first else x
    state = (h_n[0], c_n[0]) if L == 1 else (torch.cat(h_n), torch.cat(c_n))
    if heads > 1:
        state = (blocks.merge_states(state[0], heads), blocks.merge_states(state[1], heads))
    if not return_cells:
        return output, state
    cells = cells.flatten(2).to(x.dtype)
    return output, state, cells.transpose(0, 1) if batch_first else cells


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast wants on this type of device; None where it is off."""
    if not torch._C._is_any_autocast_enabled() or device_type == "meta":
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As torch's autocast casts: floating point, but not float64."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def native_dtype(x: Tensor, hx: tuple[Tensor, Tensor] | None) -> torch.dtype | None:
    """The dtype of c under autocast where torch steps through time.

    It does so for packed input of several lengths, projected and float16 input, and in cells. On a
    CPU it autocasts the products alone there, and c keeps the wider dtype of those and of c_0. None
    where autocast is off.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is None or x.device.type != "cpu":
        return dtype
    return torch.promote_types(dtype, x.dtype if hx is None else hx[1].dtype)


def check_pair(hx: object) -> tuple[Tensor, Tensor]:
    """hx, if it is a pair of tensors; else raise TypeError."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        what = f"{len(hx)} items" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"hx must be a pair (h_0, c_0); got {what}")
    for k, t in enumerate(hx):
        if not isinstance(t, Tensor):
            raise TypeError(f"hx[{k}] must be a tensor; got {type(t).__name__}")
    return hx[0], hx[1]


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


def _choose_fused(backend: str, device_type: str) -> bool:
    """Whether the fused op runs this; otherwise the reference does."""
    if backend == "torch":
        return False
    check_backend(backend)
    if backend != "auto" and device_type != backend and device_type != "meta":
        raise RuntimeError(
            f'backend="{backend}" wants input on {backend}; got {device_type}. Move the input and '
            'the module, or use backend="auto".'
        )
    ops.require(device_type)
    return True


def _bad_input(x: object, batch_first: bool) -> Exception:
    if not isinstance(x, Tensor):
        return TypeError(f"input must be a tensor; got {type(x).__name__}")
    layout = "[batch, time, input_size]" if batch_first else "[time, batch, input_size]"
    return ValueError(f"input must be {layout}, 3-D; got {x.dim()}-D, {list(x.shape)}")


def _check_weights(
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
    blocks.check_heads(heads, H)
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


def _check_hx(
    hx: tuple[Tensor, Tensor], x: Tensor, LD: int, B: int, H: int, P: int, c_dtype: torch.dtype
) -> None:
    for k, (t, size, dtype) in enumerate(zip(hx, (P, H), (x.dtype, c_dtype), strict=True)):
        if t.shape != (LD, B, size) or t.dtype != dtype or t.device != x.device:
            name = "hidden_size" if k or P == H else "proj_size"
            raise _bad_tensor(
                f"hx[{k}]", t, (LD, B, size), x, f" (num_layers * num_directions, batch, {name})"
            )


def _check_extra(
    name: str,
    rows: Sequence[Sequence[Tensor]],
    shapes: tuple[tuple[int, ...], ...],
    x: Tensor,
    LD: int,
) -> None:
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


def _check_lengths(lengths: Tensor | Sequence[int], T: int, B: int, device: torch.device) -> Tensor:
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


def _check_reset(reset: Tensor, T: int, B: int, batch_first: bool, device: torch.device) -> Tensor:
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
