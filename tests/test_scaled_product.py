"""Large float32 products through float16 (csrc/cuda/scaled_product.h).

The kernels under emulation, and the whole op where TF32 is allowed, under emulation and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from conftest import CUDA, cuda_missing
from emulation import build
from helpers import Problem, assert_accurate, assert_equal, call, error, make, run, truth
from torch import Tensor

from lstm_cuda import layer, ops

# (order, seed, rounds)
RUNS = {
    "plain": [("forward", 1, 40), ("reverse", 2, 40), *(("random", s, 20) for s in range(3, 7))],
    "asan": [("random", 7, 20)],
    "tsan": [("forward", 8, 5), ("random", 9, 5)],
}
ALL = "y h_n c_n cells"
# As in test_kernels.py: products of ten bits.
TF32_BOUNDS = (2e-3, 1e-3)


@pytest.fixture(scope="module", params=RUNS)
def program(request: pytest.FixtureRequest) -> tuple[Path, str]:
    variant = str(request.param)
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    sources = ["tests/emulation/scaled_product.cpp", "csrc/cuda/scaled_product.cu"]
    out = build.FOLDER / f"scaled_product-{variant}"
    return build.compile([build.ROOT / s for s in sources], variant, out), variant


def test_every_value_is_converted_and_scaled_back(program: tuple[Path, str]) -> None:
    path, variant = program
    for arguments in RUNS[variant]:
        done = build.run(path, *map(str, arguments), variant=variant)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        assert done.stdout == ""


@pytest.fixture
def scaling(emulated_ops: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The emulator, with TF32 allowed and every product large enough."""
    monkeypatch.setattr(layer, "tf32_allowed", lambda *_: True)
    monkeypatch.setitem(helpers.BOUNDS, torch.float32, TF32_BOUNDS)
    emulated_ops.scale_products(all=True)
    emulated_ops.take_launches()
    yield emulated_ops
    emulated_ops.scale_products(all=False)


def conversions(emulator: Any) -> dict[str, int]:
    """How often each kernel of scaled products was launched since this was asked last."""
    names = emulator.take_launches()
    kinds = ("scale_rows", "column_maxima", "scale_columns", "unscale")
    return {kind: names.count(kind) for kind in kinds}


def balanced(p: Problem, device: str = "cpu") -> helpers.Data:
    """Gates of size one, however wide x is: of larger ones, ten bits are few for a sigmoid."""
    d = make(p, device)
    with torch.no_grad():
        for row in d.weights:
            row[0] *= min(1, p.H / p.I) ** 0.5
    return d


PROBLEMS = [
    Problem(1, 2, 1, 3),
    Problem(7, 3, 5, 31),
    Problem(3, 9, 8, 16, hx=False),
    Problem(4, 9, 3, 17, bidirectional=True, bias=False),
    Problem(5, 9, 8, 8, bidirectional=True, lengths=True, reset=True),
    Problem(5, 17, 140, 5, reverse=True, reset=True, lengths=True),
    Problem(3, 19, 6, 130, lengths=True),
    Problem(6, 4, 3, 11, P=5, reset=True),
    Problem(5, 7, 3, 19, P=1, bidirectional=True, lengths=True, reset=True),
]


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_accuracy(p: Problem, scaling: Any) -> None:
    # Where a projection is folded into the weights, more are made: test_projection.py.
    assert scaling.force_kernel("rec_step" if p.P else "")
    try:
        assert_accurate(p, balanced(p), torch.float32, ALL)
    finally:
        scaling.force_kernel("")
    products = 4 + bool(p.P)  # gates, dx, dw_ih, dw_hh, dw_hr
    # By rows: x and w_ih together; dgates. By columns: w_ih; all that dw needs together.
    assert conversions(scaling) == {
        "scale_rows": 2, "column_maxima": 2, "scale_columns": 2, "unscale": products,
    }  # fmt: skip


@pytest.mark.parametrize("p", PROBLEMS[4:], ids=str)
def test_the_order_of_threads_changes_nothing(p: Problem, scaling: Any) -> None:
    first = None
    for order in [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]:
        scaling.set_order(*order)
        results = run(call, p, make(p).to(torch.float32), ALL)
        first = first or results
        assert_equal([*results.values()], [*first.values()])
    scaling.set_order("forward", 0)


