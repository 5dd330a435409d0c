"""``fused_lstm``: an LSTM stack as a function of its weights, all checked before any work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import heads as blocks
from . import ops, reference
from .checks import (
    bad_input,
    check_backend,
    check_checkpoint,
    check_extra,
    check_hx,
    check_lengths,
    check_pair,
    check_reset,
    check_weights,
)
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
        raise bad_input(x, batch_first)
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
    H, P = check_weights(x, weights, D, heads)
    L = len(weights) // D
    if bidirectional and reverse:
        raise ValueError("reverse=True is for one direction; bidirectional=True has both")
    if dropout != 0:
        check_probability("dropout", dropout)
    if hx is not None:
        check_hx(hx, x, L * D, B, H, P, c_dtype or x.dtype)
    check_segments(checkpoint, truncate)
    h0, c0 = (None, None) if hx is None else hx
    if c0 is None and c_dtype is not None:
        c0 = x.new_zeros(L * D, B, H, dtype=c_dtype)
    if lengths is not None:
        lengths = check_lengths(lengths, T, B, x.device)
    if reset is not None:
        reset = check_reset(reset, T, B, batch_first, x.device)
    extras = cell.options
    if peephole is not None:
        extras += ("peephole",)
        check_extra("peephole", peephole, ((H,), (H,), (H,)), x, L * D)
    if layer_norm is not None:
        extras += ("layer_norm",)
        check_extra("layer_norm", layer_norm, ((4 * H,), (4 * H,), (H,), (H,)), x, L * D)
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
