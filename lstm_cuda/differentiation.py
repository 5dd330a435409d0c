"""Gradients as functions that can be differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def pulled_back(
    function: Callable[[list[Any]], Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of a function's inputs, for an autograd Function's backward.

    Inputs count as independent of each other, whichever are made of others: autograd follows the
    paths between them itself.

    Args:
        function: takes a list like ``inputs`` and gives as many results as there are ``grads``.
        inputs: what it is differentiated at.
        needs: whether a gradient of each is wanted.
        grads: of the results, or None where there is none.

    Returns:
        A gradient for each input, None where none is wanted.
    """
    wanted = [k for k, need in enumerate(needs) if need]
    present = [k for k, grad in enumerate(grads) if grad is not None]

    def some(*by: Tensor) -> tuple[Tensor, ...]:
        given: list[Any] = list(inputs)
        for k, t in zip(wanted, by, strict=True):
            given[k] = t
        results = function(given)
        return tuple(results[k] for k in present)

    pull_back = torch.func.vjp(some, *(inputs[k] for k in wanted))[1]
    found: list[Tensor | None] = [None] * len(inputs)
    pulled = pull_back(tuple(grads[k] for k in present))
    for k, grad in zip(wanted, pulled, strict=True):
        found[k] = grad
    return found
