"""Frozen modules: what inference derives from the weights is kept, and is never out of date."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lstm_cuda import FusedLSTM, ops
from lstm_cuda.ops import CudaDevice
from lstm_cuda.packed import PackedWeights

H200 = CudaDevice(90, 132, 232448)


@pytest.fixture
def packing(emulated_ops: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The emulator, on which every layer runs in clusters."""

    def layout(x: Tensor, D: int, H: int, P: int, allow_tf32: bool) -> int:
        T, B, _ = x.shape
        name = str(x.dtype).removeprefix("torch.")
        with ops.force_kernel("rec_cluster"):
            found = ops._C.packed_layout(
                T, B, D, H, P, name, allow_tf32, H200.architecture, H200.multiprocessors,
                H200.shared_bytes, 0,
            )  # fmt: skip
        return int(found)

    monkeypatch.setattr(ops, "packed_layout", layout)
    assert emulated_ops.force_kernel("rec_cluster")
    emulated_ops.take_launches()
    yield emulated_ops
    emulated_ops.force_kernel("")


def packed(emulator: Any) -> int:
    """How often weights were packed since the last call."""
    return sum(name.startswith("pack_") for name in emulator.take_launches())


def test_what_is_captured_uses_nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph may be replayed after the weights have changed, and what was kept is gone."""
    kept, x = PackedWeights(), SimpleNamespace(device=torch.device("cuda"))
    w = torch.randn(40, 10)
    monkeypatch.setattr(ops, "packed_layout", lambda *_: 1)
    monkeypatch.setattr(ops, "pack_weights", lambda *_: w)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=int))
    for capturing, expected in (False, (w, 1)), (True, (None, 0)), (False, (w, 1)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        assert kept.find(x, [w], [], False) == expected  # type: ignore[arg-type]


def test_weights_are_packed_once(packing: Any) -> None:
    lstm = FusedLSTM(3, 10, num_layers=2, bidirectional=True)
    x = torch.randn(4, 5, 3)
    with torch.no_grad():
        expected = lstm(x)
        assert packed(packing) == 2
        assert lstm.freeze() is lstm and not lstm.training
        for calls in range(3):
            for found, wanted in zip(lstm(x)[1], expected[1], strict=True):
                assert torch.equal(found, wanted)
            assert packed(packing) == (2 if calls == 0 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projection_is_folded_in_once(packing: Any, dtype: torch.dtype) -> None:
    lstm = FusedLSTM(3, 10, bidirectional=True, proj_size=4, dtype=dtype)
    x = torch.randn(4, 5, 3, dtype=dtype)
    with torch.no_grad():
        expected = lstm(x)
        lstm.freeze()
        packing.take_launches()
        for calls in range(3):
            for found, wanted in zip(lstm(x)[1], expected[1], strict=True):
                assert torch.equal(found, wanted)
            assert packed(packing) == (1 if calls == 0 else 0)
        lstm.weight_hr_l0_reverse.mul_(2)
        after = lstm(x)[0]
        assert packed(packing) == 1
        lstm.train()
        assert torch.equal(lstm(x)[0], after)


def test_changed_weights_are_packed_anew(packing: Any) -> None:
    lstm = FusedLSTM(3, 10).freeze()
    x = torch.randn(4, 5, 3)
    with torch.no_grad():
        before = lstm(x)[0]
        lstm.weight_hh_l0.mul_(2)
        after = lstm(x)[0]
        assert packed(packing) == 2 and not torch.equal(before, after)
        lstm.load_state_dict({k: torch.zeros_like(v) for k, v in lstm.state_dict().items()})
        assert lstm(x)[0].abs().max() == 0
        lstm.weight_hh_l0 = torch.nn.Parameter(torch.randn(40, 10))
        lstm(x)
        assert packed(packing) == 2


def test_calls_with_gradients_and_autocast_do_not_use_it(packing: Any) -> None:
    lstm = FusedLSTM(3, 10).freeze()
    x = torch.randn(4, 5, 3)
    for _ in range(2):
        lstm(x)[0].sum().backward()
        assert packed(packing) == 2  # forward and backward
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            lstm(x)
            assert packed(packing) == 1


def test_training_and_copies(packing: Any) -> None:
    lstm = FusedLSTM(3, 10).freeze()
    x = torch.randn(4, 5, 3)
    with torch.no_grad():
        expected = lstm(x)[0]
        twin = copy.deepcopy(lstm)
        assert torch.equal(twin(x)[0], expected)
        assert packed(packing) == 2
        buffer = io.BytesIO()
        torch.save(lstm, buffer)
        assert buffer.tell() < 20_000  # the packed copy alone takes more
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x)[0], expected)
        packing.take_launches()
        lstm.train()
        for _ in range(2):
            lstm(x)
            assert packed(packing) == 1


def test_packed_weights_of_another_layer_are_refused(packing: Any) -> None:
    x, w_ih, w_hh = torch.randn(2, 3, 4), torch.randn(40, 4), torch.randn(40, 10)
    layout = ops.packed_layout(x, 1, 10, 10, False)
    short = torch.zeros(16, dtype=torch.uint8)
    arguments: list[Any] = [x, [w_ih], [w_hh], [], [], None, None, None, None, 0, False, False]
    with pytest.raises(RuntimeError, match="packed must have"):
        ops.layer_forward(*arguments, False, short, layout)
    with pytest.raises(RuntimeError, match="no packed weights have layout 12345"):
        ops.pack_weights([w_hh], [], 12345)
    with pytest.raises(RuntimeError, match="w_hh"):
        ops.pack_weights([w_hh.half()], [], layout)
    with pytest.raises(RuntimeError, match=r"w_hh must be \[40, 10\]; got \[39, 10\]"):
        ops.pack_weights([w_hh[:39]], [], layout)
    with pytest.raises(RuntimeError, match=r"w_hr must be \[10, 10\]; got \[9, 10\]"):
        ops.pack_weights([w_hh], [torch.randn(9, 10)], layout)


def test_on_a_cpu_nothing_is_kept() -> None:
    lstm, x = FusedLSTM(3, 4), torch.randn(5, 2, 3)
    with torch.no_grad():
        expected = lstm(x)[0]
        assert torch.equal(lstm.freeze()(x)[0], expected)
