"""Into how many chunks of time a stack is cut on a CUDA device: a pure function."""

from __future__ import annotations

import pytest
import torch

from lstm_cuda import force_kernel, ops
from lstm_cuda.ops import CudaDevice

H200 = CudaDevice(90, 132, 232448)
A100 = CudaDevice(80, 108, 166912)


def chunks(
    H: int,
    B: int = 8,
    *,
    L: int = 4,
    T: int = 4096,
    P: int = 0,
    dtype: torch.dtype = torch.float32,
    tf32: bool = True,
    device: CudaDevice = H200,
) -> int:
    return ops.wavefront_chunks(L, T, B, H, P or H, dtype, tf32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [32, 128, 256, 512])
def test_layers_that_leave_the_device_idle_run_side_by_side(H: int, dtype: torch.dtype) -> None:
    assert 2 <= chunks(H, dtype=dtype) <= 16
    assert chunks(H, dtype=dtype, L=1) == 1
    assert chunks(H, dtype=dtype, T=200) == 1  # no two chunks of a length that pays
    assert chunks(H, dtype=dtype, B=4096) == 1  # one layer fills the device


def test_layers_whose_blocks_wait_for_each_other_do_not() -> None:
    for H in (1024, 2048):
        assert ops.plan_cuda(4096, 8, 1, H, H, H, torch.float32, False, True, H200)["kernel"] in (
            "rec_group", "rec_step",
        )  # fmt: skip
        assert chunks(H) == 1
    for family in ("rec_group", "rec_step"):
        with force_kernel(family):
            assert chunks(512) == 1


def test_projected_layers_do_where_the_projection_is_folded_into_the_weights() -> None:
    assert chunks(256, P=32) > 1
    with force_kernel("rec_step"):
        assert chunks(256, P=32) == 1


def test_other_devices() -> None:
    assert chunks(32, device=A100) > 1
    assert chunks(256, device=A100) == 1  # no clusters there
    assert chunks(32, device=CudaDevice(75, 40, 65536)) == 1  # nothing runs there
