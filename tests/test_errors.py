"""Every wrong argument raises before any work, naming what is wrong, wanted and given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lstm_cuda import FusedLSTM, FusedLSTMCell, explain, fused_lstm, ops
from lstm_cuda.reference import Cell

# As in nn.LSTM's errors where it has good ones; each row is arguments, error, message.
CONSTRUCTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_size": "3"}, TypeError, "input_size should be of type int, got: str"),
    ({"input_size": 0}, ValueError, "input_size must be greater than zero"),
    ({"hidden_size": 4.0}, TypeError, "hidden_size should be of type int, got: float"),
    ({"hidden_size": -1}, ValueError, "hidden_size must be greater than zero"),
    ({"num_layers": 0}, ValueError, "num_layers must be greater than zero"),
    ({"num_layers": "2"}, TypeError, "num_layers should be of type int, got: str"),
    ({"num_layers": 2.5}, TypeError, "num_layers should be of type int, got: float"),
    ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ({"batch_first": "yes"}, TypeError, "batch_first should be of type bool, got: str"),
    ({"bidirectional": 2}, TypeError, "bidirectional should be of type bool, got: int"),
    ({"dropout": 1.5}, ValueError, r"dropout should be a number in range \[0, 1\]; got 1.5"),
    ({"dropout": "a"}, ValueError, r"dropout should be a number in range \[0, 1\]; got 'a'"),
    ({"dropout": True}, ValueError, "dropout should be a number"),
    ({"dropout": float("nan")}, ValueError, "dropout should be a number"),
    ({"proj_size": 4}, ValueError, "proj_size has to be smaller than hidden_size"),
    ({"proj_size": -1}, ValueError, "proj_size should be a positive integer or zero"),
    ({"proj_size": "1"}, TypeError, "proj_size should be of type int, got: str"),
    ({"dtype": torch.int32}, TypeError, "dtype must be a floating point dtype; got torch.int32"),
    ({"reverse": 1}, TypeError, "reverse should be of type bool"),
    ({"reverse": True, "bidirectional": True}, ValueError, "reverse=True is for one direction"),
    ({"peephole": "yes"}, TypeError, "peephole should be of type bool"),
    ({"forget_gate": None}, TypeError, "forget_gate should be of type bool"),
    ({"coupled": 0}, TypeError, "coupled should be of type bool"),
    ({"coupled": True, "forget_gate": False}, ValueError, "excludes forget_gate=False"),
    ({"layer_norm": 1}, TypeError, "layer_norm should be of type bool"),
    ({"activation": "swish"}, ValueError, "activation must be one of 'tanh', .*; got 'swish'"),
    ({"activation": None}, ValueError, "activation must be one of .*; got None"),
    ({"recurrent_activation": "hard_sigmoid"}, ValueError, "hard_sigmoid_keras.*hard_sigmoid_onnx"),
    ({"output_activation": "no"}, ValueError, "output_activation must be one of"),
    ({"recurrent_dropout": -0.1}, ValueError, r"recurrent_dropout .* \[0, 1\]; got -0.1"),
    ({"zoneout": 2}, ValueError, r"zoneout should be a number in range \[0, 1\]; got 2"),
    ({"zoneout": (0.1, 0.2, 0.3)}, ValueError, r"zoneout must be two probabilities \(h, c\)"),
    ({"zoneout": "0.1"}, ValueError, "zoneout should be a number .*; got '0.1'"),
    ({"weight_dropout": 7}, ValueError, "weight_dropout should be a number"),
    ({"cell_clip": 0}, ValueError, "cell_clip must be a number above 0, or None; got 0"),
    ({"cell_clip": "3"}, ValueError, "cell_clip must be a number above 0, or None; got '3'"),
    ({"forget_bias": "1"}, TypeError, "forget_bias must be a number or None; got '1'"),
    ({"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias needs bias=True"),
    ({"forget_bias": 1.0, "coupled": True}, ValueError, "a forget gate of its own"),
    ({"backend": "gpu"}, ValueError, "backend must be one of 'auto', .*; got 'gpu'"),
]


@pytest.mark.parametrize("kwargs, error, message", CONSTRUCTION, ids=lambda v: str(v)[:40])
def test_construction(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedLSTM(**{"input_size": 3, "hidden_size": 4, **kwargs})


def x(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.randn(*(shape or (5, 2, 3)), **kwargs)


def hx(*shape: int, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape or (1, 2, 4), **kwargs), torch.randn(shape or (1, 2, 4), **kwargs)


def flags(*shape: int) -> torch.Tensor:
    return torch.zeros(shape or (5, 2), dtype=torch.bool)


def packed() -> Any:
    return pack_padded_sequence(x(), torch.tensor([5, 3]))


half = torch.full((5, 2), 0.5)
CALL: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "input-list": ({}, ([1.0],), {}, TypeError, "input must be a tensor; got list"),
    "input-1d": ({}, (x(3),), {}, ValueError, "Expected input to be 2D or 3D, got 1D"),
    "input-4d": ({}, (x(1, 5, 2, 3),), {}, ValueError, "Expected input to be 2D or 3D, got 4D"),
    "input-size": ({}, (x(5, 2, 7),), {}, RuntimeError, "input_size. Expected 3, got 7"),
    "input-dtype": ({}, (x().double(),), {}, ValueError, "torch.float64; got torch.float32"),
    "input-int": ({}, (x().long(),), {}, TypeError, "input must be float64, .*; got torch.int64"),
    "input-device": ({}, (x(device="meta"),), {}, RuntimeError, "device, meta; got cpu"),
    "hx-one": ({}, (x(), hx()[0]), {}, TypeError, r"hx must be a pair \(h_0, c_0\); got Tensor"),
    "hx-three": ({}, (x(), (*hx(), hx()[0])), {}, TypeError, "hx must be a pair .*; got 3 items"),
    "hx-none": ({}, (x(), (hx()[0], None)), {}, TypeError, r"hx\[1\] must be a tensor; got None"),
    "hx-layers": (
        {"num_layers": 2, "bidirectional": True}, (x(), hx()), {}, RuntimeError,
        r"hx\[0\] must be \[4, 2, 4\] \(num_layers \* num_directions, batch, hidden_size\); "
        r"got \[1, 2, 4\]",
    ),
    "hx-batch": ({}, (x(), hx(1, 3, 4)), {}, RuntimeError, r"must be \[1, 2, 4\].*got \[1, 3, 4\]"),
    "hx-rank": ({}, (x(), hx(2, 4)), {}, RuntimeError, r"must be \[1, 2, 4\].*got \[2, 4\]"),
    "hx-c": ({}, (x(), (hx()[0], hx(1, 2, 5)[1])), {}, RuntimeError, r"hx\[1\] must be \[1, 2, 4"),
    "hx-proj": (
        {"proj_size": 2}, (x(), hx()), {}, RuntimeError, r"hx\[0\] .*, proj_size\); got \[1, 2, 4\]"
    ),
    "hx-dtype": ({}, (x(), hx(dtype=torch.float64)), {}, ValueError, r"hx\[0\] .* torch.float32"),
    "hx-device": ({}, (x(), hx(device="meta")), {}, RuntimeError, r"hx\[0\] .*, cpu; got meta"),
    "hx-unbatched": ({}, (x(5, 3), hx()), {}, RuntimeError, "unbatched 2-D input, hx and cx"),
    "hx-packed": ({}, (packed(), hx(1, 3, 4)), {}, RuntimeError, r"must be \[1, 2, 4\]"),
    "lengths-shape": (
        {}, (x(),), {"lengths": torch.ones(3, dtype=torch.long)}, ValueError,
        r"lengths must be \[2\] \(batch\); got \[3\]",
    ),
    "lengths-number": ({}, (x(),), {"lengths": 3}, TypeError, r"lengths must be \[batch\]"),
    "lengths-float": ({}, (x(),), {"lengths": torch.ones(2)}, TypeError, "dtype; got torch.f"),
    "lengths-bool": ({}, (x(),), {"lengths": flags(2)}, TypeError, "integer dtype; got torch.bool"),
    "lengths-strings": ({}, (x(),), {"lengths": ["1", "2"]}, TypeError, "must be an integer"),
    "lengths-set": ({}, (x(),), {"lengths": {1, 2}}, TypeError, "an integer tensor .* set"),
    "lengths-large": ({}, (x(),), {"lengths": [5, 6]}, ValueError, r"0 and 5 \(time\); got 6"),
    "lengths-negative": ({}, (x(),), {"lengths": torch.tensor([-2, 5])}, ValueError, "got -2"),
    "lengths-batch-first": (
        {"batch_first": True}, (x(),), {"lengths": [2, 2, 2, 2, 3]}, ValueError, "0 and 2"
    ),
    "lengths-packed": ({}, (packed(),), {"lengths": [5, 3]}, ValueError, "lengths must be None"),
    "lengths-unbatched": ({}, (x(5, 3),), {"lengths": 6}, ValueError, "between 0 and 5"),
    "reset-list": ({}, (x(),), {"reset": [0, 1]}, TypeError, "reset must be a tensor; got list"),
    "reset-shape": (
        {}, (x(),), {"reset": flags(2, 5)}, ValueError,
        r"reset must be \[5, 2\] \(time, batch\); got \[2, 5\]",
    ),
    "reset-batch-first": (
        {"batch_first": True}, (x(),), {"reset": flags(2, 5)}, ValueError,
        r"reset must be \[5, 2\] \(batch, time\); got \[2, 5\]",
    ),
    "reset-unbatched": (
        {}, (x(5, 3),), {"reset": flags(5, 1)}, ValueError, r"reset must be \[5\] \(time\) for unb"
    ),
    "reset-packed": ({}, (packed(),), {"reset": flags(2, 5)}, ValueError, r"must be \[5, 2\]"),
    "reset-int": ({}, (x(),), {"reset": flags().long()}, TypeError, "float 0/1; got torch.int"),
    "reset-float": ({}, (x(),), {"reset": half}, ValueError, "reset must be 0 or 1 .*; got 0.5"),
    "reset-uint8": ({}, (x(),), {"reset": flags().byte() + 2}, ValueError, "0 or 1 .*; got 2"),
    "reset-device": ({}, (x(),), {"reset": flags().to("meta")}, RuntimeError, "reset .* got meta"),
    "backend-cuda": (
        {"backend": "cuda"}, (x(),), {}, RuntimeError, 'backend="cuda" wants input on cuda; got cpu'
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("case", CALL)
def test_call(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    construction, args, kwargs, error, message = CALL[case]
    if "backend" in construction and backend == "torch":
        pytest.skip("the case is about another backend")
    lstm = FusedLSTM(3, 4, **{"backend": backend, **construction})

    def work(*_: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("lstm_cuda.functional.fused_layer", work)
    monkeypatch.setattr("lstm_cuda.reference.lstm_layer", work)
    with pytest.raises(error, match=message):
        lstm(*args, **kwargs)


def rows(count: int = 1, **changes: torch.Tensor) -> list[list[torch.Tensor]]:
    row = {"w_ih": x(16, 3), "w_hh": x(16, 4), "b_ih": x(16), "b_hh": x(16), **changes}
    return [list(row.values())] * count


FUNCTIONAL: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "input": (lambda: fused_lstm(x(5, 3), None, rows()), ValueError, r"\[time, batch, input"),
    "input-batch-first": (
        lambda: fused_lstm(x(5, 3), None, rows(), batch_first=True), ValueError,
        r"input must be \[batch, time, input_size\], 3-D; got 2-D, \[5, 3\]",
    ),
    "no-weights": (lambda: fused_lstm(x(), None, []), ValueError, r"rows, .*; got 0"),
    "odd-rows": (
        lambda: fused_lstm(x(), None, rows(3), bidirectional=True), ValueError,
        r"num_layers \* 2 rows, one for each layer and direction; got 3",
    ),
    "row-of-one": (lambda: fused_lstm(x(), None, [[x(16, 3)]]), ValueError, "got 1 tensors"),
    "rows-differ": (
        lambda: fused_lstm(x(), None, [*rows(), rows()[0][:2]]), ValueError,
        r"weights\[1\] must have 4 tensors, as weights\[0\]; got 2",
    ),
    "w_ih": (
        lambda: fused_lstm(x(), None, rows(w_ih=x(12, 3))), RuntimeError,
        r"weights\[0\]\[0\] \(w_ih\) must be \[16, 3\]; got \[12, 3\]",
    ),
    "w_ih-second-layer": (
        lambda: fused_lstm(x(), None, rows(2)), RuntimeError,
        r"weights\[1\]\[0\] \(w_ih\) must be \[16, 4\]; got \[16, 3\]",
    ),
    "w_hh-rank": (lambda: fused_lstm(x(), None, rows(w_hh=x(16))), ValueError, r"w_hh.*got \[16\]"),
    "w_hh-gates": (
        lambda: fused_lstm(x(), None, rows(w_hh=x(15, 4))), ValueError, r"w_hh.*got \[15, 4\]"
    ),
    "w_hh-projection": (
        lambda: fused_lstm(x(), None, rows(w_hh=x(16, 3))), ValueError, "without a projection w_hr"
    ),
    "bias": (lambda: fused_lstm(x(), None, rows(b_hh=x(4))), RuntimeError, r"b_hh\) must be \[16"),
    "w_hr": (
        lambda: fused_lstm(x(), None, rows(w_hh=x(16, 2), w_hr=x(4, 2))), RuntimeError,
        r"w_hr\) must be \[2, 4\]; got \[4, 2\]",
    ),
    "weight-dtype": (
        lambda: fused_lstm(x(), None, rows(b_ih=x(16).double())), ValueError,
        r"weights\[0\]\[2\] \(b_ih\) must have the input's dtype, torch.float32; got torch.float64",
    ),
    "weight-device": (
        lambda: fused_lstm(x(), None, rows(b_ih=x(16, device="meta"))), RuntimeError,
        r"weights\[0\]\[2\] \(b_ih\) must be on the input's device, cpu; got meta",
    ),
    "dropout": (lambda: fused_lstm(x(), None, rows(), dropout=2), ValueError, "dropout .*; got 2"),
    "reverse": (
        lambda: fused_lstm(x(), None, rows(2), bidirectional=True, reverse=True), ValueError,
        "reverse=True is for one direction",
    ),
    "backend": (lambda: fused_lstm(x(), None, rows(), backend="x"), ValueError, "backend must be"),
    "peephole-rows": (
        lambda: fused_lstm(x(), None, rows(), peephole=[], backend="torch"), ValueError,
        "peephole must have 1 rows, one for each layer and direction; got 0",
    ),
    "peephole-size": (
        lambda: fused_lstm(x(), None, rows(), peephole=[[x(4), x(4), x(3)]], backend="torch"),
        RuntimeError, r"peephole\[0\]\[2\] must be \[4\]; got \[3\]",
    ),
    "layer_norm-count": (
        lambda: fused_lstm(x(), None, rows(), layer_norm=[[x(16)]], backend="torch"),
        ValueError, r"layer_norm\[0\] must have 3 or 4 tensors; got 1",
    ),
    "cell": (lambda: Cell(zoneout=0.5), ValueError, "zoneout must be two probabilities"),
    "cell-input": (
        lambda: FusedLSTMCell(3, 4)(x(1, 2, 3)), ValueError, "Expected input to be 1D or 2D, got 3D"
    ),
    "cell-list": (lambda: FusedLSTMCell(3, 4)([1]), TypeError, "input must be a tensor; got list"),
    "cell-hx": (
        lambda: FusedLSTMCell(3, 4)(x(2, 3), hx(4)), ValueError, "Expected hx to be 2D .* got 1D"
    ),
    "cell-hx-size": (
        lambda: FusedLSTMCell(3, 4)(x(2, 3), hx(2, 5)), RuntimeError, r"hx\[0\] must be \[1, 2, 4\]"
    ),
    "cell-backend": (lambda: FusedLSTMCell(3, 4, backend=1), ValueError, "backend must be one of"),
    "explain": (lambda: explain(nn.LSTM(3, 4), x()), TypeError, "must be a FusedLSTM; got LSTM"),
}  # fmt: skip


@pytest.mark.parametrize("case", FUNCTIONAL)
def test_functional(case: str) -> None:
    f, error, message = FUNCTIONAL[case]
    with pytest.raises(error, match=message):
        f()


def test_a_build_without_kernels_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.load_error is None and ops.build_info()["cuda"]:
        pytest.skip("this build has CUDA kernels")
    with pytest.raises(RuntimeError, match=r'pip install.*backend="torch"'):
        ops.require("cuda")
    with pytest.raises(RuntimeError, match=r'no kernels for xpu tensors; backend="torch" runs'):
        ops.require("xpu")
    monkeypatch.setattr(ops, "load_error", "no compiled part; backend=torch works")
    with pytest.raises(RuntimeError, match="no compiled part"):
        FusedLSTM(3, 4)(x())
    with pytest.raises(RuntimeError, match="no compiled part"):
        ops.build_info()
    assert FusedLSTM(3, 4, backend="torch")(x())[0].shape == (5, 2, 4)


def test_lengths_on_another_device_are_clamped() -> None:
    """Where looking at them would wait for the device, they are not looked at."""
    lstm = FusedLSTM(3, 4, device="meta")
    y, _ = lstm(x(device="meta"), lengths=torch.empty(2, dtype=torch.long, device="meta"))
    assert y.shape == (5, 2, 4)
