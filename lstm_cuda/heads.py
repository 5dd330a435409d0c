"""A recurrence in blocks: the heads of a layer are recurrences side by side, over the same x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from . import ops
from .batching import as_int64

State = TypeVar("State", Tensor, Tensor | None)
Rows = Sequence[Sequence[Tensor]]


def check_heads(heads: int, hidden_size: int, proj_size: int = 0) -> None:
    """Raise TypeError or ValueError unless a layer of these sizes can be cut into the heads."""
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(f"heads must be an int; got {type(heads).__name__}")
    if heads < 1:
        raise ValueError(f"heads must be at least 1; got {heads}")
    for name, size in (("hidden_size", hidden_size), ("proj_size", proj_size)):
        if size % heads != 0:
            raise ValueError(f"heads must divide {name}, {size}; got {heads}")


def check_recurrences(heads: int, directions: int) -> None:
    """Raise ValueError where the fused op cannot take all heads of a layer in one call."""
    most = ops.max_recurrences()
    if heads * directions > most:
        raise ValueError(
            f"heads times directions must be at most {most} on the fused op; got {heads} times "
            f'{directions}. backend="torch" takes any number.'
        )


def split_rows(rows: Rows, heads: int, of_gates: int) -> list[list[Tensor]]:
    """The rows of each head, those of the first row's heads first.

    Args:
        rows: parameters of a layer and direction.
        heads: into how many blocks the units are cut.
        of_gates: how many of a row's parameters, its first ones, have the four blocks of gates for
            their first dimension; that of the others is of the state.
    """
    parts = [
        [
            _blocks(w, heads, 4 if k < of_gates else 1).transpose(0, 1).flatten(1, 2)
            for k, w in enumerate(row)
        ]
        for row in rows
    ]
    return [list(head) for row in parts for head in zip(*row, strict=True)]


def split_states(state: State, heads: int) -> State:
    """[D, B, H] as [D * heads, B, H / heads]."""
    if state is None:
        return None
    return state.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)


def merge_states(state: Tensor, heads: int) -> Tensor:
    """[D * heads, B, H / heads] as [D, B, H]."""
    return state.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def split_directions(reversed: int, directions: int, heads: int) -> int:
    """``reversed`` with a bit for each head of each direction."""
    ones = (1 << heads) - 1
    return as_int64(sum((reversed >> d & 1) * ones << d * heads for d in range(directions)))


def dense(w: Tensor, heads: int, gates: int) -> Tensor:
    """The block-diagonal matrix, as one head has it, of w_hh (4 gates) or w_hr (1)."""
    blocks = _blocks(w, heads, gates)
    matrix = w.new_zeros(*blocks.shape[:3], heads, w.shape[1])
    matrix.diagonal(0, 1, 3).copy_(blocks.movedim(1, 3))
    return matrix.flatten(3).flatten(0, 2)


def _blocks(w: Tensor, heads: int, gates: int) -> Tensor:
    """[gates, heads, rows of one head, ...]"""
    return w.unflatten(0, (gates, heads, -1))
