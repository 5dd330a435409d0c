"""The ops for derivatives beyond the first on CPUs, against the same in torch's ops."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import BOUNDS, NAMES, assert_equal, close, error
from torch import Tensor

from lstm_cuda import derivative_ops, ops, recurrence, recurrence_steps
from lstm_cuda.products import outer_products, product

# T, D, B, H, I
SIZES = [(1, 1, 1, 1, 1), (5, 2, 3, 7, 4), (4, 1, 9, 33, 17), (3, 3, 2, 64, 70), (20, 1, 30, 70, 5)]
SOURCES = ["x", "z", "gates", "c", "m"]
RUN = ["gates", "cells", "c0", "W", "V", "fresh"]
Given = dict[str, Any]


def draw(T: int, D: int, B: int, H: int, features: int, dtype: torch.dtype) -> Given:
    """Sources, named source_..., a run, and both solutions' parts in its gradients."""
    g = torch.Generator().manual_seed(T)
    wide, narrow = (T, D, B, 4 * H), (T, D, B, H)
    shapes = {
        "source_x": (T, D, B, features),
        "source_z": wide,
        "source_gates": wide,
        "source_c": narrow,
        "source_m": narrow,
        "cells": narrow,
        "c0": (D, B, H),
        "dc": narrow,
        "dm": narrow,
        "z": wide,
        "change_c": narrow,
    }
    made: Given = {k: torch.randn(s, generator=g).to(dtype) for k, s in shapes.items()}
    made["gates"] = torch.sigmoid(torch.randn(wide, generator=g)).to(dtype)
    made["W"] = (torch.randn(D, 4 * H, H, generator=g) / H**0.5).to(dtype)
    made["V"] = (torch.randn(D, 4 * H, features, generator=g) / features**0.5).to(dtype)
    made["fresh"] = torch.rand(T, D, B, 1, generator=g) < 0.2
    return made


def run_of(given: Given) -> list[Tensor | None]:
    return [given[name] for name in RUN]


def exact(given: Given) -> Given:
    return {
        k: t.double() if t is not None and t.is_floating_point() else t for k, t in given.items()
    }


def tangents(s: Given) -> tuple[Tensor, ...]:
    sources = (s[f"source_{k}"] for k in ("x", "z"))
    rest = (s[f"source_{k}"] for k in ("c", "m"))
    return derivative_ops.changes(False, *sources, None, *rest, *run_of(s))[1:]


def adjoints(s: Given) -> tuple[Tensor, ...]:
    sources = (s[f"source_{k}"] for k in ("z", "gates", "c", "m"))
    return derivative_ops.changes(True, None, *sources, *run_of(s))


def tangents_by_torch(s: Given) -> tuple[Tensor, ...]:
    _, K, F, R = recurrence_steps.coefficients(s["gates"], s["cells"], s["c0"], s["fresh"])
    a_z = s["source_z"]
    if s["source_x"] is not None:
        part = torch.einsum("tdbi,dgi->tdbg", s["source_x"], s["V"])
        a_z = part if a_z is None else a_z + part
    rest = s["source_c"], s["source_m"]
    return recurrence_steps.tangent_steps(a_z, *rest, K, F, R, s["W"], s["fresh"])


def adjoints_by_torch(s: Given) -> tuple[Tensor, ...]:
    slope, K, F, R = recurrence_steps.coefficients(s["gates"], s["cells"], s["c0"], s["fresh"])
    b_z = s["source_z"]
    if s["source_gates"] is not None:
        part = slope * s["source_gates"]
        b_z = part if b_z is None else b_z + part
    rest = s["source_c"], s["source_m"]
    found = recurrence_steps.adjoint_steps(b_z, *rest, K, F, R, s["W"], s["fresh"])
    return torch.einsum("tdbg,dgi->tdbi", found[0], s["V"]), *found


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "tangents": (tangents, tangents_by_torch),
    "adjoints": (adjoints, adjoints_by_torch),
}


KINDS = {"tangents": ("x", "z", "c", "m"), "adjoints": ("z", "gates", "c", "m")}


@pytest.fixture(params=ops.build_info()["cpu_capabilities"])
def capability(request: pytest.FixtureRequest) -> Iterator[None]:
    before = ops.build_info()["cpu_capability"]
    try:
        ops._C.set_cpu_capability(request.param)
        if ops.build_info()["cpu_capability"] != request.param:
            pytest.skip("not on this machine")
        yield
    finally:
        ops._C.set_cpu_capability(before)


@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=NAMES.get)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("capability")
def test_agrees_with_torch_ops(sizes: tuple[int, ...], dtype: torch.dtype, which: str) -> None:
    by_kernel, by_torch = PAIRS[which]
    for absent in ([], ["source_z"], ["source_x", "source_gates"], ["source_c", "source_m"],
                   ["fresh"], ["c0"]):  # fmt: skip
        given = draw(*sizes, dtype) | dict.fromkeys(absent)
        found, expected = by_kernel(given), by_torch(exact(given))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype
            assert error(a, b) < BOUNDS[dtype][0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=NAMES.get)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("capability")
