# Fixtures come by import: # ruff: noqa: F401, F811
"""Layers with a projection, which kernels that keep their weights run with it folded into those."""

from __future__ import annotations

import dataclasses
from typing import Any

import helpers
import pytest
import torch
from helpers import Problem, assert_accurate, assert_equal, call, close, make, run, truth
from test_kernels import (
    ALL,
    ARITHMETICS,
    FAMILIES,
    FINE,
    KERNELS,
    RESIDENT,
    TF32_BOUNDS,
    Machine,
    accurate,
    cases,
    machine,
    refusing,
)
from torch import Tensor

from lstm_cuda import layer, ops

# Of one output and of nearly as many as hidden units, odd and even sizes, more batch rows than
# a tile has.
SHAPES = [
    Problem(5, 9, 3, 8, P=7, bidirectional=True, lengths=True, reset=True),
    Problem(4, 3, 2, 31, P=1, reverse=True, lengths=True, hx=False),
    Problem(6, 17, 5, 20, P=6, bidirectional=True, reset=True, bias=False),
    Problem(3, 2, 4, 6, L=2, P=4, bidirectional=True, lengths=True),
    Problem(1, 2, 4, 5, P=3),
]
WIDE = [Problem(3, 10, 6, 130, P=77, lengths=True), Problem(3, 3, 5, 100, P=24, reset=True)]
GROUPS = [
    Problem(4, 9, 3, 101, P=37, bidirectional=True, lengths=True, reset=True),
    Problem(3, 3, 5, 520, P=64, reverse=True, lengths=True),
]


@cases(SHAPES, {"rec_cluster": SHAPES + WIDE, "rec_group": GROUPS})
def test_accuracy(p: Problem, family: str, arithmetic: str, machine: Machine) -> None:
    with machine.forced(family, arithmetic):
        accurate(p, machine, arithmetic)
        if machine.emulator is not None:
            kernels = set(machine.emulator.take_launches())
            steps = family == "rec_step"
            assert set(KERNELS[family]) <= kernels
            assert ("step_project" in kernels) == steps
            assert ({"last_outputs", "output_gradients"} <= kernels) != steps


# Groups differ from clusters in nothing that stands around the recurrence, and take long.
SAMPLE = ["rec_cta", "rec_cluster", "rec_step"]
BUSY = Problem(4, 5, 3, 12, P=5, bidirectional=True, lengths=True, reset=True)


@pytest.mark.parametrize("of", ["y", "h_n", "c_n", "cells", "h_n c_n"])
@cases([BUSY])
def test_absent_gradients(
    p: Problem,
    family: str,
    arithmetic: str,
    of: str,
    machine: Machine,
) -> None:
    with machine.forced(family, arithmetic):
        accurate(p, machine, arithmetic, of)


@pytest.mark.parametrize("family", SAMPLE)
def test_only_what_is_asked_for_is_made(family: str, machine: Machine) -> None:
    d = make(BUSY, machine.device).to(ARITHMETICS[FINE[family]])
    with machine.forced(family, FINE[family]):
        outputs = call(BUSY, d)
        weights = [w for row in d.weights for w in row]
        all_grads = torch.autograd.grad(
            outputs["y"].sum(), [d.x, *d.hx, *weights], retain_graph=True
        )
        for t in weights:
            t.requires_grad_(False)
        with torch.no_grad():
            inferred = call(BUSY, d)
        if machine.emulator is not None:
            machine.emulator.take_launches()
        some = torch.autograd.grad(call(BUSY, d)["y"].sum(), [d.x, *d.hx])
        if machine.emulator is not None:
            assert "output_gradients" not in machine.emulator.take_launches()
    assert_equal(some, all_grads[:3])
    assert_equal([*inferred.values()], [t.detach() for t in outputs.values()])


@pytest.mark.parametrize("family", SAMPLE)
def test_what_stands_past_a_length_is_not_used(family: str, machine: Machine) -> None:
    d = make(BUSY, machine.device)
    d.lengths[1] = 2
    dtype = ARITHMETICS[FINE[family]]
    d = d.to(dtype)
    clean = run(truth, BUSY, d.to(torch.float64), ALL)
    for t in (d.x.detach(), d.cotangents["y"], d.cotangents["cells"]):
        for b, length in enumerate(d.lengths.tolist()):
            t[length:, b] = float("nan")
    with machine.forced(family, FINE[family]):
        results = run(call, BUSY, d, ALL)
    for name, t in clean.items():
        close(results[name], t, helpers.BOUNDS[dtype][0])


