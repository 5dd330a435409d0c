"""Layer upon layer on the fused op; on CUDA, where it pays, in a wavefront."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from . import ops
from .layer import fused_layer, tf32_allowed
from .packed import PackedWeights


def wavefront_chunks(x: Tensor, weights: Sequence[Sequence[Tensor]], D: int, reversed: int) -> int:
    """Into how many chunks of time a stack is cut so that layers run side by side; 1: it is not.

    Layer l's chunk k needs only layer l - 1's chunk k and its own chunk k - 1, so layer l can be
    one chunk behind layer l - 1. Not so where a direction runs backwards in time, which needs all
    of the layer below first. Between chunks the cell state has x's dtype: only where that is the
    dtype of accumulation is nothing lost.

    Args:
        x: [T, B, I].
        weights: L*D rows as for ``fused_lstm``.
        D: directions.
        reversed: bit d: direction d runs backwards.
    """
    L = len(weights) // D
    if L == 1 or D > 1 or reversed or x.device.type != "cuda":
        return 1
    if ops.compute_dtype(x.dtype) != x.dtype or torch.compiler.is_compiling():
        return 1
    T, B, _ = x.shape
    G, P = weights[0][1].shape
    device = ops.CudaDevice.of(x.device)
    return ops.wavefront_chunks(
        L, T, B, G // 4, P, x.dtype, tf32_allowed(x.device.type, x.dtype), device
    )


def run_stack(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reversed: int,
    D: int,
    cells: bool,
    between: Callable[[Tensor], Tensor],
    chunks: int = 1,
    packed: Sequence[PackedWeights] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """All layers of a stack.

    Args:
        x ... reversed: as for ``layer.fused_layer``; ``weights``, ``h0`` and ``c0`` of all layers.
        D: recurrences of a layer.
        cells: the cell states of the last layer are wanted.
        between: what is done to the output of each layer but the last (dropout).
        chunks: of time, at most T; more than one only with one recurrence that runs forwards.
        packed: where each layer's packed weights are kept, or None.

    Returns:
        output [T, B, D*P]; h_n and c_n [D, B, ...] of each layer; cells, meaningless unless asked
        for.
    """
    L = len(weights) // D
    rows = [weights[layer * D : (layer + 1) * D] for layer in range(L)]
    kept: Sequence[PackedWeights | None] = [None] * L if packed is None else packed
    h = [None if h0 is None or L == 1 else h0[k * D : (k + 1) * D] for k in range(L)]
    c = [None if c0 is None or L == 1 else c0[k * D : (k + 1) * D] for k in range(L)]
    if L == 1:
        h, c = [h0], [c0]
    if chunks == 1:
        h_n, c_n = [], []
        for layer in range(L):
            last = layer == L - 1
            x, h_last, c_last, states = fused_layer(
                x, rows[layer], h[layer], c[layer], lengths, reset, reversed, cells and last,
                kept[layer],
            )  # fmt: skip
            h_n.append(h_last)
            c_n.append(c_last)
            if not last:
                x = between(x)
        return x, h_n, c_n, states
    return _wavefront(x, rows, h, c, lengths, reset, cells, between, chunks, kept)


def _wavefront(
    x: Tensor,
    rows: list[Sequence[Sequence[Tensor]]],
    h: list[Tensor | None],
    c: list[Tensor | None],
    lengths: Tensor | None,
    reset: Tensor | None,
    cells: bool,
    between: Callable[[Tensor], Tensor],
    chunks: int,
    kept: Sequence[PackedWeights | None],
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Each layer on a stream of its own, in chunks of time; backward follows the same streams."""
    T, L = x.shape[0], len(rows)
    bounds = [T * k // chunks for k in range(chunks + 1)]
    streams = _Streams(x, L)
    below: list[list[Tensor]] = [[x[a:b] for a, b in pairwise(bounds)]]
    below += [[] for _ in range(L)]
    states: list[Tensor] = []
    for layer, k in _diagonals(L, chunks):
        start, end = bounds[k], bounds[k + 1]
        last = layer == L - 1
        with streams.of(layer):
            part = below[layer][k]
            own_lengths = None if lengths is None else (lengths - start).clamp(0, end - start)
            own_reset = None if reset is None else reset[start:end]
            streams.use(layer, part, own_reset, h[layer], c[layer])
            y, h[layer], c[layer], c_all = fused_layer(
                part, rows[layer], h[layer], c[layer], own_lengths, own_reset, 0, cells and last,
                kept[layer],
            )  # fmt: skip
            below[layer + 1].append(y if last else between(y))
            if last:
                states.append(c_all)
    streams.join([*below[L], *states, *(t for t in (*h, *c) if t is not None)])
    output = torch.cat(below[L])
    h_n = [t for t in h if t is not None]
    c_n = [t for t in c if t is not None]
    return output, h_n, c_n, torch.cat(states) if cells else states[-1]


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
