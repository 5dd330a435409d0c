"""The CUDA path from Python to the kernels, each family forced in turn.

On a GPU, and on the CPU with the kernels' real source under emulation in several orders of threads.
What a pass under emulation means: indexing, tails, data flow and synchronisation are right. Not:
instructions, memory scopes, speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import helpers
import pytest
import torch
from conftest import CUDA, cuda_missing
from helpers import (
    Problem,
    assert_accurate,
    assert_equal,
    call,
    close,
    error,
    make,
    run,
    truth,
)
from torch import Tensor

from lstm_cuda import layer, ops
from lstm_cuda.ops import CudaDevice

ALL = "y h_n c_n cells"  # outputs that have gradients
FAMILIES = ["rec_cta", "rec_cluster", "rec_group", "rec_step"]
RESIDENT = ("rec_cluster", "rec_group")  # whose blocks together keep all weights
# Kernels that only this family launches, forward and backward.
KERNELS = {
    "rec_cta": ("rec_cta_forward", "rec_cta_backward"),
    "rec_cluster": ("rec_cluster_forward", "rec_cluster_backward"),
    "rec_group": ("rec_group_forward", "rec_group_backward"),
    "rec_step": ("step_forward", "step_backward"),
}
ARITHMETICS = {
    "f64": torch.float64,
    "f32": torch.float32,
    "tf32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
# An arithmetic that each family has, with as few rounding errors as possible.
FINE = {"rec_cta": "f64", "rec_cluster": "f32", "rec_group": "f32", "rec_step": "f64"}
# A result of one number, the sum of rounded terms that may cancel, may have any relative error.
SINGLE = Problem(1, 1, 1, 1)
ROUNDED = ("tf32", "f16", "bf16")
ORDERS = [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(1, 9))]
H200 = CudaDevice(90, 132, 232448)
# Error bound and floor where products may round operands to TF32, as in helpers.BOUNDS: products of
# ten bits.
TF32_BOUNDS = (2e-3, 1e-3)


@dataclass
class Machine:
    """Where kernels run: on a GPU, or emulated on the CPU."""

    device: str
    monkeypatch: pytest.MonkeyPatch
    emulator: Any = None  # on a GPU there is none

    @contextmanager
    def forced(
        self, family: str, arithmetic: str = "f64", order: tuple[str, int] = ("forward", 0)
    ) -> Iterator[None]:
        """Run every layer on the family, with threads in the order where that can be said."""
        self.monkeypatch.setattr(layer, "tf32_allowed", lambda *_: arithmetic == "tf32")
        # nn.LSTM, with which results are compared, goes by torch's setting.
        self.monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", arithmetic == "tf32")
        if self.emulator is None:
            with ops.force_kernel(family):
                yield
            return
        self.emulator.set_order(*order)
        self.emulator.take_launches()
        assert self.emulator.force_kernel(family)
        try:
            yield
        finally:
            self.emulator.force_kernel("")
            self.emulator.set_order("forward", 0)


@pytest.fixture(params=["emulated", CUDA])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    if request.param == "emulated":
        return Machine("cpu", monkeypatch, request.getfixturevalue("emulated_ops"))
    if missing := cuda_missing():
        pytest.skip(missing)
    return Machine("cuda", monkeypatch)


def can_run(family: str, p: Problem, arithmetic: str) -> bool:
    with ops.force_kernel(family):
        plan = ops.plan_cuda(
            p.T,
            p.B,
            p.D,
            p.I,
            p.H,
            p.out,
            ARITHMETICS[arithmetic],
            False,
            arithmetic == "tf32",
            H200,
        )
    return bool(plan["possible"])


def cases(problems: list[Problem], resident: dict[str, list[Problem]] | None = None) -> Any:
    """Each problem in each arithmetic with each family that runs it.

    Args:
        problems: for rec_cta and rec_step, and where `resident` has no others, for rec_cluster.
        resident: those of rec_cluster and rec_group. Emulation runs ten thousands of threads for
            one group, and takes a second.
    """
    of = {"rec_cta": problems, "rec_cluster": problems, "rec_group": [], "rec_step": problems}
    of |= resident or {}
    return pytest.mark.parametrize(
        "p, family, arithmetic",
        [
            pytest.param(p, family, arithmetic, id=f"{family}-{arithmetic}-{p}")
            for family in FAMILIES
            for arithmetic in ARITHMETICS
            for p in of[family]
            if can_run(family, p, arithmetic) and not (p == SINGLE and arithmetic in ROUNDED)
        ],
    )


def accurate(p: Problem, machine: Machine, arithmetic: str, of: str = ALL) -> None:
    if arithmetic == "tf32":
        machine.monkeypatch.setitem(helpers.BOUNDS, torch.float32, TF32_BOUNDS)
    assert_accurate(p, make(p, machine.device), ARITHMETICS[arithmetic], of)


SHAPES = [
    SINGLE,
    Problem(1, 1, 8, 7),
    Problem(7, 3, 5, 31),
    Problem(4, 9, 3, 17, bidirectional=True, bias=False),
    Problem(6, 10, 3, 32, lengths=True),
    Problem(5, 9, 8, 8, bidirectional=True, lengths=True, reset=True),
    Problem(5, 17, 4, 5, reverse=True, reset=True, lengths=True, hx=False),
    Problem(3, 8, 6, 64),
    Problem(3, 3, 6, 100, bidirectional=True, lengths=True),
    Problem(2, 2, 5, 128, reset=True),
    Problem(3, 19, 6, 130, lengths=True),
    Problem(6, 4, 3, 11, P=5, reset=True),
    Problem(5, 7, 3, 19, P=1, bidirectional=True, lengths=True, reset=True),
    Problem(3, 5, 4, 24, P=16, reverse=True, lengths=True, hx=False),
    Problem(3, 2, 4, 6, L=2, bidirectional=True),
]


# What depends on sizes: tiles of the batch and of the hidden size, rows that are not aligned, more
# parts than run at once. What does not has been seen in the other families.
RESIDENT_SHAPES = {
    "rec_cluster": [
        SINGLE,
        Problem(4, 9, 3, 17, bidirectional=True, bias=False),
        Problem(5, 9, 8, 8, bidirectional=True, lengths=True, reset=True),
        Problem(5, 17, 4, 5, reverse=True, reset=True, lengths=True, hx=False),
        Problem(3, 35, 6, 128, reset=True),
        Problem(3, 3, 6, 130, bidirectional=True, lengths=True),
        Problem(3, 10, 6, 300, lengths=True),
        Problem(3, 2, 4, 6, L=2, bidirectional=True),
    ],
    "rec_group": [
        Problem(4, 9, 3, 101, bidirectional=True, lengths=True, reset=True),
        Problem(3, 33, 5, 520, reverse=True, lengths=True),
    ],
}


@cases(SHAPES, RESIDENT_SHAPES)
def test_accuracy(p: Problem, family: str, arithmetic: str, machine: Machine) -> None:
    with machine.forced(family, arithmetic):
        accurate(p, machine, arithmetic)
        if machine.emulator is not None:
            kernels = set(machine.emulator.take_launches())
            for other, names in KERNELS.items():
                assert kernels & set(names) == (set(names) if other == family else set())
            assert ({"pack_forward", "pack_backward"} <= kernels) == (family in RESIDENT)
            assert ("step_project" in kernels) >= (bool(p.P) and family == "rec_step")


# The sizes that these families are for.
@cases(
    [],
    {
        "rec_cluster": [Problem(3, 9, 4, 256, lengths=True), Problem(3, 9, 4, 512, reset=True)],
        "rec_group": [Problem(3, 9, 4, 1024, lengths=True)],
    },
)
def test_accuracy_of_wide_layers(
    p: Problem, family: str, arithmetic: str, machine: Machine
) -> None:
    with machine.forced(family, arithmetic):
        accurate(p, machine, arithmetic)


# A device with few multiprocessors is given larger tiles.
@pytest.mark.parametrize("tile, multiprocessors", [("medium", 4), ("large", 1)])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("P", [0, 40])
def test_accuracy_of_larger_tiles(
    P: int, arithmetic: str, tile: str, multiprocessors: int, machine: Machine
) -> None:
    if machine.emulator is None:
        pytest.skip("a real device has the multiprocessors it has")
    p = Problem(3, 66, 3, 70, P=P, lengths=True, reset=True)
    with ops.force_kernel("rec_step"):
        plan = ops.plan_cuda(
            p.T, p.B, p.D, p.I, p.H, p.out, ARITHMETICS[arithmetic], True, arithmetic == "tf32",
            CudaDevice(90, multiprocessors, 232448),
        )  # fmt: skip
    assert plan["tile"] == ("medium" if arithmetic == "f64" else tile)
    machine.emulator.set_device(90, multiprocessors, 232448)
    try:
        with machine.forced("rec_step", arithmetic):
            accurate(p, machine, arithmetic)
    finally:
        machine.emulator.set_device(90, 132, 232448)


# Tiles of the sizes that a large device chooses; too much for emulation.
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("H, B", [(1024, 64), (2048, 256), (515, 130)])
def test_accuracy_of_large_layers(H: int, B: int, arithmetic: str, machine: Machine) -> None:
    if machine.emulator is not None:
        pytest.skip("emulation would take minutes")
    with machine.forced("rec_step", arithmetic):
        accurate(Problem(3, B, 64, H, lengths=True), machine, arithmetic)


# The gradients of all others are absent.
@pytest.mark.parametrize("of", ["y", "h_n", "c_n", "cells", "h_n c_n"])
@cases(
    [Problem(4, 9, 3, 12, bidirectional=True, lengths=True, reset=True), Problem(3, 5, 3, 12, P=5)],
    {"rec_group": [Problem(3, 3, 3, 12, lengths=True)]},
)
def test_absent_gradients(
    p: Problem, family: str, arithmetic: str, of: str, machine: Machine
) -> None:
    with machine.forced(family, arithmetic):
        accurate(p, machine, arithmetic, of)


# Enough of everything that can go wrong between threads: several chunks of depth, ragged
# tiles, both directions, frozen rows.
BUSY = [
    Problem(5, 11, 3, 100, bidirectional=True, lengths=True, reset=True),
    Problem(5, 11, 3, 61, bidirectional=True, lengths=True, reset=True),
    Problem(5, 11, 3, 29, bidirectional=True, lengths=True, reset=True),
    Problem(4, 5, 3, 70, P=66, lengths=True),
]


@cases(BUSY, {"rec_cluster": BUSY[1:2], "rec_group": [Problem(4, 3, 3, 40, reset=True)]})
def test_the_order_of_threads_changes_nothing(
    p: Problem, family: str, arithmetic: str, machine: Machine
) -> None:
    """Nor does running it again on a GPU, where nobody chooses the order."""
    first = None
    for order in ORDERS[: 3 if family == "rec_group" else None]:
        d = make(p, machine.device).to(ARITHMETICS[arithmetic])
        with machine.forced(family, arithmetic, order):
            results = run(call, p, d, ALL)
        assert all(bool(torch.isfinite(t).all()) for t in results.values())
        first = first or results
        assert_equal([*results.values()], [*first.values()])


@cases(
    [Problem(4, 9, 3, 12, lengths=True), Problem(4, 9, 3, 12, P=4, reset=True)],
    {"rec_group": [Problem(4, 9, 3, 12, lengths=True)]},
)
def test_a_nan_stays_in_its_row(p: Problem, family: str, arithmetic: str, machine: Machine) -> None:
    d = make(p, machine.device).to(ARITHMETICS[arithmetic])
    bad = make(p, machine.device).to(ARITHMETICS[arithmetic])
    rows = [b for b in range(p.B) if b != 3]
    with torch.no_grad():
        bad.x[1, 3] = float("nan")
        bad.hx[1][:, 3] = float("inf")
        if bad.lengths is not None:
            bad.lengths[3] = p.T
    with machine.forced(family, arithmetic):
        good, spoiled = run(call, p, d, ALL), run(call, p, bad, ALL)
    for name in ("y", "cells", "dx"):
        assert_equal(spoiled[name][:, rows], good[name][:, rows])
    for name in ("h_n", "c_n", "dh0", "dc0"):
        assert_equal(spoiled[name][:, rows], good[name][:, rows])
    assert bool(spoiled["y"][1:, 3].isnan().any())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_past_a_length_is_not_used(family: str, machine: Machine) -> None:
    p = Problem(5, 4, 3, 9, bidirectional=True, lengths=True)
    d = make(p, machine.device)
    d.x[3:, 1] = float("nan")
    d.lengths[1] = 3
    dtype = ARITHMETICS[FINE[family]]
    d = d.to(dtype)
    with machine.forced(family):
        results = run(call, p, d, ALL)
    expected = run(truth, p, d.to(torch.float64), ALL)
    for name, t in expected.items():
        close(results[name], t, helpers.BOUNDS[dtype][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_outside_the_range_are_clamped(family: str, machine: Machine) -> None:
    p = Problem(4, 3, 2, 5, lengths=True)
    d = make(p, machine.device).to(ARITHMETICS[FINE[family]])
    w_ih, w_hh, *bias = d.weights[0]
    results = []
    for values in ([9, -3, 2], [4, 0, 2]):
        lengths = torch.tensor(values, device=machine.device)
        with torch.no_grad(), machine.forced(family):
            results.append(
                ops.layer_forward(
                    d.x, [w_ih], [w_hh], bias, [], *d.hx, lengths, None, 0, False, True, False
                )
            )
    assert_equal(results[0], results[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_saved_survives_a_backward(family: str, machine: Machine) -> None:
    p = Problem(4, 3, 2, 5, bidirectional=True, lengths=True, reset=True)
    d = make(p, machine.device).to(ARITHMETICS[FINE[family]])
    with machine.forced(family):
        outputs = call(p, d)
        loss = sum((t * t).sum() for t in outputs.values())
        leaves = list(d.leaves().values())
        first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert_equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_does_not_reach_the_products_of_backward(family: str, machine: Machine) -> None:
    """A layer that ran in float32 has float32 gradients, wherever backward is called."""
    p = Problem(4, 3, 2, 5, bidirectional=True)
    d = make(p, machine.device).to(torch.float32)
    with machine.forced(family):
        outputs = call(p, d)
        leaves = list(d.leaves().values())
        expected = torch.autograd.grad(outputs["y"].sum(), leaves, retain_graph=True)
        with torch.autocast(machine.device, torch.bfloat16):
            loss = outputs["y"].sum()
            found = torch.autograd.grad(loss, leaves)
    assert_equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("T, B", [(0, 3), (4, 0), (0, 0)])
def test_empty(T: int, B: int, family: str, machine: Machine) -> None:
    p = Problem(T, B, 3, 4)
    d = make(p, machine.device).to(ARITHMETICS[FINE[family]])
    with machine.forced(family):
        results = run(call, p, d, ALL)
    expected = run(truth, p, d, ALL)
    for name, t in expected.items():
        assert results[name].shape == t.shape and error(results[name], t) == 0, name


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in RESIDENT])
def test_gradcheck(family: str, machine: Machine) -> None:
    p = Problem(3, 2, 2, 3, bidirectional=True, lengths=True, reset=True)
    d = make(p, machine.device).to(torch.float64)

    def f(*leaves: Tensor) -> tuple[Tensor, ...]:
        x, h0, c0, *flat = leaves
        rows = [flat[:4], flat[4:]]
        return layer.fused_layer(x, rows, h0, c0, d.lengths, d.reset, 2, True)

    with machine.forced(family):
        assert torch.autograd.gradcheck(f, list(d.leaves().values()))


def test_a_family_that_cannot_run_the_layer_is_an_error_when_forced(machine: Machine) -> None:
    p = Problem(2, 2, 3, 200)
    d = make(p, machine.device).to(torch.float32)
    with machine.forced("rec_cta"), pytest.raises(RuntimeError, match=r"rec_cta cannot run.*H=200"):
        call(p, d)


@pytest.fixture
def refusing(machine: Machine) -> Iterator[Any]:
    """The emulator, whose refuse(kernel) makes launches fail. Refusals are remembered by device."""
    if machine.emulator is None:
        pytest.skip("no launch can be made to fail on a real device")
    machine.emulator.use_device(1)
    yield machine.emulator
    machine.emulator.refuse("")
    machine.emulator.use_device(0)


def test_a_refused_launch_makes_way_for_the_next_family_for_good(
    machine: Machine, refusing: Any
) -> None:
    p = Problem(3, 2, 3, 8)
    d = make(p).to(torch.float64)
    seen = []
    with machine.forced(""), torch.no_grad():
        for refused, device in (("rec_cta", 1), ("", 1), ("", 0)):
            refusing.refuse(refused)
            refusing.use_device(device)
            outputs = call(p, d)
            for name, t in truth(p, d).items():
                close(outputs[name], t)
            kernels = refusing.take_launches()
            seen.append((kernels.count("rec_cta_forward"), kernels.count("step_forward")))
    assert seen == [(1, p.T), (0, p.T), (1, 0)]


ONE_GROUP = CudaDevice(80, 40, 166912)  # at a time; and no clusters


# Of a group's launches the first may have been made: gates of some rows are then there already.
@pytest.mark.parametrize(
    "family, H, P, refused, spared, modelled, index",
    [  # each on a device of its own, on which nothing was refused before
        ("rec_cluster", 200, 0, "rec_", 0, H200, 2),
        ("rec_cluster", 200, 0, "rec_cluster_backward", 0, H200, 3),
        ("rec_group", 300, 0, "rec_group_forward", 1, ONE_GROUP, 4),
        ("rec_group", 300, 0, "rec_group_backward", 1, ONE_GROUP, 5),
        ("rec_cluster", 200, 60, "rec_", 0, H200, 12),
        ("rec_group", 300, 60, "rec_group_forward", 1, ONE_GROUP, 13),
    ],
)
def test_nothing_is_left_of_a_family_that_was_refused(
    family: str,
    H: int,
    P: int,
    refused: str,
    spared: int,
    modelled: CudaDevice,
    index: int,
    machine: Machine,
    refusing: Any,
) -> None:
    """Of the product of h0 above all, which families with resident weights want in gates_x."""

    def chosen(T: int, backward: bool) -> object:
        dtype = ARITHMETICS["f16"]
        return ops.plan_cuda(T, 2, 2, 3, H, P or H, dtype, backward, False, modelled)["kernel"]

    # As few steps as make the family worth while.
    T = next(T for T in range(1, 100) if {chosen(T, b) for b in (False, True)} == {family})
    p = Problem(T, 2, 3, H, P=P, bidirectional=True, lengths=True, reset=True)
    refusing.set_device(modelled.architecture, modelled.multiprocessors, modelled.shared_bytes)
    refusing.use_device(index)
    refusing.refuse(refused, spared)
    try:
        with machine.forced(""):
            accurate(p, machine, "f16")
            kernels = refusing.take_launches()
    finally:
        refusing.set_device(H200.architecture, H200.multiprocessors, H200.shared_bytes)
    tried = [name for name in kernels if name.startswith(refused)]
    assert len(tried) > spared and tried[0].startswith(family)
    assert "step_backward" in kernels
    assert ("step_forward" in kernels) == (
        "rec_cluster_forward" in tried or "rec_group_forward" in tried
    )


def test_no_group_is_recorded_for_a_graph(machine: Machine, refusing: Any) -> None:
    """Nobody has shown that a cooperative launch can be."""
    p = Problem(2, 2, 3, 300)
    d = make(p).to(torch.float32)
    refusing.set_device(80, 108, 166912)
    refusing.set_capturing(True)
    try:
        with machine.forced(""), torch.no_grad():
            call(p, d)
        assert "step_forward" in refusing.take_launches()
        with machine.forced("rec_group"), pytest.raises(RuntimeError, match="for a CUDA graph"):
            call(p, d)
        refusing.set_capturing(False)
        with machine.forced("rec_group"), torch.no_grad():
            call(p, d)  # what was recorded is not remembered as a refusal
    finally:
        refusing.set_capturing(False)
        refusing.set_device(90, 132, 232448)


def test_a_launch_that_fails_says_which_and_why(machine: Machine, refusing: Any) -> None:
    p = Problem(3, 2, 3, 8)
    d = make(p).to(torch.float64)
    refusing.refuse("step_forward")
    with machine.forced("rec_step"), pytest.raises(RuntimeError, match="step_forward was refused"):
        call(p, d)