def test_exact_where_tf32_is_not_allowed_and_in_other_types(
    scaling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = PROBLEMS[1]
    for dtype in (torch.float64, torch.bfloat16):
        run(call, p, make(p).to(dtype), ALL)
    monkeypatch.setattr(layer, "tf32_allowed", lambda *_: False)
    run(call, p, make(p).to(torch.float32), ALL)
    assert not any(conversions(scaling).values())


def test_small_products_are_exact(scaling: Any) -> None:
    scaling.scale_products(all=False)
    p = PROBLEMS[1]
    run(call, p, make(p).to(torch.float32), ALL)
    assert not any(conversions(scaling).values())


# Of these products, dw_hh is a small one.
LARGE = Problem(8, 128, 2048, 32)


def test_large_products_are_scaled(scaling: Any) -> None:
    scaling.scale_products(all=False)
    assert_accurate(LARGE, balanced(LARGE), torch.float32, ALL)
    assert conversions(scaling) == {
        "scale_rows": 2, "column_maxima": 2, "scale_columns": 2, "unscale": 3,
    }  # fmt: skip


STRIDES: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: torch.cat([torch.full_like(x, float("nan")), x], 2)[:, :, x.shape[2] :],
    lambda x: torch.stack([x, torch.full_like(x, float("nan"))], 1)[:, 0],
    lambda x: torch.stack([x, torch.full_like(x, float("nan"))], 3)[..., 0],
]


@pytest.mark.parametrize("strided", STRIDES)
@pytest.mark.parametrize("I", [1, 7, 12])  # rows that are aligned, and not
@pytest.mark.parametrize("lengths", [False, True])
def test_strides_of_the_input_do_not_matter(
    strided: Callable[[Tensor], Tensor],
    I: int,  # noqa: E741
    lengths: bool,
    scaling: Any,
) -> None:
    p = Problem(4, 5, I, 6, lengths=lengths)
    d = make(p).to(torch.float32)
    expected = run(call, p, d, ALL)
    d.x = strided(d.x.detach()).requires_grad_()
    assert_equal([*run(call, p, d, ALL).values()], [*expected.values()])


def test_a_nan_stays_in_its_row(scaling: Any) -> None:
    p = Problem(4, 9, 3, 12, bidirectional=True)
    d, bad = make(p).to(torch.float32), make(p).to(torch.float32)
    with torch.no_grad():
        bad.x[1, 3, 0] = float("nan")
        bad.x[2, 5, 1] = float("inf")
    good, spoiled = run(call, p, d, ALL), run(call, p, bad, ALL)
    rows = [b for b in range(p.B) if b not in (3, 5)]
    for name in ("y", "cells", "dx", "h_n", "c_n", "dh0", "dc0"):
        assert_equal(spoiled[name][:, rows], good[name][:, rows])
    assert bool(spoiled["y"][1, 3].isnan().all())
    assert bool(spoiled["y"][1:, 3].isnan().any())


def lines_accurate(out: Tensor, ref: Tensor, dim: int, bound: float = 2e-3) -> None:
    """Norm-wise, each of the lines along the dimension for itself."""
    for k, (a, b) in enumerate(zip(out.unbind(dim), ref.unbind(dim), strict=True)):
        e = error(a, b)
        assert e <= bound, f"{k}: error {e:.2e} of norm {b.norm():.2e}"


SIZES = 10.0 ** torch.arange(-30, 18, 4).double()  # what float16 alone would not hold


def test_rows_of_any_size_keep_their_precision(scaling: Any) -> None:
    """Gradients of batch rows, of which each is scaled for itself."""
    p = Problem(3, len(SIZES), 21, 16, hx=False)
    d = make(p)
    for name in ("y", "h_n", "c_n", "cells"):
        d.cotangents[name] *= SIZES[:, None]
    d = d.to(torch.float32)
    d64 = d.to(torch.float64)
    lines_accurate(run(call, p, d, ALL)["dx"], run(truth, p, d64, ALL)["dx"], 1)


def test_rows_of_the_input_of_any_size(scaling: Any) -> None:
    """Of a layer that sees nothing but x, tiny where x is."""
    sizes = SIZES[SIZES < 1e-3]
    p = Problem(1, len(sizes), 21, 16, bias=False, hx=False)
    d = make(p)
    with torch.no_grad():
        d.x *= sizes[:, None]
    d = d.to(torch.float32)
    lines_accurate(call(p, d)["cells"], call(p, d.to(torch.float64), "torch")["cells"], 1)


