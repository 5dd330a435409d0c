"""Inputs of a module that are not [T, B, I], made so, and results laid out as these inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .checks import check_pair

_State = tuple[Tensor, Tensor]


def with_batch(
    x: Tensor,
    hx: _State | None,
    lengths: Tensor | Sequence[int] | int | None,
    reset: Tensor | None,
) -> tuple[Tensor, _State | None, Tensor | Sequence[int] | None, Tensor | None]:
    """Unbatched arguments of ``FusedLSTM.forward`` as those of a batch of one.

    Raises:
        TypeError, ValueError, RuntimeError: one has not the dimensions that go with x [T, I].
    """
    if hx is not None:
        h0, c0 = check_pair(hx)
        if h0.dim() != 2 or c0.dim() != 2:
            raise RuntimeError(
                "For unbatched 2-D input, hx and cx should also be 2-D but got "
                f"({h0.dim()}-D, {c0.dim()}-D) tensors"
            )
        hx = (h0.unsqueeze(1), c0.unsqueeze(1))
    if isinstance(lengths, int):
        lengths = [lengths]
    elif isinstance(lengths, Tensor) and lengths.dim() == 0:
        lengths = lengths.unsqueeze(0)
    if isinstance(reset, Tensor):
        if reset.dim() != 1:
            raise ValueError(
                f"reset must be [{x.shape[0]}] (time) for unbatched input; got {list(reset.shape)}"
            )
        reset = reset.unsqueeze(1)
    return x.unsqueeze(1), hx, lengths, reset


def without_batch(output: Tensor, state: _State, *cells: Tensor) -> tuple[Any, ...]:
    """The results for a batch of one as those of unbatched input."""
    h_n, c_n = state
    return (
        output.squeeze(1),
        (h_n.squeeze(1), c_n.squeeze(1)),
        *(c.squeeze(1) for c in cells),
    )


class PackedLayout:
    """Where the rows of a PackedSequence stand in [T, B, ...], its longest sequence first.

    Attributes:
        B: sequences.
        lengths: [B], on the CPU.
        ragged: they differ.
    """

    def __init__(self, packed: PackedSequence) -> None:
        self._given = packed
        self._data, batch_sizes, self._order, _ = packed
        if self._data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {self._data.dim()}")
        self.T, self.B = batch_sizes.numel(), int(batch_sizes[0])
        # Row t of the data holds the first batch_sizes[t] sequences; found on the CPU, where
        # batch_sizes is.
        present = torch.arange(self.B) < batch_sizes[:, None]
        self._index = present.flatten().nonzero().squeeze(1).to(self._data.device)
        self.lengths = present.sum(0)
        self.ragged = int(batch_sizes[-1]) < self.B

    def x(self) -> Tensor:
        """The data as [T, B, I], zeros past the ends."""
        # In place: autocast casts the other form, and refuses a 16-bit dtype that is not its own.
        zeros = self._data.new_zeros(self.T * self.B, self._data.shape[1])
        return zeros.index_copy_(0, self._index, self._data).view(self.T, self.B, -1)

    def reset(self, reset: Tensor | None, batch_first: bool) -> Tensor | None:
        """``reset`` in this order; what does not fit is for ``fused_lstm`` to complain about."""
        if isinstance(reset, Tensor) and reset.dim() == 2:
            reset = reset.transpose(0, 1) if batch_first else reset
            if self._order is not None and reset.shape == (self.T, self.B):
                reset = reset.index_select(1, self._order)
        return reset

    def packed(self, t: Tensor) -> PackedSequence:
        """[T, B, ...] as the PackedSequence that the input was."""
        rows = t.flatten(0, 1).index_select(0, self._index)
        return PackedSequence(rows, *self._given[1:])
