"""Weights packed beside the product of inputs: what is put on which stream, in which order."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cuda_missing
from emulation import build
from helpers import assert_equal
from torch import Tensor

from lstm_cuda import ops

B, H = 32, 512
# For emulation few steps; inputs so wide that their product hides the packing of weights.
WIDE = {"rec_cluster": 11000, "rec_group": 2000}
TF32 = {"rec_cluster": True, "rec_group": False}


@pytest.fixture
def device(emulated_ops: Any) -> Iterator[Any]:
    """The emulator, where what is put beside the caller's stream runs when that is joined."""
    emulated_ops.use_device(6)  # on which nothing else is refused
    emulated_ops.take_launches()
    yield emulated_ops
    emulated_ops.refuse("")
    emulated_ops.scale_products(False)
    emulated_ops.use_device(0)
    emulated_ops.force_kernel("")
    emulated_ops.set_capturing(False)


def draw(features: int, T: int = 1, where: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """x, w_ih and w_hh."""
    g = torch.Generator().manual_seed(0)
    shapes = (T, B, features), (4 * H, features), (4 * H, H)
    x, w_ih, w_hh = (
        ((torch.rand(shape, generator=g) - 0.5) / shape[-1] ** 0.5).to(where) for shape in shapes
    )
    return x, w_ih, w_hh


def forward(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, tf32: bool, *packed: Tensor | int
) -> tuple[Tensor, ...]:
    none = (None, None, None, None)
    return ops.layer_forward(x, [w_ih], [w_hh], [], [], *none, 0, True, True, tf32, *packed)  # type: ignore[arg-type]


def layout(family: str) -> int:
    with ops.force_kernel(family):
        found: int = ops._C.packed_layout(
            1, B, 1, H, H, "float32", TF32[family], 90, 132, 232448, 0
        )
    return found


@pytest.mark.parametrize("family", WIDE)
def test_weights_are_packed_while_inputs_are_multiplied(family: str, device: Any) -> None:
    x, w_ih, w_hh = draw(WIDE[family])
    device.force_kernel(family)
    device.scale_products(True)  # so that the product, too, is seen
    beside = forward(x, w_ih, w_hh, TF32[family])
    product = ["scale_rows", "unscale"] if TF32[family] else []
    kernel = f"{family}_forward"
    assert device.take_launches() == ["fork", "pack_forward (beside)", *product, "join", kernel]

    # Weights that are packed already give the same, and nothing is beside.
    number = layout(family)
    packed = ops.pack_weights([w_hh], [], number)
    before = forward(x, w_ih, w_hh, TF32[family], packed, number)
    assert_equal(beside, before)
    assert device.take_launches() == ["pack_forward", *product, kernel]


def test_a_short_product_hides_nothing(device: Any) -> None:
    device.force_kernel("rec_cluster")
    x, w_ih, w_hh = draw(16)
    forward(x, w_ih, w_hh, True)
    assert device.take_launches() == ["pack_forward", "rec_cluster_forward"]


def test_backward_has_nothing_to_hide_it_under(device: Any) -> None:
    device.force_kernel("rec_cluster")
    x, w_ih, w_hh = draw(WIDE["rec_cluster"])
    y, _, _, gates, c = forward(x, w_ih, w_hh, True)
    device.take_launches()
    rest = ([w_ih], [w_hh], [], None, None, None, None, 0, y, gates, c, True, False, True)
    ops.layer_backward(y, None, None, None, x, *rest)  # type: ignore[arg-type]
    kernels = device.take_launches()
    assert kernels[:2] == ["pack_backward", "rec_cluster_backward"] and "fork" not in kernels


@pytest.mark.parametrize("refused, index", [("pack_forward", 7), ("rec_cluster_forward", 8)])
def test_what_is_refused_is_joined(refused: str, index: int, device: Any) -> None:
    """Memory that was used beside is given back in the order of the caller's stream."""
    x, w_ih, w_hh = draw(1000, T=16)
    device.set_capturing(True)  # so that no group is next
    device.force_kernel("rec_step")
    expected = forward(x, w_ih, w_hh, True)
    device.force_kernel("")
    device.use_device(index)  # refusals are remembered
    device.take_launches()
    device.refuse(refused)
    found = forward(x, w_ih, w_hh, True)
    kernels = [name for name in device.take_launches() if name not in ("scale_rows", "unscale")]
    tried = [refused] if refused == "rec_cluster_forward" else []
    rest = ["prepare", *["step_forward"] * 16]
    assert kernels == ["fork", "pack_forward (beside)", "join", *tried, *rest]
    assert_equal(found, expected)


@pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
def test_streams_and_events(tmp_path: Path) -> None:
    """What the CUDA runtime is asked for, by the real source on a runtime that takes notes."""
    toolchain, headers = build.toolchain("plain"), build.cuda_include()
    assert toolchain is not None
    if headers is None or not (headers / "cuda_runtime.h").is_file():
        pytest.skip("needs cuda_runtime.h: set CUDA_HOME")
    sources = [build.ROOT / "csrc/cuda/device.cu", build.ROOT / "tests/emulation/fork.cpp"]
    program = tmp_path / "fork"
    include = ["-isystem", headers, f"-I{build.ROOT / 'csrc'}"]
    build.compiler([toolchain[0], *build.FLAGS, *include, "-x", "c++", *sources, "-o", program])
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("family", WIDE)
def test_on_a_gpu(family: str) -> None:
    """Eagerly on two streams at once, and for clusters captured and replayed: the same bits."""
    if missing := cuda_missing():
        pytest.skip(missing)
    if family == "rec_cluster" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("this device has no clusters")
    x, w_ih, w_hh = draw(WIDE[family], T=8, where="cuda")
    with ops.force_kernel(family):
        expected = forward(x, w_ih, w_hh, TF32[family])
        current = torch.cuda.current_stream()
        streams = [torch.cuda.Stream() for _ in range(2)]
        found = []
        for stream in streams * 10:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                found.append(forward(x, w_ih, w_hh, TF32[family]))
        torch.cuda.synchronize()
        for result in found:
            assert_equal(result, expected)
        if family == "rec_group":
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward(x, w_ih, w_hh, TF32[family])
        for _ in range(3):
            w_hh.mul_(0.5)
            graph.replay()
            assert_equal(captured, forward(x, w_ih, w_hh, TF32[family]))
