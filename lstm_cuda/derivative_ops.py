"""The registered ops for derivatives beyond the first, on CPUs: typed wrappers and fakes.

All tensors are float64, or all are float32. Shapes are those of ``recurrence.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops


def changes(
    transposed: bool,
    source_x: Tensor | None,
    source_z: Tensor | None,
    source_gates: Tensor | None,
    source_c: Tensor | None,
    source_m: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    W: Tensor,
    V: Tensor | None,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, z, c and m of ``recurrence.tangents`` or, transposed, of ``recurrence.adjoints``.

    x is [0] unless transposed, and without V.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _changes(
        transposed, source_x, source_z, source_gates, source_c, source_m, gates, cells, c0, W, V,
        fresh,
    )  # fmt: skip
    return result


def cell_gradients(
    source_gates: Tensor | None,
    dc: Tensor,
    dm: Tensor,
    z: Tensor,
    change_c: Tensor,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``recurrence_steps.cell_gradients`` on CPUs, in one pass; dc0 is [0] without c0."""
    result: tuple[Tensor, Tensor, Tensor] = _cell_gradients(
        source_gates, dc, dm, z, change_c, gates, cells, c0, fresh
    )
    return result


def tangents_with_gradients(
    source_x: Tensor | None,
    source_z: Tensor | None,
    source_c: Tensor | None,
    source_m: Tensor | None,
    source_gates: Tensor | None,
    dc: Tensor,
    dm: Tensor,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    W: Tensor,
    V: Tensor | None,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """c and m of ``tangents``, and ``cell_gradients`` from its z, which is kept nowhere."""
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _tangents_with_gradients(
        source_x, source_z, source_c, source_m, source_gates, dc, dm, gates, cells, c0, W, V,
        fresh,
    )  # fmt: skip
    return result


def product(a: Tensor, w: Tensor) -> Tensor:
    """a [T, D, B, m] times w [D, m, n], of any strides, float64 or float32, on CPUs."""
    result: Tensor = _product(a, w)
    return result


def outer_products(a: Tensor, b: Tensor) -> Tensor:
    """The sum over t and b of those of a [T, D, B, m] and b [T, D, B, n]: [D, m, n]; likewise."""
    result: Tensor = _outer_products(a, b)
    return result


def _changes_fake(
    transposed: bool,
    source_x: Tensor | None,
    source_z: Tensor | None,
    source_gates: Tensor | None,
    source_c: Tensor | None,
    source_m: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    W: Tensor,
    V: Tensor | None,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, c, m = (t.new_empty(t.shape) for t in (gates, cells, cells))
    x = cells.new_empty((*cells.shape[:3], V.shape[2]) if transposed and V is not None else 0)
    return x, z, c, m


def _cell_gradients_fake(
    source_gates: Tensor | None,
    dc: Tensor,
    dm: Tensor,
    z: Tensor,
    change_c: Tensor,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dc0 = cells.new_empty(0 if c0 is None else c0.shape)
    return gates.new_empty(gates.shape), cells.new_empty(cells.shape), dc0


def _tangents_with_gradients_fake(
    source_x: Tensor | None,
    source_z: Tensor | None,
    source_c: Tensor | None,
    source_m: Tensor | None,
    source_gates: Tensor | None,
    dc: Tensor,
    dm: Tensor,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    W: Tensor,
    V: Tensor | None,
    fresh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    c, m, dcells = (cells.new_empty(cells.shape) for _ in range(3))
    dc0 = cells.new_empty(0 if c0 is None else c0.shape)
    return c, m, gates.new_empty(gates.shape), dcells, dc0


def _product_fake(a: Tensor, w: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:3], w.shape[2])


def _outer_products_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], a.shape[3], b.shape[3])


if ops.load_error is None:
    _changes = torch.ops.lstm_cuda.changes.default
    _cell_gradients = torch.ops.lstm_cuda.cell_gradients.default
    _tangents_with_gradients = torch.ops.lstm_cuda.tangents_with_gradients.default
    _product = torch.ops.lstm_cuda.product.default
    _outer_products = torch.ops.lstm_cuda.outer_products.default
    torch.library.register_fake("lstm_cuda::changes", _changes_fake)
    torch.library.register_fake("lstm_cuda::cell_gradients", _cell_gradients_fake)
    torch.library.register_fake("lstm_cuda::tangents_with_gradients", _tangents_with_gradients_fake)
    torch.library.register_fake("lstm_cuda::product", _product_fake)
    torch.library.register_fake("lstm_cuda::outer_products", _outer_products_fake)