@pytest.mark.parametrize("family", SAMPLE)
def test_rows_without_steps_keep_their_state(family: str, machine: Machine) -> None:
    """To the bit: no product is made of it."""
    d = make(BUSY, machine.device).to(ARITHMETICS[FINE[family]])
    assert d.lengths[-1] == 0
    with machine.forced(family, FINE[family]):
        results = run(call, BUSY, d, ALL)
    for n, state in enumerate(("h", "c")):
        assert_equal(results[f"{state}_n"][:, -1], d.hx[n][:, -1])
        assert_equal(results[f"d{state}0"][:, -1], d.cotangents[f"{state}_n"][:, -1])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in RESIDENT])
def test_gradcheck(family: str, machine: Machine) -> None:
    p = Problem(3, 2, 2, 3, P=2, bidirectional=True, lengths=True, reset=True)
    d = make(p, machine.device).to(torch.float64)

    def f(*leaves: Tensor) -> tuple[Tensor, ...]:
        x, h0, c0, *flat = leaves
        return layer.fused_layer(x, [flat[:5], flat[5:]], h0, c0, d.lengths, d.reset, 2, True)

    with machine.forced(family):
        assert torch.autograd.gradcheck(f, list(d.leaves().values()))


@pytest.mark.parametrize("family", ["rec_cta", "rec_cluster"])
def test_large_products_around_it_may_be_scaled(family: str, machine: Machine) -> None:
    if machine.emulator is None:
        pytest.skip("products this small are not scaled on a real device")
    machine.monkeypatch.setitem(helpers.BOUNDS, torch.float32, TF32_BOUNDS)
    machine.emulator.scale_products(all=True)
    try:
        with machine.forced(family, "tf32"):
            d = make(BUSY).to(torch.float32)
            with torch.no_grad():
                call(BUSY, d)
            # Of x and w_ih, of both directions' weights, and of both of m and w_hr.
            assert machine.emulator.take_launches().count("unscale") == 1 + 2 + 2
            assert_accurate(BUSY, d, torch.float32, ALL)
    finally:
        machine.emulator.scale_products(all=False)


def test_packed_weights_have_it_folded_in(machine: Machine) -> None:
    if machine.emulator is None:
        pytest.skip("products this small are not scaled on a real device")
    d = make(BUSY).to(torch.float32)
    w_ih, w_hh, b_ih, b_hh, w_hr = ([*each] for each in zip(*d.weights, strict=True))
    with ops.force_kernel("rec_cluster"):
        layout = ops._C.packed_layout(
            BUSY.T, BUSY.B, 2, BUSY.H, BUSY.P, "float32", True, 90, 132, 232448, 0
        )
    machine.emulator.scale_products(all=True)
    results, products = [], []
    try:
        with machine.forced("rec_cluster", "tf32"), torch.no_grad():
            for packed in (None, ops.pack_weights(w_hh, w_hr, layout)):
                machine.emulator.take_launches()
                results.append(
                    ops.layer_forward(
                        d.x, w_ih, w_hh, [*b_ih, *b_hh], w_hr, *d.hx, d.lengths, d.reset, 2, False,
                        True, True, packed, layout,
                    )
                )  # fmt: skip
                products.append(machine.emulator.take_launches().count("unscale"))
    finally:
        machine.emulator.scale_products(all=False)
    assert_equal(results[0], results[1])
    assert products == [1 + 2 + 2, 1 + 2]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_refused_launch_leaves_nothing(direction: str, refusing: Any, machine: Machine) -> None:
    """Of h0's product above all, which stands in gates_x already."""
    refusing.use_device(10 if direction == "forward" else 11)
    refusing.refuse(f"rec_cta_{direction}")
    with machine.forced(""):
        accurate(dataclasses.replace(BUSY, T=20), machine, "f64")
        kernels = refusing.take_launches()
    assert kernels.count(f"rec_cta_{direction}") == 1 and "step_backward" in kernels
    assert ("step_forward" in kernels) == (direction == "forward")


@pytest.mark.parametrize("arithmetic", ["f16", "bf16"])
@pytest.mark.parametrize("P", [16, 112])
def test_weights_that_are_rounded_once_more_are_good_enough(
    P: int, arithmetic: str, machine: Machine
) -> None:
    """Errors grow with the steps: here enough of them."""
    with machine.forced("rec_cta", arithmetic):
        accurate(Problem(40, 4, 16, 128, P=P), machine, arithmetic)
