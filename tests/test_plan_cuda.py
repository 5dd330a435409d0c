"""Which kernel a layer gets on a CUDA device, and why: a pure function, tested without one."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from lstm_cuda import force_kernel, ops
from lstm_cuda.ops import CudaDevice

H200 = CudaDevice(90, 132, 232448)
H100 = CudaDevice(90, 132, 232448)
A100 = CudaDevice(80, 108, 166912)
RTX4090 = CudaDevice(89, 128, 101376)
B200 = CudaDevice(100, 148, 232448)
RTX5090 = CudaDevice(120, 170, 101376)
SMALL = CudaDevice(86, 16, 49152)  # little shared memory, few multiprocessors
DEVICES = {
    "H200": H200, "H100": H100, "A100": A100, "RTX4090": RTX4090, "B200": B200,
    "RTX5090": RTX5090, "small": SMALL,
}  # fmt: skip
BY_DEVICE = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
FAMILIES = ("rec_cta", "rec_cluster", "rec_group", "rec_step")
# dtype and whether TF32 is allowed, by the name of the arithmetic.
ARITHMETICS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, True),
}
BY_ARITHMETIC = pytest.mark.parametrize("arithmetic", ARITHMETICS)
HIDDEN = (1, 5, 32, 33, 64, 65, 100, 128, 129, 256, 257, 384, 500, 512, 513, 768, 1000, 1024, 1025,
          2048, 2049, 5000)  # fmt: skip
BATCH = (1, 8, 9, 64, 250, 1024, 5000)
STEPS = (1, 2, 7, 512)


def plan(
    H: int,
    B: int = 16,
    *,
    T: int = 512,
    D: int = 1,
    P: int = 0,
    arithmetic: str = "bfloat16",
    backward: bool = False,
    device: CudaDevice = H200,
    family: str = "",
) -> dict[str, Any]:
    dtype, tf32 = ARITHMETICS[arithmetic]
    with force_kernel(family):
        return ops.plan_cuda(T, B, D, H, H, P or H, dtype, backward, tf32, device)


def possible(H: int, B: int = 16, **options: Any) -> dict[str, dict[str, Any]]:
    """The plans of all families that can run it, forced, by name."""
    plans = {family: plan(H, B, family=family, **options) for family in FAMILIES}
    return {family: found for family, found in plans.items() if found["possible"]}


def without_reason(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "because"}


# The rule


@BY_DEVICE
@BY_ARITHMETIC
@pytest.mark.parametrize("backward", [False, True])
def test_the_shortest_estimate_is_chosen(
    arithmetic: str, backward: bool, device: CudaDevice
) -> None:
    options = {"arithmetic": arithmetic, "backward": backward, "device": device}
    for H, B, T in itertools.product(HIDDEN, BATCH, STEPS):
        plans = possible(H, B, T=T, **options)
        assert all(found["estimated_us"] > 0 for found in plans.values())
        shortest = min(plans.values(), key=lambda found: found["estimated_us"])
        chosen = plan(H, B, T=T, **options)
        assert without_reason(chosen) == without_reason(shortest)


# Forward, 512 steps, on an H200: shapes for which the design says which family is fastest, by a
# margin that leaves room for better constants.
EXPECTED = [
    ("bfloat16", 32, 16, "rec_cta"),
    ("bfloat16", 64, 16, "rec_cta"),
    ("bfloat16", 64, 256, "rec_cta"),
    ("bfloat16", 128, 1024, "rec_cta"),
    ("bfloat16", 192, 16, "rec_cluster"),
    ("bfloat16", 256, 1, "rec_cluster"),
    ("bfloat16", 256, 16, "rec_cluster"),
    ("bfloat16", 256, 64, "rec_cluster"),
    ("bfloat16", 768, 16, "rec_group"),
    ("bfloat16", 1024, 16, "rec_group"),
    ("bfloat16", 1024, 64, "rec_group"),
    ("bfloat16", 1024, 1024, "rec_step"),
    ("bfloat16", 2048, 1, "rec_group"),
    ("bfloat16", 2048, 16, "rec_group"),
    ("bfloat16", 2048, 512, "rec_step"),
    ("float16", 256, 16, "rec_cluster"),
    ("float16", 768, 16, "rec_group"),
    ("tf32", 32, 16, "rec_cta"),
    ("tf32", 128, 64, "rec_cluster"),
    ("tf32", 256, 16, "rec_cluster"),
    ("tf32", 1024, 16, "rec_group"),
    ("float32", 32, 16, "rec_cta"),
    ("float32", 256, 16, "rec_cluster"),
    ("float32", 512, 16, "rec_group"),
    ("float32", 1024, 16, "rec_group"),
    ("float32", 2048, 16, "rec_step"),
    ("float64", 32, 16, "rec_cta"),
    ("float64", 64, 16, "rec_step"),
]


@pytest.mark.parametrize("arithmetic, H, B, family", EXPECTED)
def test_well_known_shapes(arithmetic: str, H: int, B: int, family: str) -> None:
    assert plan(H, B, arithmetic=arithmetic)["kernel"] == family


@pytest.mark.parametrize("H", [200, 384, 700, 1024, 2048])
def test_few_steps_are_not_worth_loading_all_weights(H: int) -> None:
    for backward in (False, True):
        for T in (1, 2):
            got = plan(H, T=T, backward=backward)
            assert got["kernel"] == "rec_step" and "few steps" in got["because"]
        assert plan(H, T=100, backward=backward)["kernel"] in ("rec_cluster", "rec_group")


def test_large_products_are_not_worth_keeping_weights() -> None:
    got = plan(1024, 2048)
    assert got["kernel"] == "rec_step" and "many rows" in got["because"]
    got = plan(1024, 2048, T=1)
    assert got["kernel"] == "rec_step" and "many rows" in got["because"]


def test_more_work_never_is_expected_to_take_less() -> None:
    for family, arithmetic, backward in itertools.product(FAMILIES, ARITHMETICS, (False, True)):
        for H in (32, 100, 256, 512, 1024):
            for small, large in (
                ({"T": 16}, {"T": 17}),
                ({"B": 16}, {"B": 17}),
                ({"B": 1000}, {"B": 2000}),
                ({"D": 1}, {"D": 2}),
            ):
                options = {"arithmetic": arithmetic, "backward": backward, "family": family}
                less, more = plan(H, **{**options, **small}), plan(H, **{**options, **large})
                assert less["possible"] == more["possible"]
                if more["possible"]:
                    assert less["estimated_us"] <= more["estimated_us"] * (1 + 1e-12)


def test_half_a_device_takes_longer_for_large_products() -> None:
    half = CudaDevice(90, 66, 232448)
    narrow, wide = (("rec_cta", 64), ("rec_cluster", 256)), (("rec_group", 512), ("rec_step", 2048))
    for family, H in (*narrow, *wide):
        options = {"family": family, "arithmetic": "float32"}
        slow, fast = (plan(H, 4096, device=device, **options) for device in (half, H200))
        assert slow["estimated_us"] > 1.5 * fast["estimated_us"]


def test_memory_that_groups_need_zeroed_is_counted() -> None:
    def before_steps(backward: bool) -> float:
        options = {"arithmetic": "float32", "family": "rec_group", "backward": backward}
        one, two = (plan(1000, 2048, T=T, **options)["estimated_us"] for T in (1, 2))
        return float(2 * one - two)

    # 256 parts, of which each has 4 MiB for sums from 64 blocks.
    assert before_steps(True) - before_steps(False) > 200


def test_nothing_but_the_problem_decides() -> None:
    for H, B in itertools.product(HIDDEN, BATCH):
        assert plan(H, B) == plan(H, B, device=dataclasses.replace(H200, index=7))


def test_arithmetic_follows_dtype_and_setting() -> None:
    for name, (dtype, _) in ARITHMETICS.items():
        for H in (16, 200, 700, 3000):
            assert plan(H, arithmetic=name)["arithmetic"] == name
            if dtype is not torch.float32:
                for tf32 in (False, True):
                    got = ops.plan_cuda(512, 16, 1, H, H, H, dtype, False, tf32, H200)
                    assert got["arithmetic"] == name


# With a projection, forward, 512 steps, on an H200. Of the last two, folding would multiply the
# products by 13, in batches where they are what counts.
PROJECTED = [
    ("bfloat16", 64, 16, 16, "rec_cta"),
    ("bfloat16", 256, 64, 16, "rec_cluster"),
    ("bfloat16", 1024, 512, 16, "rec_group"),
    ("tf32", 512, 128, 8, "rec_cluster"),
    ("float32", 1024, 512, 16, "rec_group"),
    ("float64", 32, 8, 16, "rec_cta"),
    ("float64", 64, 8, 16, "rec_step"),
    ("bfloat16", 1024, 64, 512, "rec_step"),
    ("float32", 1024, 64, 64, "rec_step"),
]


@pytest.mark.parametrize("arithmetic, H, P, B, family", PROJECTED)
def test_projected_layers(arithmetic: str, H: int, P: int, B: int, family: str) -> None:
    got = plan(H, B, P=P, arithmetic=arithmetic)
    assert got["kernel"] == family and got.get("folds_projection", False) == (family != "rec_step")


@BY_ARITHMETIC
@pytest.mark.parametrize("backward", [False, True])
def test_a_projection_costs_something(arithmetic: str, backward: bool) -> None:
    options = {"arithmetic": arithmetic, "backward": backward}
    for family, H, B in itertools.product(FAMILIES, (32, 100, 256, 512, 1024), (16, 200)):
        without = plan(H, B, family=family, **options)
        projected = [plan(H, B, P=P, family=family, **options) for P in (1, 30, H - 1)]
        for got in projected:
            assert got["possible"] == without["possible"]
            assert ("folds_projection" in got) == (got["possible"] and family != "rec_step")
        assert "folds_projection" not in without
        if not without["possible"]:
            continue
        times = [got["estimated_us"] for got in projected]
        assert times == sorted(times)
        assert times[0 if family != "rec_step" else -1] > without["estimated_us"]


def test_why_a_projected_layer_takes_steps() -> None:
    assert "so narrow a projection" in plan(1024, 64, P=64, arithmetic="float32")["because"]
    assert "so many rows" in plan(1024, 2048, P=512)["because"]
    assert "few steps" in plan(1024, 1, T=1, P=512)["because"]
    assert "do not fit" in plan(5000, P=100)["because"]


def test_the_reason_for_steps_is_the_one_that_counts() -> None:
    # Wide layers: that no family is wide enough, not that the first is not.
    assert plan(5000)["because"] == "the weights do not fit the blocks of a group"
    # Narrow ones: what the device lacks.
    assert "shared memory" in plan(5, device=SMALL)["because"]
    got = plan(1000, device=CudaDevice(89, 40, 101376))
    assert got["kernel"] == "rec_step" and "multiprocessors" in got["because"]


# Requests


def test_forcing() -> None:
    assert plan(64)["kernel"] == "rec_cta"
    with force_kernel("rec_step"):
        got = ops.plan_cuda(512, 16, 1, 64, 64, 64, torch.bfloat16, False, False, H200)
        assert got["kernel"] == "rec_step" and got["possible"] and got["because"] == "forced"
    for family in FAMILIES:
        got = plan(64, family=family)
        assert got["kernel"] == family and got["possible"] and got["because"] == "forced"
    got = plan(3000, family="rec_cta")
    assert got["kernel"] == "rec_cta" and not got["possible"]
    assert "do not fit" in got["because"]
    with force_kernel("rec_step"):
        with force_kernel("rec_group"):
            assert ops._C.forced_kernel()[0] == "rec_group"
            with force_kernel(""):
                assert ops._C.forced_kernel()[0] == ""
        assert ops._C.forced_kernel()[0] == "rec_step"
    assert plan(64)["kernel"] == "rec_cta"
    with (
        pytest.raises(ValueError, match=f"{', '.join(FAMILIES)}; got 'rec_best'"),
        force_kernel("rec_best"),
    ):
        pass


def test_forcing_by_environment() -> None:
    code = "from lstm_cuda import ops; print(ops._C.forced_kernel()[0])"
    for name, expected in (("rec_step", "rec_step"), ("rec_group", "rec_group"), ("", "")):
        environment = {**os.environ, "LSTM_CUDA_KERNEL": name}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert run.stdout.strip() == expected, run.stderr
    environment = {**os.environ, "LSTM_CUDA_KERNEL": "nonsense"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode != 0 and "LSTM_CUDA_KERNEL must be one of" in run.stderr


@pytest.fixture
def device_63() -> CudaDevice:
    """A device of no machine: refusals are remembered for the rest of the process."""
    return dataclasses.replace(H200, index=63)


def test_a_family_that_could_not_be_launched_makes_way(device_63: CudaDevice) -> None:
    # In an order in which each is still the choice: refusals are never forgotten.
    for H, refused, following in (
        (256, "rec_cluster", "rec_group"),
        (256, "rec_group", "rec_step"),
        (64, "rec_cta", "rec_step"),
    ):
        other = dataclasses.replace(device_63, index=device_63.index - 1)
        before = plan(H, device=device_63)
        assert before["kernel"] == refused
        ops._C.remember_refusal(63, refused)
        after = plan(H, device=device_63)
        assert after["kernel"] == following and after["possible"]
        assert after["because"].endswith("could not be launched on this device")
        forced = plan(H, device=device_63, family=refused)
        assert not forced["possible"]
        assert forced["because"] == f"{refused} could not be launched on this device"
        assert plan(64, device=other)["kernel"] == "rec_cta"  # another device is not concerned
    # Where a refused family would not have been chosen, nothing is said of it.
    assert "few steps" in plan(512, T=1, device=device_63)["because"]
    assert "many rows" in plan(1024, 4096, device=device_63)["because"]
    # Nothing is left to make way for.
    ops._C.remember_refusal(63, "rec_step")
    assert plan(64, device=device_63)["kernel"] == "rec_step"
    with pytest.raises(ValueError, match="rec_best"):
        ops._C.remember_refusal(63, "rec_best")
