"""``torch.func.vmap`` over a layer: one call of a larger layer, not a call for each member.

Members that share their weights are more rows of one batch; members with weights of their own are
more recurrences. ``lengths`` and ``reset`` are the same for all recurrences of a call, so members
with weights and one of these of their own are called one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from . import ops

Dim = int | None
W = TypeVar("W", Tensor, Tensor | None)


class Place(NamedTuple):
    """Which dimension of a tensor counts what; None: none does."""

    row: Dim
    recurrence: Dim


# Of what a layer takes and gives: where something stands for each step, and for each sequence.
STEPS = Place(1, 2)  # [T, B, D*P] or [T, B, D, H]
STATES = Place(1, 0)  # [D, B, P]
WEIGHTS = Place(None, 0)  # gradients [D, ...]
LENGTHS = Place(0, None)  # [B]
RESET = Place(1, None)  # [T, B]


class Arguments(NamedTuple):
    """Those of a call for D recurrences.

    Attributes:
        x: [T, B, n*I].
        others: tensors in their places.
        weights: lists of D tensors one after the other, w_ih first.
        reversed: bit d: recurrence d runs backwards.
    """

    x: Tensor
    others: Sequence[Tensor | None]
    weights: Sequence[Tensor]
    D: int
    reversed: int


class Dims(NamedTuple):
    """The batch dimension of each tensor of ``Arguments``; None where all members share one."""

    x: Dim
    others: Sequence[Dim]
    weights: Sequence[Dim]


Results = tuple[Tensor, ...]
Call = Callable[[Arguments], Results]


def fold(t: W, dim: Dim, size: int, into: int) -> W:
    """t with its batch dimension ``dim`` as the outer part of dimension ``into``.

    Where t has none, ``size`` copies take its place.
    """
    if t is None:
        return None
    if dim is None:
        shape = (*t.shape[:into], size, *t.shape[into:])
        return t.unsqueeze(into).expand(shape).flatten(into, into + 1)
    return t.movedim(dim, into).flatten(into, into + 1)


def as_int64(bits: int) -> int:
    """Up to 64 bits as the ops take them."""
    return bits - (1 << 64) if bits >> 63 else bits


def batched(
    call: Call,
    size: int,
    given: Arguments,
    dims: Dims,
    places: Sequence[Place],
    result_places: Sequence[Place],
    own_inputs: bool = False,
) -> tuple[Results, tuple[Dim, ...]]:
    """What ``call`` gives for each of ``size`` members.

    Args:
        call: runs one layer.
        given, dims: its arguments, and which of them differ between members.
        places: of ``given.others``.
        result_places: of what ``call`` returns. A result that is not wanted is 1-D.
        own_inputs: recurrences must not share x, as there is a result for each.

    Returns:
        The results, and the batch dimension of each.
    """
    if size == 0:  # as one member of zeros, of which nothing is taken

        def zeros(t: Tensor, dim: int) -> Tensor:
            return torch.zeros_like(t.sum(dim, keepdim=True), dtype=t.dtype)  # sums widen bool

        one = _with_members(given, dims, zeros)
        results, out_dims = batched(call, 1, one, dims, places, result_places, own_inputs)
        none = (
            t if dim is None else t.narrow(dim, 0, 0)
            for t, dim in zip(results, out_dims, strict=True)
        )
        return tuple(none), out_dims
    if all(dim is None for dim in dims.weights):
        rows = [place.row for place in places]
        results = call(
            given._replace(
                x=fold(given.x, dims.x, size, 1),
                others=_fold_each(given.others, dims.others, size, rows),
            )
        )
        return _unfold(results, size, [place.row for place in result_places])
    apart = any(
        dim is not None and place.recurrence is None
        for dim, place in zip(dims.others, places, strict=True)
    )
    most = 1 if apart else max(1, ops.max_recurrences() // given.D)
    parts = []
    for start in range(0, size, most):
        count = min(most, size - start)
        some = _with_members(given, dims, lambda t, dim: t.narrow(dim, start, count))  # noqa: B023
        parts.append(_as_recurrences(call, count, some, dims, places, result_places, own_inputs))
    if len(parts) == 1:
        return parts[0]
    out_dims = parts[0][1]
    columns = zip(*(results for results, _ in parts), strict=True)
    joined = tuple(
        column[0] if dim is None else torch.cat(column, dim)
        for column, dim in zip(columns, out_dims, strict=True)
    )
    return joined, out_dims


def _as_recurrences(
    call: Call,
    size: int,
    given: Arguments,
    dims: Dims,
    places: Sequence[Place],
    result_places: Sequence[Place],
    own_inputs: bool,
) -> tuple[Results, tuple[Dim, ...]]:
    x, others, weights, D, reversed = given
    of_members = [
        (w,) * size if dim is None else w.unbind(dim)
        for w, dim in zip(weights, dims.weights, strict=True)
    ]
    # All may read one input, but several inputs would be read by the wrong ones.
    if own_inputs or dims.x is not None or x.shape[2] != of_members[0][0].shape[-1]:
        x = fold(x, dims.x, size, 2)
    mine = reversed & (1 << D) - 1
    kinds = [of_members[k : k + D] for k in range(0, len(weights), D)]
    results = call(
        Arguments(
            x,
            _fold_each(others, dims.others, size, [place.recurrence for place in places]),
            [w for kind in kinds for member in zip(*kind, strict=True) for w in member],
            size * D,
            as_int64(sum(mine << D * k for k in range(size))),
        )
    )
    return _unfold(results, size, [place.recurrence for place in result_places])


def _with_members(given: Arguments, dims: Dims, of: Callable[[Tensor, int], Tensor]) -> Arguments:
    """The arguments with ``of`` each that differs between members."""

    def changed(t: W, dim: Dim) -> W:
        return t if t is None or dim is None else of(t, dim)

    return given._replace(
        x=changed(given.x, dims.x),
        others=[changed(t, dim) for t, dim in zip(given.others, dims.others, strict=True)],
        weights=[changed(w, dim) for w, dim in zip(given.weights, dims.weights, strict=True)],
    )


def _fold_each(
    tensors: Sequence[Tensor | None], dims: Sequence[Dim], size: int, into: Sequence[Dim]
) -> list[Tensor | None]:
    """Each folded; where nothing tells members apart, there is one, whose own it is."""
    return [
        (t if t is None or dim is None else t.squeeze(dim))
        if place is None
        else fold(t, dim, size, place)
        for t, dim, place in zip(tensors, dims, into, strict=True)
    ]


def _unfold(results: Results, size: int, places: Sequence[Dim]) -> tuple[Results, tuple[Dim, ...]]:
    dims = tuple(None if t.dim() == 1 else place for t, place in zip(results, places, strict=True))
    unfolded = tuple(
        t if dim is None else t.unflatten(dim, (size, -1))
        for t, dim in zip(results, dims, strict=True)
    )
    return unfolded, dims
