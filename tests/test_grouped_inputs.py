# Fixtures come by import: # ruff: noqa: F401, F811
"""Inputs side by side in one call of the layer op, each read by some of its recurrences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from conftest import CUDA, cuda_missing
from helpers import Data, Problem, Results, arguments, close, make
from test_kernels import ARITHMETICS, TF32_BOUNDS, Machine, cases, machine
from test_scaled_product import SIZES, conversions, scaling
from torch import Tensor

from lstm_cuda import ops

BOUNDS = {a: helpers.BOUNDS[dtype][0] for a, dtype in ARITHMETICS.items()} | {
    "tf32": TF32_BOUNDS[0]
}
OUTPUTS = ("y", "h_n", "c_n", "cells")
# Along which each result of several calls is that of one.
SIDES = {"y": 2, "h_n": 0, "c_n": 0, "cells": 2, "dx": 2, "dh0": 0, "dc0": 0}
SIDES |= dict.fromkeys(("dw_ih", "dw_hh", "db", "dw_hr"), 0)


def drawn(p: Problem, n: int, device: str = "cpu") -> list[Data]:
    """n problems with lengths and resets in common, NaN standing past the lengths."""
    groups = [make(p, device, seed) for seed in range(n)]
    for d in groups:
        d.lengths, d.reset = groups[0].lengths, groups[0].reset
        if d.lengths is not None:
            d.x[torch.arange(p.T, device=device)[:, None] >= d.lengths] = float("nan")
    return groups


def side_by_side(groups: list[Data]) -> Data:
    states = [d.hx for d in groups if d.hx is not None]
    return Data(
        torch.cat([d.x for d in groups], 2),
        (torch.cat([h for h, _ in states]), torch.cat([c for _, c in states])) if states else None,
        [row for d in groups for row in d.weights],
        groups[0].lengths,
        groups[0].reset,
        {name: torch.cat([d.cotangents[name] for d in groups], SIDES[name]) for name in OUTPUTS},
    )


def results(d: Data, reversed: int, tf32: bool = False) -> Results:
    """Outputs and gradients of one call."""
    x, *weights = arguments(d)
    w_ih, w_hh, _, w_hr = weights
    given = (*(d.hx or (None, None)), d.lengths, d.reset, reversed)
    with torch.no_grad():
        y, h_n, c_n, gates, c = ops.layer_forward(x, *weights, *given, True, True, tf32)
        dy, dh_n, dc_n, dc = (d.cotangents[name] for name in OUTPUTS)
        grads = ops.layer_backward(
            dy, dh_n, dc_n, dc.view_as(c).to(c.dtype), x, w_ih, w_hh, w_hr, *given, y, gates, c,
            True, True, tf32,
        )  # fmt: skip
    return dict(zip(SIDES, (y, h_n, c_n, c.flatten(2), *grads), strict=True))


def directions(p: Problem, n: int) -> list[int]:
    """Of each group; in the last of several single recurrences, time runs backwards."""
    return [2 if p.bidirectional else int(0 < g == n - 1) for g in range(n)]


def together_and_apart(
    p: Problem, groups: list[Data], tf32: bool = False, of: torch.dtype | None = None
) -> tuple[Results, Results]:
    """Results of one call, and of one for each group, of those in another dtype if one is given."""
    bits = directions(p, len(groups))
    all_bits = sum(b << (p.D * g) for g, b in enumerate(bits))
    found = results(side_by_side(groups), all_bits, tf32)
    apart = [
        results(d.to(of or d.x.dtype), b, tf32 and of is None)
        for d, b in zip(groups, bits, strict=True)
    ]
    return found, {k: torch.cat([r[k] for r in apart], dim) for k, dim in SIDES.items()}


# Of one group: of one recurrence or, bidirectional, of two.
PROBLEMS = [
    Problem(4, 9, 3, 17, lengths=True),
    Problem(3, 5, 4, 12, bidirectional=True, reset=True, bias=False),
    Problem(4, 3, 1, 11, P=5, lengths=True, reset=True),
    Problem(3, 4, 8, 16, bidirectional=True, P=3, hx=False, lengths=True),
    Problem(1, 1, 5, 7),
]


@cases(PROBLEMS, {"rec_cluster": PROBLEMS[:3], "rec_group": PROBLEMS[2:3]})
def test_each_group_has_what_a_call_of_its_own_gives(
    p: Problem, family: str, arithmetic: str, machine: Machine
) -> None:
    dtype = ARITHMETICS[arithmetic]
    groups = [d.to(dtype) for d in drawn(p, 2 if p.bidirectional else 3, machine.device)]
    with machine.forced(family, arithmetic):
        found, expected = together_and_apart(p, groups, arithmetic == "tf32")
    for name, t in expected.items():
        assert found[name].dtype == t.dtype
        close(found[name], t, BOUNDS[arithmetic])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", helpers.DTYPES, ids=helpers.NAMES.get)
@pytest.mark.parametrize("p", [*PROBLEMS, Problem(6, 70, 33, 65, P=20, lengths=True)], ids=str)
def test_each_group_has_on_a_cpu_what_a_call_of_its_own_gives(
    p: Problem, dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    groups = [d.to(dtype) for d in drawn(p, 2 if p.bidirectional else 3)]
    found, expected = together_and_apart(p, groups)
    for name, t in expected.items():
        assert found[name].dtype == t.dtype
        close(found[name], t, helpers.BOUNDS[dtype][0])


STRIDES: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: torch.cat([x[..., :1], x], 2)[..., 1:],
    lambda x: x.repeat_interleave(2, 2)[..., ::2],
]


@pytest.mark.parametrize("strided", STRIDES)
@pytest.mark.parametrize("lengths", [False, True])
def test_strides_of_the_input_do_not_matter(
    strided: Callable[[Tensor], Tensor], lengths: bool, machine: Machine
) -> None:
    d = side_by_side(drawn(Problem(4, 5, 3, 6, lengths=lengths), 3, machine.device))
    expected = results(d, 0)
    d.x = strided(d.x)
    helpers.assert_equal([*results(d, 0).values()], [*expected.values()])


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
@pytest.mark.parametrize("n", [2, 9])
def test_scaled_products(p: Problem, n: int, scaling: Any) -> None:
    groups = [d.to(torch.float32) for d in drawn(p, n)]
    scaling.force_kernel("rec_step")
    try:
        results(side_by_side(groups), 0, True)
        launched = conversions(scaling)
        found, expected = together_and_apart(p, groups, True, torch.float64)
    finally:
        scaling.force_kernel("")
    for name, t in expected.items():
        close(found[name], t, TF32_BOUNDS[0])
    # As many as for one group.
    assert launched == {
        "scale_rows": 2, "column_maxima": 2, "scale_columns": 2, "unscale": 4 + bool(p.P),
    }  # fmt: skip


def test_no_group_loses_precision_by_another(scaling: Any) -> None:
    """Rows and columns of each are scaled for themselves."""
    p = Problem(3, 4, 5, 6, hx=False)
    sizes = SIZES[SIZES > 1e-16]
    groups = drawn(p, len(sizes))
    for d, size in zip(groups, sizes, strict=True):
        d.weights[0][0] *= size
        d.x /= size
        for t in d.cotangents.values():
            t *= size
    groups = [d.to(torch.float32) for d in groups]
    found, expected = together_and_apart(p, groups, True, torch.float64)
    for name in ("y", "cells", "dx", "dw_ih", "dw_hh", "db"):
        of_group = [t.chunk(len(groups), SIDES[name]) for t in (found[name], expected[name])]
        for a, b in zip(*of_group, strict=True):
            close(a, b, TF32_BOUNDS[0])


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(
    "p", [Problem(8, 128, 512, 128), Problem(8, 128, 131, 130, bidirectional=True)], ids=str
)
def test_scaled_products_on_a_gpu(p: Problem, device: str) -> None:
    if missing := cuda_missing():
        pytest.skip(missing)
    groups = [d.to(torch.float32) for d in drawn(p, 4, device)]
    for d in groups:  # gates of size one, as in test_scaled_product.balanced
        for row in d.weights:
            row[0].detach().mul_((p.H / p.I) ** 0.5)
    found, expected = together_and_apart(p, groups, True, torch.float64)
    for name, t in expected.items():
        close(found[name], t, TF32_BOUNDS[0])


@pytest.mark.parametrize("features", [0, 3, 6, 8])
def test_a_width_that_gives_no_groups(features: int, machine: Machine) -> None:
    """Of 3 recurrences over 4 features each."""
    d = side_by_side(drawn(Problem(3, 2, 4, 5), 3, machine.device))
    d.x = d.x[..., :features]
    with pytest.raises(
        RuntimeError, match=r"x must be \[T, B, n \* 4\].*divides the 3 .*got \[3, 2, "
    ):
        results(d, 0)


@pytest.mark.parametrize("T, B", [(0, 3), (4, 0)])
def test_empty(T: int, B: int, machine: Machine) -> None:
    p = Problem(T, B, 3, 4, bidirectional=True)
    found, expected = together_and_apart(p, drawn(p, 2, machine.device))
    for name, t in expected.items():
        assert found[name].shape == t.shape and helpers.error(found[name], t) == 0, name


def test_meta_tensors_have_the_shapes(machine: Machine) -> None:
    d = side_by_side(drawn(Problem(3, 2, 4, 5, P=2, bidirectional=True), 2, machine.device))
    expected = results(d, 0)
    assert expected["dx"].shape == (3, 2, 8) and expected["dw_ih"].shape == (4, 20, 4)
    meta = Data(
        d.x.to("meta"), tuple(t.to("meta") for t in d.hx),
        [[w.to("meta") for w in row] for row in d.weights], None, None,
        {k: t.to("meta") for k, t in d.cotangents.items()},
    )  # fmt: skip
    for name, t in results(meta, 0).items():
        assert t.shape == expected[name].shape, name