def test_columns_of_any_size_keep_their_precision(scaling: Any) -> None:
    """dw_ih's, which are as large as the columns of x."""
    sizes = SIZES[SIZES < 10]
    p = Problem(5, 6, len(sizes), 16)
    d = make(p)
    with torch.no_grad():
        d.x *= sizes
    d = d.to(torch.float32)
    name = "dweights[0][0]"
    lines_accurate(run(call, p, d, ALL)[name], run(truth, p, d.to(torch.float64), ALL)[name], 1)


def test_one_huge_value_among_tiny_ones(scaling: Any) -> None:
    """No other row of x and no other column of dw_ih loses by it."""
    p = Problem(4, 5, 9, 8)
    d = make(p)
    with torch.no_grad():
        d.x *= 1e-20
        d.x[1, 2, 3] = 1e25
    d = d.to(torch.float32)
    out, ref = run(call, p, d, ALL), run(truth, p, d.to(torch.float64), ALL)
    lines_accurate(out["y"], ref["y"], 1)
    lines_accurate(out["dx"], ref["dx"], 1)
    # Its own column depends on how far from zero the derivatives of saturated gates are.
    others = [j for j in range(p.I) if j != 3]
    lines_accurate(out["dweights[0][0]"][:, others], ref["dweights[0][0]"][:, others], 1)


def test_zeros_and_denormals(scaling: Any) -> None:
    p = Problem(1, 4, 6, 8, bias=False, hx=False)
    d = make(p)
    with torch.no_grad():
        d.x[:, 0] = 0
        d.x[:, 1] *= 1e-40
    d = d.to(torch.float32)
    results = run(call, p, d, ALL)
    assert not bool(results["cells"][:, 0].any())
    expected = run(truth, p, d.to(torch.float64), ALL)
    # A denormal result has few bits; a unit of its last place is 1.4e-45.
    difference = results["cells"][:, 1] - expected["cells"][:, 1]
    assert float(difference.detach().abs().max()) < 1e-43
    lines_accurate(results["dx"], expected["dx"], 1)


def test_a_refusal_of_torch_makes_way_for_exact_products_for_good(scaling: Any) -> None:
    p = Problem(4, 5, 9, 8, P=3, bidirectional=True)
    d = make(p).to(torch.float32)
    scaling.scale_products(all=False)
    expected = run(call, p, d, ALL)
    scaling.take_launches()
    scaling.scale_products(all=True, refused=True)
    try:
        launched = []
        for _ in range(2):
            assert_equal([*run(call, p, d, ALL).values()], [*expected.values()])
            launched.append(conversions(scaling)["scale_rows"])
    finally:
        scaling.scale_products(all=True)
    assert launched == [1, 0]


def test_a_refusal_during_backward(scaling: Any) -> None:
    p = Problem(4, 5, 9, 8, P=3, bidirectional=True)
    d = make(p).to(torch.float32)
    d64 = d.to(torch.float64)
    outputs = call(p, d)
    scaling.scale_products(all=True, refused=True)
    try:
        found = helpers.gradients(outputs, d, ALL)
    finally:
        scaling.scale_products(all=True)
    for name, t in helpers.gradients(truth(p, d64), d64, ALL).items():
        assert error(found[name], t) <= TF32_BOUNDS[0], name


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize(
    "p",
    [
        LARGE,
        Problem(16, 64, 512, 512, bidirectional=True, lengths=True),
        Problem(16, 64, 513, 515, P=257, bidirectional=True),
        Problem(32, 64, 1024, 1024),
    ],
    ids=str,
)
def test_on_a_gpu(p: Problem, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := cuda_missing():
        pytest.skip(missing)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setitem(helpers.BOUNDS, torch.float32, TF32_BOUNDS)
    d = balanced(p, device)
    assert_accurate(p, d, torch.float32, ALL)
    if p.P:
        return
    # That it was not exact shows that it was done in another way.
    d = d.to(torch.float32)
    w_ih, w_hh, *bias = d.weights[0]
    with torch.no_grad():
        exact, scaled = (
            ops.layer_forward(
                d.x, [w_ih], [0 * w_hh], bias, [], None, None, None, None, 0, False, True, tf32
            )[4]
            for tf32 in (False, True)
        )
    assert 1e-5 < error(scaled, exact) <= TF32_BOUNDS[0]