def test_gradients_by_the_cells(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """By themselves, and on the way of tangents."""
    for absent in ([], ["source_gates"], ["fresh"], ["c0"], ["source_x", "source_c"]):
        given = draw(*sizes, dtype) | dict.fromkeys(absent)
        fixed = ("source_gates", "dc", "dm")
        rest = ("gates", "cells", "c0", "fresh")
        names = (*fixed, "z", "change_c", *rest)
        expected = recurrence_steps.cell_gradients(*(exact(given)[k] for k in names))
        found = derivative_ops.cell_gradients(*(given[k] for k in names))
        sources = (given[f"source_{k}"] for k in "xzcm")
        c, m, *on_the_way = derivative_ops.tangents_with_gradients(
            *sources, *(given[k] for k in fixed), *run_of(given)
        )
        z, *states = tangents(given)
        assert_equal((c, m), states)
        again = derivative_ops.cell_gradients(
            *(given[k] for k in fixed), z, c, *(given[k] for k in rest)
        )
        for k in range(2 if given["c0"] is None else 3):
            assert error(found[k], expected[k]) < BOUNDS[dtype][0]
            assert error(on_the_way[k], again[k].double()) < BOUNDS[dtype][0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=NAMES.get)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1), (5, 2, 3, 7, 40), (40, 1, 30, 70, 33), (3, 3, 50, 17, 100)], ids=str
)
@pytest.mark.usefixtures("capability")
def test_products(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of any strides."""
    T, D, B, m, n = sizes
    a, b = (torch.randn(B, T, D, k, dtype=dtype).permute(1, 2, 0, 3) for k in (m, n))
    w = torch.randn(D, m, n, dtype=dtype)
    for given in (w, w.transpose(1, 2).contiguous().transpose(1, 2), w.expand(2, D, m, n)[1]):
        found = derivative_ops.product(a, given)
        assert error(found, torch.einsum("tdbm,dmn->tdbn", a.double(), w.double())) < 5e-7
    found = derivative_ops.outer_products(a, b)
    assert error(found, torch.einsum("tdbm,tdbn->dmn", a.double(), b.double())) < 5e-7
    same = b[..., :1].expand_as(b)  # features that do not lie side by side
    assert_equal(
        derivative_ops.outer_products(a, same), derivative_ops.outer_products(a, same.contiguous())
    )


@pytest.mark.parametrize("T, B, m, n", [(0, 2, 3, 4), (3, 0, 3, 4), (3, 2, 0, 4), (3, 2, 3, 0)])
def test_empty_products_are_zeros(T: int, B: int, m: int, n: int) -> None:
    a, b, w = torch.ones(T, 1, B, m), torch.ones(T, 1, B, n), torch.ones(1, m, n)
    assert_equal(derivative_ops.product(a, w), torch.zeros(T, 1, B, n))
    assert_equal(derivative_ops.outer_products(a, b), torch.zeros(1, m, n))


def test_products_can_be_differentiated() -> None:
    a, b = (torch.randn(3, 2, 2, k, dtype=torch.float64, requires_grad=True) for k in (2, 3))
    w = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def sums(a: Tensor, b: Tensor) -> Tensor:
        return outer_products(a, b, a.dtype)

    for f, inputs in ((product, (a, w)), (sums, (a, b))):
        torch.autograd.gradcheck(
            f,
            inputs,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


def assert_maps(f: Callable[..., Any], inputs: Sequence[Tensor], batched: Sequence[bool]) -> None:
    """vmap over those inputs, at their last dimension, is what a loop gives."""
    rows = [
        torch.stack([t, t.roll(1, 0), 1 - t], -1) if b else t
        for t, b in zip(inputs, batched, strict=True)
    ]
    found = torch.func.vmap(f, tuple(-1 if b else None for b in batched))(*rows)
    for k in range(3):
        one = f(*(t[..., k] if b else t for t, b in zip(rows, batched, strict=True)))
        for u, v in zip(found, one, strict=True):
            close(u[k], v, 1e-13)


@pytest.mark.parametrize("batched", [(True, False), (False, True), (True, True)], ids=str)
def test_products_under_vmap(batched: tuple[bool, bool]) -> None:
    a, b = (torch.randn(3, 2, 4, k, dtype=torch.float64) for k in (2, 3))
    w = torch.randn(2, 2, 3, dtype=torch.float64)
    assert_maps(lambda a, w: (product(a, w),), (a, w), batched)
    assert_maps(lambda a, b: (outer_products(a, b, a.dtype),), (a, b), batched)


@pytest.mark.parametrize("which", PAIRS)
def test_the_pair_under_vmap(which: str) -> None:
    given = draw(3, 2, 4, 3, 2, torch.float64)
    inputs = [given[f"source_{k}"] for k in KINDS[which]] + run_of(given)[:-1]

    def f(*inputs: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = getattr(recurrence, which)(*inputs, given["fresh"])
        return result

    for batched in ("100000000", "111111100", "000000010", "000000001", "111111111"):
        assert_maps(f, inputs, [b == "1" for b in batched])


@pytest.mark.parametrize("which", PAIRS)
def test_the_pair_can_be_differentiated(which: str) -> None:
    """By all sources and all of the run: forwards, backwards, and twice."""
    given = draw(3, 2, 1, 2, 1, torch.float64)
    kinds = KINDS[which]
    inputs = [given[f"source_{k}"] for k in kinds] + run_of(given)[:-1]
    inputs = [t.requires_grad_() for t in inputs]

    def f(*inputs: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = getattr(recurrence, which)(*inputs, given["fresh"])
        return result

    torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("which", PAIRS)
def test_the_last_derivative_is_that_of_the_formula(which: str) -> None:
    """Kernels make it where no more can follow."""
    given = draw(5, 2, 3, 7, 4, torch.float64)
    kinds = KINDS[which]
    for fixed in ([], kinds):
        sources = {k: given[f"source_{k}"].requires_grad_(k not in fixed) for k in kinds}
        run = [t.requires_grad_() for t in run_of(given)[:-1]]
        results = getattr(recurrence, which)(*sources.values(), *run, given["fresh"])
        value = sum((t.sin() * t).sum() for t in results)
        leaves = [t for t in (*sources.values(), *run) if t.requires_grad]
        formula = torch.autograd.grad(value, leaves, create_graph=True)
        for a, b in zip(torch.autograd.grad(value, leaves), formula, strict=True):
            close(a, b, 1e-12)


def test_several_threads() -> None:
    """They share rows of the recurrence, whose sums may then differ in order, but no product."""
    given = draw(20, 2, 31, 70, 33, torch.float32)

    def recurrences() -> tuple[Tensor, ...]:
        fixed = (given[k] for k in ("source_gates", "dc", "dm"))
        sources = (given[f"source_{k}"] for k in "xzcm")
        both = derivative_ops.tangents_with_gradients(*sources, *fixed, *run_of(given))
        return *tangents(given), *adjoints(given), *both

    def products() -> tuple[Tensor, ...]:
        a = given["source_z"]
        cells = (given[k] for k in ("gates", "cells", "c0", "fresh"))
        fixed = (given[k] for k in ("source_gates", "dc", "dm", "z", "change_c"))
        return (
            derivative_ops.product(a, given["V"]),
            derivative_ops.outer_products(a, given["source_x"]),
            *derivative_ops.cell_gradients(*fixed, *cells),
        )

    alone = recurrences(), products()
    torch.set_num_threads(3)
    for a, b in zip(recurrences(), alone[0], strict=True):
        assert error(a, b.double()) < 1e-6
    assert_equal(recurrences(), recurrences())
    assert_equal(products(), alone[1])


def test_opcheck() -> None:
    given = draw(3, 2, 2, 5, 4, torch.float64)
    s = {k: given[f"source_{k}"] for k in SOURCES}
    run, gradients = run_of(given), (given["source_gates"], given["dc"], given["dm"])
    cells = (given[k] for k in ("gates", "cells", "c0", "fresh"))
    calls = [
        ("changes", (False, s["x"], s["z"], None, s["c"], s["m"], *run)),
        ("changes", (True, None, s["z"], s["gates"], s["c"], s["m"], *run)),
        ("cell_gradients", (*gradients, given["z"], given["change_c"], *cells)),
        ("tangents_with_gradients", (s["x"], s["z"], s["c"], s["m"], *gradients, *run)),
        ("product", (s["z"], given["V"])),
        ("outer_products", (s["z"], s["x"])),
    ]
    for name, arguments in calls:
        torch.library.opcheck(getattr(torch.ops.lstm_cuda, name).default, arguments)


@pytest.mark.parametrize(
    "name", [*(f"source_{k}" for k in SOURCES if k != "x"), "gates", "c0", "W", "V", "fresh"]
)
def test_wrong_shapes_raise(name: str) -> None:
    given = draw(3, 2, 2, 5, 4, torch.float64)
    given[name] = given["cells"][..., :2]
    with pytest.raises(RuntimeError, match=f"{name} must be"):
        adjoints(given)


def test_wrong_calls_raise() -> None:
    given = draw(3, 2, 2, 5, 4, torch.float64)
    s, run = {k: given[f"source_{k}"] for k in SOURCES}, run_of(given)
    with pytest.raises(RuntimeError, match="source_x must be None"):
        derivative_ops.changes(True, s["x"], None, None, None, None, *run)
    with pytest.raises(RuntimeError, match="source_gates must be None"):
        derivative_ops.changes(False, None, None, s["gates"], None, None, *run)
    with pytest.raises(RuntimeError, match=r"source_x must be \[3, 2, 2, 4\]; got"):
        derivative_ops.changes(False, s["z"], None, None, None, None, *run)
    with pytest.raises(RuntimeError, match="V must be given"):
        tangents(given | {"V": None})
    with pytest.raises(RuntimeError, match="cells must be float64 or float32"):
        tangents(given | {"cells": given["cells"].half()})
    with pytest.raises(RuntimeError, match=r"w must be \[2, 20, n\]"):
        derivative_ops.product(s["z"], given["V"][:, :3])
    with pytest.raises(RuntimeError, match=r"b must be \[3, 2, 2, n\]"):
        derivative_ops.outer_products(s["z"], s["z"][:2])
