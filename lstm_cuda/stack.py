"""Layer upon layer; with the fused op on CUDA, where it pays, in a wavefront."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from . import ops
from .layer import tf32_allowed
from .shapes import compute_dtype

# Its number, x, weights of D recurrences, h0, c0, lengths, reset -> y, h_n, c_n, cells.
Layer = Callable[
    [
        int,
        Tensor,
        Sequence[Sequence[Tensor]],
        Tensor | None,
        Tensor | None,
        Tensor | None,
        Tensor | None,
    ],
    tuple[Tensor, Tensor, Tensor, Tensor],
]


def wavefront_chunks(x: Tensor, weights: Sequence[Sequence[Tensor]], D: int, reversed: int) -> int:
    """Into how many chunks of time a stack is cut so that layers run side by side; 1: it is not.

    Layer l's chunk k needs only layer l - 1's chunk k and its own chunk k - 1, so layer l can be
    one chunk behind layer l - 1. Not so where a direction runs backwards in time, which needs all
    of the layer below first.

    Args:
        x: [T, B, I].
        weights: L*D rows as for ``fused_lstm``.
        D: directions.
        reversed: bit d: direction d runs backwards.
    """
    L = len(weights) // D
    if L == 1 or D > 1 or reversed or x.device.type != "cuda":
        return 1
    if torch.compiler.is_compiling():
        return 1
    T, B, _ = x.shape
    G, P = weights[0][1].shape
    device = ops.CudaDevice.of(x.device)
    return ops.wavefront_chunks(
        L, T, B, G // 4, P, x.dtype, tf32_allowed(x.device.type, x.dtype), device
    )


def run_stack(
    layer: Layer,
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    D: int,
    cells: bool,
    between: Callable[[Tensor], Tensor],
    chunks: int = 1,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """All layers of a stack.

    Args:
        layer: runs the layer of a number.
        x ... reset: as for ``reference.lstm_layer``; ``weights``, ``h0`` and ``c0`` of all layers.
        D: recurrences of a layer.
        cells: the cell states of the last layer are wanted.
        between: what is done to the output of each layer but the last (dropout).
        chunks: of time, at most T; more than one only with one recurrence that runs forwards.

    Returns:
        output [T, B, D*P]; h_n and c_n [D, B, ...] of each layer; cells, meaningless unless asked
        for.
    """
    L = len(weights) // D
    rows = [weights[k * D : (k + 1) * D] for k in range(L)]
    h = [None if h0 is None or L == 1 else h0[k * D : (k + 1) * D] for k in range(L)]
    c = [None if c0 is None or L == 1 else c0[k * D : (k + 1) * D] for k in range(L)]
    if L == 1:
        h, c = [h0], [c0]
    if chunks > 1:
        return _wavefront(layer, x, rows, h, c, lengths, reset, cells, between, chunks)
    h_n, c_n = [], []
    for k in range(L):
        x, h_last, c_last, states = layer(
            k, between(x) if k > 0 else x, rows[k], h[k], c[k], lengths, reset
        )
        h_n.append(h_last)
        c_n.append(c_last)
    return x, h_n, c_n, states


def _wavefront(
    layer: Layer,
    x: Tensor,
    rows: list[Sequence[Sequence[Tensor]]],
    h: list[Tensor | None],
    c: list[Tensor | None],
    lengths: Tensor | None,
    reset: Tensor | None,
    cells: bool,
    between: Callable[[Tensor], Tensor],
    chunks: int,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Each layer on a stream of its own, in chunks of time; backward follows the same streams.

    Between chunks the cell state and its gradient have the dtype of accumulation. What crosses in
    x's dtype, h and its gradient, is rounded to that in every step anyway.
    """
    T, L = x.shape[0], len(rows)
    c_dtypes = [x.dtype if state is None else state.dtype for state in c]
    c = [_wide_state(x, rows[n][0], c[n]) for n in range(L)]
    weights = [[[_shares(w, chunks) for w in row] for row in rows[n]] for n in range(L)]
    bounds = [T * k // chunks for k in range(chunks + 1)]
    streams = _Streams(x, L)
    below: list[list[Tensor]] = [[x[a:b] for a, b in pairwise(bounds)]]
    below += [[] for _ in range(L)]
    states: list[Tensor] = []
    for n, k in _diagonals(L, chunks):
        start, end = bounds[k], bounds[k + 1]
        with streams.of(n):
            part = below[n][k]
            own_lengths = None if lengths is None else (lengths - start).clamp(0, end - start)
            own_reset = None if reset is None else reset[start:end]
            streams.use(n, part, own_reset, h[n], c[n])
            own = [[shares[k] for shares in row] for row in weights[n]]
            y, h[n], c[n], c_all = layer(n, part, own, h[n], c[n], own_lengths, own_reset)
            last = n == L - 1
            below[n + 1].append(y if last else between(y))
            if last:
                states.append(c_all)
    streams.join([*below[L], *states, *(t for t in (*h, *c) if t is not None)])
    output = torch.cat(below[L])
    h_n = [t for t in h if t is not None]
    c_n = [t.to(dtype) for t, dtype in zip(c, c_dtypes, strict=True) if t is not None]
    return output, h_n, c_n, torch.cat(states) if cells else states[-1]


def _wide_state(x: Tensor, row: Sequence[Tensor], c: Tensor | None) -> Tensor | None:
    """c0 of one recurrence, such that c_n has the dtype of accumulation: in that dtype itself."""
    compute = compute_dtype(x.dtype)
    if c is not None or compute == x.dtype:
        return None if c is None else c.to(compute)
    return x.new_zeros(1, x.shape[1], row[1].shape[0] // 4, dtype=compute)


def _shares(w: Tensor, chunks: int) -> Sequence[Tensor]:
    """A weight once for each chunk, such that in 16 bits the sum of its gradients is rounded once.

    autograd alone would add them one by one, and round each sum.
    """
    if w.requires_grad and torch.is_grad_enabled() and compute_dtype(w.dtype) != w.dtype:
        return w.expand(chunks, *w.shape).unbind()
    return [w] * chunks


def _diagonals(L: int, chunks: int) -> Iterator[tuple[int, int]]:
    """(layer, chunk) of those that can run at the same time, then of the next ones.

    The highest layer comes first: it then waits for what the layer below was given to do before,
    not for what that is given to do now.
    """
    for diagonal in range(L + chunks - 1):
        for layer in reversed(range(max(0, diagonal - chunks + 1), min(L, diagonal + 1))):
            yield layer, diagonal - layer


class _Streams:
    """A CUDA stream for each layer, the first layer's being the current one; on a CPU, nothing."""

    def __init__(self, x: Tensor, L: int) -> None:
        self._all: list[torch.cuda.Stream] = []
        if x.device.type == "cuda":
            current = torch.cuda.current_stream(x.device)
            self._all = [current, *(torch.cuda.Stream(x.device) for _ in range(L - 1))]
            for stream in self._all[1:]:
                stream.wait_stream(current)

    @contextmanager
    def of(self, layer: int) -> Iterator[None]:
        """Run on the layer's stream, after what the layer below has been given to do so far."""
        if not self._all:
            yield
            return
        stream = self._all[layer]
        if layer > 0:
            stream.wait_stream(self._all[layer - 1])
        with torch.cuda.stream(stream):
            yield

    def use(self, layer: int, *inputs: Tensor | None) -> None:
        """The layer's stream uses what may be another's: it must not be given away early."""
        for t in inputs if self._all and layer > 0 else ():
            if t is not None:
                t.record_stream(self._all[layer])

    def join(self, results: list[Tensor]) -> None:
        """The current stream waits for all, and may use the results."""
        for stream in self._all[1:]:
            self._all[0].wait_stream(stream)
        for t in results if self._all else ():
            t.record_stream(self._all[0])
