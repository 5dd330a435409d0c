"""Which kernel a layer gets on a CUDA device: a pure function, so tested without one."""

from __future__ import annotations

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
SMALL = CudaDevice(86, 16, 49152)  # little shared memory, few multiprocessors
DEVICES = {
    "H200": H200, "H100": H100, "A100": A100, "RTX4090": RTX4090, "B200": B200, "small": SMALL
}  # fmt: skip
BY_DEVICE = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
TILE_BYTES = {"small": 27648, "medium": 55296, "large": 82944}


def plan(
    H: int,
    B: int = 16,
    *,
    T: int = 512,
    D: int = 1,
    P: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = False,
    tf32: bool = False,
    device: CudaDevice = H200,
) -> dict[str, Any]:
    return ops.plan_cuda(T, B, D, H, H, P or H, dtype, backward, tf32, device)


@BY_DEVICE
@pytest.mark.parametrize(
    "dtype, tf32, widest",
    [
        (torch.bfloat16, False, 128),
        (torch.float16, False, 128),
        (torch.float32, True, 64),
        (torch.float32, False, 64),
        (torch.float64, False, 32),
    ],
)
def test_the_family_goes_by_what_fits_in_registers(
    dtype: torch.dtype, tf32: bool, widest: int, device: CudaDevice
) -> None:
    for backward in (False, True):
        for H in (1, 5, 32, widest) if device is not SMALL else ():
            got = plan(H, dtype=dtype, tf32=tf32, device=device, backward=backward)
            assert got["kernel"] == "rec_cta" and got["possible"]
            assert got["padded_hidden"] in (32, 64, 128) and got["padded_hidden"] >= H
        for H in (widest + 1, 1000, 5000):
            got = plan(H, dtype=dtype, tf32=tf32, device=device, backward=backward)
            assert got["kernel"] == "rec_step" and got["possible"]
            assert "do not fit" in got["because"]
    if device is SMALL:
        got = plan(5, dtype=dtype, tf32=tf32, device=device)
        assert got["kernel"] == "rec_step" and "shared memory" in got["because"]


def test_arithmetic_follows_dtype_and_setting() -> None:
    assert plan(64, dtype=torch.float32)["arithmetic"] == "float32"
    assert plan(64, dtype=torch.float32, tf32=True)["arithmetic"] == "tf32"
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        for tf32 in (False, True):
            arithmetic = plan(64, dtype=dtype, tf32=tf32)["arithmetic"]
            assert arithmetic == str(dtype).removeprefix("torch.")


def test_projected_layers_take_steps() -> None:
    got = plan(32, P=16)
    assert got["kernel"] == "rec_step" and got["because"] == "rec_cta has no projection"


@BY_DEVICE
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("H", [129, 512, 2048])
@pytest.mark.parametrize("B", [1, 16, 17, 64, 100, 256, 4096])
def test_tiles_fit_the_device(H: int, B: int, backward: bool, device: CudaDevice) -> None:
    tile = plan(H, B, backward=backward, device=device)["tile"]
    assert TILE_BYTES[tile] <= device.shared_bytes
    if B <= 16:
        assert tile == "small"  # a larger one would multiply padding


def test_tiles_grow_with_the_work() -> None:
    assert plan(1024, 64)["tile"] == "medium"
    assert plan(2048, 256)["tile"] == "large"
    assert plan(2048, 256, dtype=torch.float64)["tile"] == "medium"
    assert plan(2048, 256, device=SMALL)["tile"] == "small"


def test_launches_overlap_where_the_device_can() -> None:
    for device in DEVICES.values():
        assert plan(512, device=device)["launches_overlap"] == (device.architecture >= 90)


def test_a_device_that_is_too_old() -> None:
    got = plan(512, device=CudaDevice(75, 40, 65536))
    assert not got["possible"] and "8.0" in got["because"]


def test_forcing() -> None:
    assert plan(64)["kernel"] == "rec_cta"
    with force_kernel("rec_step"):
        got = plan(64)
        assert got["kernel"] == "rec_step" and got["possible"] and got["because"] == "forced"
        with force_kernel("rec_cta"):
            got = plan(1000)
            assert got["kernel"] == "rec_cta" and not got["possible"]
            assert "do not fit" in got["because"]
        with force_kernel(""):
            assert plan(64)["kernel"] == "rec_cta"
        assert plan(64)["kernel"] == "rec_step"
    assert plan(64)["kernel"] == "rec_cta"
    with (
        pytest.raises(ValueError, match="rec_cta, rec_step; got 'rec_best'"),
        force_kernel("rec_best"),
    ):
        pass


def test_forcing_by_environment() -> None:
    code = "from lstm_cuda import ops; print(ops._C.forced_kernel())"
    for name, expected in (("rec_step", "rec_step"), ("", "")):
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
