"""Where a sequence is cut into segments of time, and what of it belongs to each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Steps start to end, number n of the sequence, and what belongs to them.

    ``entry`` is the step that the boundary by which the recurrence comes in stands before; 0 or T
    where it starts from h0 and c0. ``before`` and ``after`` count the other steps in its order.
    """

    n: int
    start: int
    end: int
    entry: int
    before: int
    after: int
    x: Tensor
    lengths: Tensor | None
    reset: Tensor | None


class Cuts:
    """A sequence cut before every ``steps``-th step of time, for recurrences of one direction.

    Args:
        x, lengths, reset: as for ``reference.lstm_layer``.
        backwards: they run from the last step to the first.
        steps: of a segment.
    """

    def __init__(
        self, x: Tensor, lengths: Tensor | None, reset: Tensor | None, backwards: bool, steps: int
    ) -> None:
        self.x, self.lengths, self.reset = x, lengths, reset
        self.backwards, self.steps = backwards, steps

    def segments(self) -> list[Segment]:
        """All segments, in the order of the recurrence."""
        T = self.x.shape[0]
        found = []
        for n, start in enumerate(range(0, T, self.steps)):
            end = min(start + self.steps, T)
            entry, others = (end, (T - end, start)) if self.backwards else (start, (start, T - end))
            found.append(
                Segment(
                    n, start, end, entry, *others, self.x[start:end],
                    None if self.lengths is None else (self.lengths - start).clamp(0, end - start),
                    None if self.reset is None else self.reset[start:end],
                )
            )  # fmt: skip
        return found[::-1] if self.backwards else found

    def closed(self, entry: int, truncate: int = 0) -> Tensor | None:
        """[B], the rows in which nothing crosses the boundary before step ``entry``; None: in none.

        A row that ends before it has no state to hold back there: h0 and h_n pass.
        """
        T, B, _ = self.x.shape
        if not 0 < entry < T:
            return None
        if truncate > 0 and entry % truncate == 0:
            rows = self.x.new_ones(B, dtype=torch.bool)
        elif self.reset is not None:
            rows = self.reset[entry]
        else:
            return None
        return rows if self.lengths is None else rows & (self.lengths > entry)
