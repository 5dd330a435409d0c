"""What all tests share: poisoned memory, the devices, and the seed."""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulation import build, python_module

from lstm_cuda import ops, piece_ops, shapes, variant_ops

# cuBLAS is deterministic only with a workspace of fixed size, and reads this when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def cuda_missing() -> str | None:
    """Why nothing can run on CUDA here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if ops.load_error is None and not ops.build_info()["cuda"]:
        return "lstm_cuda was built without CUDA kernels"
    return None


@pytest.fixture(scope="session")
def emulator() -> Any:
    """The module that runs the CUDA path on CPU tensors, its kernels emulated."""
    if reason := build.unavailable():
        pytest.skip(reason)
    module = python_module.load(python_module.compile_module())
    torch.library.register_fake("lstm_cuda_emulated::layer_forward", shapes.layer_forward_fake)
    torch.library.register_fake("lstm_cuda_emulated::layer_backward", shapes.layer_backward_fake)
    for name in ("variant_forward", "variant_backward"):
        fake = getattr(variant_ops, f"_{name.split('_')[1]}_fake")
        torch.library.register_fake(f"lstm_cuda_emulated::{name}", fake)
    return module


@pytest.fixture
def emulated_ops(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The emulator, with its ops in the place of those for the CPU."""
    library = torch.ops.lstm_cuda_emulated
    monkeypatch.setattr(ops, "_forward", library.layer_forward.default)
    monkeypatch.setattr(ops, "_backward", library.layer_backward.default)
    monkeypatch.setattr(variant_ops, "_forward", library.variant_forward.default)
    monkeypatch.setattr(variant_ops, "_backward", library.variant_backward.default)
    monkeypatch.setattr(ops, "_pack", library.pack_weights.default)
    monkeypatch.setattr(shapes, "saved_gates_dtype", lambda x: x.dtype)
    monkeypatch.setattr(piece_ops, "in_pieces", lambda x: False)
    monkeypatch.setattr(ops, "takes_dgates", lambda x: False)
    return emulator


# "emulated" is the CUDA path on CPU tensors, so to tests the device is the CPU.
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", "emulated", CUDA]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "emulated":
        request.getfixturevalue("emulated_ops")
        return "cpu"
    if request.param == "cuda":
        if missing := cuda_missing():
            pytest.skip(missing)
        # Bounds for float32 are those of exact products; TF32 has tests of its own.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return str(request.param)


@pytest.fixture
def no_vmap_fallback() -> Iterator[None]:
    """An op without a rule raises, instead of being run for each member with a warning."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Fill uninitialised memory with NaN: an output that is not written must not look right."""
    torch.manual_seed(20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: waking threads would take most of the time
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
