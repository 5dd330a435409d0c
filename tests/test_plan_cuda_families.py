"""What each kernel family can run on a CUDA device, and with which parameters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from test_plan_cuda import (
    A100,
    BATCH,
    BY_ARITHMETIC,
    BY_DEVICE,
    DEVICES,
    FAMILIES,
    H200,
    HIDDEN,
    RTX4090,
    RTX5090,
    SMALL,
    plan,
)

from lstm_cuda.ops import CudaDevice

# The widest H of a family: what its registers and shared memory hold.
WIDEST = {
    "rec_cta": {"float64": 32, "float32": 64, "tf32": 64, "float16": 128, "bfloat16": 128},
    "rec_cluster": {"float64": 0, "float32": 256, "tf32": 512, "float16": 512, "bfloat16": 512},
    "rec_group": {"float64": 0, "float32": 1024, "tf32": 2048, "float16": 2048, "bfloat16": 2048},
}
TILE_BYTES = {"small": 27648, "medium": 55296, "large": 82944}


@BY_DEVICE
@BY_ARITHMETIC
def test_widths(arithmetic: str, device: CudaDevice) -> None:
    for family in ("rec_cta", "rec_cluster", "rec_group"):
        widest = WIDEST[family][arithmetic]
        for H, backward in itertools.product(HIDDEN, (False, True)):
            options = {"arithmetic": arithmetic, "backward": backward, "family": family}
            got = plan(H, device=device, **options)
            if widest < H:
                assert not got["possible"]
                expected = "do not fit" if widest else "float64"
                assert expected in got["because"]
            elif device is H200:
                assert got["possible"] and got["because"] == "forced"
            if got["possible"]:
                assert H <= got["padded_hidden"] <= widest


@BY_DEVICE
@BY_ARITHMETIC
@pytest.mark.parametrize("backward", [False, True])
def test_clusters_and_groups_fit_the_device(
    arithmetic: str, backward: bool, device: CudaDevice
) -> None:
    for H, B, D in itertools.product(HIDDEN, BATCH, (1, 2)):
        options = {"arithmetic": arithmetic, "backward": backward, "device": device, "D": D}
        for family in ("rec_cluster", "rec_group"):
            got = plan(H, B, family=family, **options)
            if not got["possible"]:
                continue
            columns = (8, 16) if arithmetic == "float32" else (8, 16, 32)
            assert got["columns"] in columns
            assert got["padded_hidden"] % (8 * got["blocks"]) == 0
            assert got["warps"] in (8, 12)  # a multiple of the parts of a multiprocessor
            tiles = -(-B // got["columns"]) * D
            if family == "rec_cluster":
                assert got["blocks"] in (2, 4, 8, 16) and "groups" not in got
                assert device.architecture in (90, 100, 103)
            else:
                assert got["padded_hidden"] < 2048 or got["columns"] <= 16
                assert 1 <= got["groups"] <= tiles
                assert got["groups"] * got["blocks"] <= device.multiprocessors
            if B <= 8:
                assert got["columns"] == 8  # more would multiply padding


def test_larger_batches_get_more_columns_before_more_waves() -> None:
    for family, H in (("rec_cluster", 128), ("rec_cluster", 512), ("rec_group", 512)):
        columns = [plan(H, B, family=family)["columns"] for B in (8, 16, 64, 100, 400, 800)]
        assert columns[0] == 8 and 32 in columns
    # One wave of twice the columns beats two waves.
    assert plan(512, 64, family="rec_group")["columns"] == 16


@BY_ARITHMETIC
def test_clusters_need_an_architecture_that_has_them(arithmetic: str) -> None:
    for device in (A100, RTX4090, RTX5090, SMALL):
        for H, B in itertools.product(HIDDEN, BATCH):
            assert plan(H, B, arithmetic=arithmetic, device=device)["kernel"] != "rec_cluster"
            got = plan(H, B, arithmetic=arithmetic, device=device, family="rec_cluster")
            assert not got["possible"]
            if WIDEST["rec_cluster"][arithmetic] >= H:
                assert "compute capability 9.0, 10.0 or 10.3" in got["because"]
    for architecture in (90, 100, 103):
        device = CudaDevice(architecture, 132, 232448)
        expected = arithmetic != "float64"
        got = plan(100, arithmetic=arithmetic, device=device, family="rec_cluster")
        assert got["possible"] is expected


def test_groups_need_as_many_multiprocessors_as_blocks() -> None:
    for H in (300, 700, 1000, 2000):
        blocks = plan(H, family="rec_group")["blocks"]
        for multiprocessors in (1, blocks - 1, blocks, 2 * blocks - 1, 2 * blocks):
            device = CudaDevice(90, multiprocessors, 232448)
            got = plan(H, 64, device=device, family="rec_group")
            assert got["possible"] is (multiprocessors >= blocks)
            if got["possible"]:
                assert got["groups"] == multiprocessors // blocks
            else:
                assert "more blocks than the device has multiprocessors" in got["because"]


def test_few_multiprocessors_run_clusters_one_by_one() -> None:
    for multiprocessors in (1, 16, 66, 132):
        device = CudaDevice(90, multiprocessors, 232448)
        for H in (100, 256, 400):
            assert plan(H, 64, device=device, family="rec_cluster")["possible"]
    few, many = (CudaDevice(90, n, 232448) for n in (16, 132))
    assert (
        plan(512, 64, device=few, family="rec_cluster")["estimated_us"]
        > plan(512, 64, device=many, family="rec_cluster")["estimated_us"]
    )


@pytest.mark.parametrize("family", ["rec_cta", "rec_cluster", "rec_group"])
def test_shared_memory(family: str) -> None:
    before = None
    for shared_bytes in range(0, 232448 + 1, 4096):
        got = plan(100, 200, device=CudaDevice(90, 132, shared_bytes), family=family)
        if not got["possible"]:
            assert got["because"] == f"{family} needs more shared memory than the device has"
        assert before is None or got["possible"] >= before  # more is never worse
        before = got["possible"]
    got = plan(100, 200, device=CudaDevice(90, 132, 16384), family="rec_step")
    assert not got["possible"] and got["because"] == "the device has too little shared memory"


def test_less_shared_memory_leaves_groups_fewer_columns() -> None:
    def most_columns(device: CudaDevice, arithmetic: str) -> int:
        options = {"device": device, "arithmetic": arithmetic, "family": "rec_group"}
        return max(plan(512, B, **options)["columns"] for B in BATCH)

    assert most_columns(H200, "bfloat16") == most_columns(H200, "tf32") == 32
    assert most_columns(A100, "bfloat16") == 32 and most_columns(A100, "tf32") == 16
    assert most_columns(RTX4090, "bfloat16") == most_columns(RTX4090, "tf32") == 16
    # The widest keep a part of their weights in shared memory.
    for device, arithmetic, widest in (
        (H200, "bfloat16", 2048),
        (RTX4090, "bfloat16", 1024),
        (H200, "float32", 1024),
        (RTX4090, "float32", 512),
    ):
        options = {"device": device, "arithmetic": arithmetic, "family": "rec_group"}
        assert plan(widest, **options)["possible"]
        assert not plan(widest + 1, **options)["possible"]


@pytest.mark.parametrize("family", ["rec_cta", "rec_cluster", "rec_group"])
def test_counts_stay_within_32_bits(family: str) -> None:
    huge = 2**60
    for options in ({"T": 2**31}, {"T": huge}, {"B": 2**36}, {"B": huge}, {"B": 2**34, "D": 64}):
        got = plan(32, **{"family": family, **options})
        assert not got["possible"]
        assert got["because"] == f"more steps or rows than {family} counts"
    got = plan(32, **{"T": huge, "B": 2**50})
    assert got["kernel"] == "rec_step" and got["estimated_us"] > 0
    assert plan(32, 2**22, T=2**30, D=64, family=family)["possible"]


@BY_DEVICE
def test_empty_batches_and_sequences_have_plans_too(device: CudaDevice) -> None:
    for H, T, B, family in itertools.product(HIDDEN, (0, 5), (0, 5), ("", *FAMILIES)):
        got = plan(H, B, T=T, device=device, family=family)
        assert got["possible"] == plan(H, 8, T=8, device=device, family=family)["possible"]


@BY_DEVICE
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("H", [129, 512, 2048])
@pytest.mark.parametrize("B", [1, 16, 17, 64, 100, 256, 4096])
def test_tiles_of_steps_fit_the_device(H: int, B: int, backward: bool, device: CudaDevice) -> None:
    tile = plan(H, B, backward=backward, device=device, family="rec_step")["tile"]
    assert TILE_BYTES[tile] <= device.shared_bytes
    if B <= 16:
        assert tile == "small"  # a larger one would multiply padding


def test_tiles_of_steps_grow_with_the_work() -> None:
    def tile(H: int, B: int, **options: Any) -> str:
        return str(plan(H, B, family="rec_step", **options)["tile"])

    assert tile(1024, 64) == "medium"
    assert tile(2048, 256) == "large"
    assert tile(2048, 256, arithmetic="float64") == "medium"
    assert tile(2048, 256, device=SMALL) == "small"


def test_launches_overlap_where_the_device_can() -> None:
    for device in DEVICES.values():
        got = plan(512, device=device, family="rec_step")
        assert got["launches_overlap"] == (device.architecture >= 90)


def test_a_device_that_is_too_old() -> None:
    for family in ("", *FAMILIES):
        got = plan(512, device=CudaDevice(75, 40, 65536), family=family)
        assert not got["possible"] and "8.0" in got["because"]


def test_weights_are_packed_beside_a_product_that_hides_it() -> None:
    """Not where packing or the product is shorter than what a second stream costs, nor backward."""
    for family, H in (("rec_cluster", 512), ("rec_group", 1024)):
        assert plan(H, 64, family=family)["packs_beside"]
        assert not plan(H, 64, T=1, family=family)["packs_beside"]
        assert not plan(H, 64, family=family, backward=True)["packs_beside"]
    assert not plan(128, 64, family="rec_cluster")["packs_beside"]
    assert plan(128, 64, D=16, family="rec_cluster")["packs_beside"]  # as many weights again
