"""The op that solves the recurrence of derivatives on CPUs, against the same in torch's ops."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import BOUNDS, NAMES, assert_equal, error
from torch import Tensor

from lstm_cuda import ops, recurrence

SIZES = [(1, 1, 1, 1), (5, 2, 3, 7), (4, 1, 9, 33), (3, 3, 2, 64), (20, 1, 30, 70)]
NAMES_GIVEN = ["z", "c", "m", "K", "F", "R", "W", "fresh"]
STEPS: dict[bool, Callable[..., Any]] = {
    False: recurrence._tangent_steps,
    True: recurrence._adjoint_steps,
}


def draw(T: int, D: int, B: int, H: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Sources, coefficients and ``fresh``."""
    g = torch.Generator().manual_seed(T)
    wide, narrow = (T, D, B, 4 * H), (T, D, B, H)
    shapes = dict(zip(NAMES_GIVEN, (wide, narrow, narrow, wide, narrow, narrow), strict=False))
    made: dict[str, Tensor | None] = {
        k: (torch.randn(s, generator=g) / (3 if k in "KFR" else 1)).to(dtype)
        for k, s in shapes.items()
    }
    made["W"] = (torch.randn(D, 4 * H, H, generator=g) / H**0.5).to(dtype)
    made["fresh"] = torch.rand(T, D, B, 1, generator=g) < 0.2
    return made


def exact(t: Tensor | None) -> Tensor | None:
    return t.double() if t is not None and t.is_floating_point() else t


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


@pytest.mark.parametrize("transposed", [False, True], ids=["tangents", "adjoints"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=NAMES.get)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("capability")
def test_agrees_with_torch_ops(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, transposed: bool
) -> None:
    for absent in ([], ["z"], ["c", "m"], ["z", "c"], ["fresh"]):
        given = draw(*sizes, dtype) | dict.fromkeys(absent)
        expected = STEPS[transposed](*(exact(t) for t in given.values()))
        found = ops.changes(transposed, *given.values())  # type: ignore[arg-type]
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == dtype
            assert error(a, b) < BOUNDS[dtype][0]


@pytest.mark.parametrize("transposed", [False, True], ids=["tangents", "adjoints"])
def test_the_number_of_threads_changes_nothing(transposed: bool) -> None:
    given: Any = draw(20, 2, 31, 70, torch.float32).values()
    one = ops.changes(transposed, *given)
    torch.set_num_threads(3)
    assert_equal(ops.changes(transposed, *given), one)


@pytest.mark.parametrize("transposed", [False, True], ids=["tangents", "adjoints"])
def test_opcheck(transposed: bool) -> None:
    given = draw(3, 2, 2, 5, torch.float64).values()
    torch.library.opcheck(torch.ops.lstm_cuda.changes.default, (transposed, *given))


@pytest.mark.parametrize("name", NAMES_GIVEN)
def test_wrong_shapes_raise(name: str) -> None:
    given = draw(3, 2, 2, 5, torch.float64)
    wrong: Any = given | {name: given["W" if name == "F" else "F"][..., :2]}  # type: ignore[index]
    with pytest.raises(RuntimeError, match=f"{'source_' if name in 'zcm' else ''}{name} must be"):
        ops.changes(False, *wrong.values())
