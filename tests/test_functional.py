"""What fused_lstm promises: lengths, resets, states, gradients, dtypes and sizes at the edge."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    NAMES,
    Data,
    Problem,
    assert_accurate,
    assert_equal,
    call,
    close,
    gradients,
    make,
    truth,
)
from torch import Tensor

from lstm_cuda import fused_lstm, ops

BACKENDS = ["auto", "torch"]
STACKS = [
    Problem(6, 3, 5, 9, L=2, bidirectional=True),
    Problem(5, 4, 7, 16, L=3, P=6, lengths=True),
    Problem(9, 2, 3, 33, L=2, reverse=True, reset=True, bias=False),
    Problem(7, 5, 4, 13, L=2, bidirectional=True, P=3, lengths=True, reset=True, hx=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("p", STACKS, ids=str)
def test_accuracy(p: Problem, dtype: torch.dtype, device: str) -> None:
    assert_accurate(p, make(p, device), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
def test_nan_past_a_length_reaches_nothing(backend: str, bidirectional: bool, device: str) -> None:
    p = Problem(6, 5, 3, 7, L=2, bidirectional=bidirectional, lengths=True)
    clean, dirty = make(p, device).to(torch.float64), make(p, device).to(torch.float64)
    past = torch.arange(p.T, device=device)[:, None] >= dirty.lengths
    with torch.no_grad():
        dirty.x[past] = float("nan")
        dirty.x[-1, past[-1]] = float("inf")
    a, b = call(p, dirty, backend), call(p, clean, backend)
    for name in a:
        close(a[name], b[name])
    assert (a["y"][past] == 0).all() and (a["cells"][past] == 0).all()
    a, b = gradients(a, dirty), gradients(b, clean)
    for name in a:
        close(a[name], b[name])
    assert (a["dx"][past] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_the_incoming_gradient_past_a_length_reaches_nothing(
    backend: str, device: str
) -> None:
    p = Problem(6, 5, 3, 7, lengths=True)
    d = make(p, device).to(torch.float64)
    past = torch.arange(p.T, device=device)[:, None] >= d.lengths
    outputs = call(p, d, backend)
    expected = gradients(call(p, d, backend), d, "y")
    d.cotangents["y"][past] = float("nan")
    for name, grad in gradients(outputs, d, "y").items():
        close(grad, expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_length_zero_returns_the_first_state(backend: str, device: str) -> None:
    p = Problem(4, 3, 2, 5, bidirectional=True)
    d = make(p, device).to(torch.float64)
    lengths = torch.zeros(3, dtype=torch.int64, device=device)
    reset = torch.ones(4, 3, dtype=torch.bool, device=device)
    y, (h_n, c_n) = fused_lstm(
        d.x, d.hx, d.weights, bidirectional=True, lengths=lengths, reset=reset, backend=backend
    )
    assert (y == 0).all()
    assert_equal((h_n, c_n), d.hx)
    dh0, dx = torch.autograd.grad(h_n, [d.hx[0], d.x], d.cotangents["h_n"])
    assert_equal(dh0, d.cotangents["h_n"])
    assert (dx == 0).all()


@pytest.mark.parametrize(
    "kind",
    [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, "list", "tuple"],
    ids=str,
)
def test_lengths_of_any_integer_kind_pt43227_pt47637(kind: torch.dtype | str, device: str) -> None:
    p = Problem(5, 3, 2, 4)
    d = make(p, device)
    values = [3, 5, 0]
    as_given = {"list": values, "tuple": tuple(values)}
    lengths = as_given[kind] if isinstance(kind, str) else torch.tensor(values, dtype=kind)
    found = fused_lstm(d.x, d.hx, d.weights, lengths=lengths)
    assert_equal(found, fused_lstm(d.x, d.hx, d.weights, lengths=torch.tensor(values).to(device)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64], ids=str)
def test_reset_of_any_kind(dtype: torch.dtype, device: str) -> None:
    p = Problem(6, 3, 2, 4, reset=True)
    d = make(p, device)
    expected = fused_lstm(d.x, d.hx, d.weights, reset=d.reset)
    assert_equal(fused_lstm(d.x, d.hx, d.weights, reset=d.reset.to(dtype)), expected)
    without = fused_lstm(d.x, d.hx, d.weights)
    assert not torch.equal(expected[0], without[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_reset_equals_splitting(backend: str, reverse: bool, at: int, device: str) -> None:
    p = Problem(6, 2, 3, 5, reverse=reverse)
    d = make(p, device).to(torch.float64)
    reset = torch.zeros(6, 2, dtype=torch.bool, device=device)
    reset[at, 0] = True  # the other row has no boundary
    y, (h_n, c_n) = fused_lstm(d.x, d.hx, d.weights, reverse=reverse, reset=reset, backend=backend)
    split, row = _split_at(d, reverse, at)
    whole = truth(p, d)
    close(y[:, :1], split["y"])
    close(y[:, 1:], whole["y"][:, 1:])
    close(h_n[:, :1], split["h_n"])
    close(c_n[:, :1], split["c_n"])
    weights = d.weights[0]
    grads = torch.autograd.grad(
        [y[:, :1], h_n[:, :1]], [d.x, *d.hx, *weights], [row["y"], row["h_n"]], allow_unused=True
    )
    expected = torch.autograd.grad(
        [split["y"], split["h_n"]], [d.x, *d.hx, *weights], [row["y"], row["h_n"]],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    for a, b in zip(grads, expected, strict=True):
        close(a, b)


def _split_at(d: Data, reverse: bool, at: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Row 0 run as two sequences, and its gradients to feed. The first to run has hx."""
    state = (d.hx[0][:, :1], d.hx[1][:, :1])
    parts = [d.x[:at, :1], d.x[at:, :1]]
    ys = []
    h_n = c_n = torch.empty(0)
    for k in (1, 0) if reverse else (0, 1):
        hx = state if k == int(reverse) else None
        if k == 0 and at == 0 and reverse:
            continue  # nothing to run before step 0: the state stays that of the other part
        y, (h_n, c_n) = fused_lstm(parts[k], hx, d.weights, reverse=reverse, backend="torch")
        ys.append(y)
    y = torch.cat(ys[::-1] if reverse else ys)
    grads = {"y": d.cotangents["y"][:, :1], "h_n": d.cotangents["h_n"][:, :1]}
    return {"y": y, "h_n": h_n, "c_n": c_n}, grads


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
def test_nan_before_a_reset_does_not_cross_it(
    backend: str, bidirectional: bool, device: str
) -> None:
    p = Problem(6, 2, 3, 5, bidirectional=bidirectional)
    d = make(p, device).to(torch.float64)
    reset = torch.zeros(6, 2, dtype=torch.bool, device=device)
    reset[3] = True
    with torch.no_grad():
        d.x[1] = float("nan")
    y, _ = fused_lstm(
        d.x, d.hx, d.weights, reset=reset, bidirectional=bidirectional, backend=backend
    )
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[3:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_row_stays_there(backend: str, bad: float, device: str) -> None:
    p = Problem(5, 9, 3, 7, L=2, bidirectional=True)
    clean, dirty = make(p, device).to(torch.float64), make(p, device).to(torch.float64)
    with torch.no_grad():
        dirty.x[2, 4, 1] = bad
    others = [b for b in range(9) if b != 4]
    a, b = call(p, dirty, backend), call(p, clean, backend)
    for name in a:
        close(a[name][:, others], b[name][:, others])
    da, db = gradients(a, dirty), gradients(b, clean)
    for name in ("dx", "dh0", "dc0"):
        close(da[name][:, others], db[name][:, others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T, B", [(0, 3), (4, 0), (0, 0)])
def test_empty(backend: str, T: int, B: int, device: str) -> None:
    p = Problem(T, B, 3, 5, L=2, bidirectional=True)
    d = make(p, device).to(torch.float64)
    outputs = call(p, d, backend)
    assert outputs["y"].shape == (T, B, 10) and outputs["cells"].shape == (T, B, 10)
    if T == 0:
        assert_equal((outputs["h_n"], outputs["c_n"]), d.hx)
    grads = gradients(outputs, d)
    for name, leaf in d.leaves().items():
        assert grads[f"d{name}"].shape == leaf.shape
    if T == 0:
        assert_equal(grads["dh0"], d.cotangents["h_n"])
    assert all((grads[name] == 0).all() for name in grads if name.startswith("dweights"))


def test_longer_than_65536_steps_pt133751(device: str) -> None:
    p = Problem(70_001, 1, 1, 2, hx=False)
    d = make(p, device).to(torch.float32)
    y, (h_n, _) = fused_lstm(d.x, None, d.weights)
    (dx,) = torch.autograd.grad(y[-1].sum(), d.x)
    tail = d.x[-300:].detach().requires_grad_()  # what lies further back has long been forgotten
    y_tail, _ = fused_lstm(tail, None, d.weights, backend="torch")
    close(y[-1], y_tail[-1], 5e-6)
    assert_equal(h_n[0], y[-1])
    (dtail,) = torch.autograd.grad(y_tail[-1].sum(), tail)
    close(dx[-300:], dtail, 5e-6)


def test_batch_first_is_the_transpose(device: str) -> None:
    p = Problem(5, 3, 2, 4, L=2, bidirectional=True, lengths=True, reset=True)
    d = make(p, device)
    options = {"bidirectional": True, "lengths": d.lengths, "return_cells": True}
    y, state, cells = fused_lstm(d.x, d.hx, d.weights, reset=d.reset, **options)
    x, reset = d.x.transpose(0, 1), d.reset.t()
    y2, state2, cells2 = fused_lstm(x, d.hx, d.weights, reset=reset, batch_first=True, **options)
    assert_equal((y2, state2, cells2), (y.transpose(0, 1), state, cells.transpose(0, 1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_between_layers_and_in_training_only(backend: str, device: str) -> None:
    p = Problem(5, 4, 3, 8, L=2)
    d = make(p, device)
    arguments = (d.x, d.hx, d.weights)
    options = {"dropout": 0.5, "backend": backend}
    plain = fused_lstm(*arguments, backend=backend)
    assert_equal(fused_lstm(*arguments, **options), plain)
    torch.manual_seed(7)
    y, (h_n, _) = fused_lstm(*arguments, training=True, **options)
    torch.manual_seed(7)
    first = (d.hx[0][:1], d.hx[1][:1]), (d.hx[0][1:], d.hx[1][1:])
    between, (h_1, _) = fused_lstm(d.x, first[0], d.weights[:1])
    expected, _ = fused_lstm(F.dropout(between, 0.5), first[1], d.weights[1:])
    close(y, expected)
    close(h_n[0], h_1[0])
    assert not torch.equal(y, plain[0])


NEEDS = ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"]


@pytest.mark.parametrize("needed", [*NEEDS, "h0-w_hh", "x-b_hh"])
def test_any_subset_of_inputs_may_need_a_gradient(needed: str, device: str) -> None:
    d = make(Problem(4, 3, 2, 5, P=3, lengths=True), device)
    inputs = dict(zip(NEEDS, [d.x, *d.hx, *d.weights[0]], strict=True))
    leaves = [inputs[name].requires_grad_() for name in needed.split("-")]

    def grads(backend: str) -> tuple[Tensor, ...]:
        y, (h_n, c_n) = fused_lstm(d.x, d.hx, d.weights, lengths=d.lengths, backend=backend)
        outputs = [out for out in (y, h_n, c_n) if out.requires_grad]
        return torch.autograd.grad(outputs, leaves, [out.detach().sin() for out in outputs])

    for a, b in zip(grads("auto"), grads("torch"), strict=True):
        close(a, b)


def test_second_backward_is_right(device: str) -> None:
    p = Problem(5, 3, 4, 6, L=2, bidirectional=True, lengths=True)
    d = make(p, device).to(torch.float32)
    y = call(p, d)["y"]
    leaves = list(d.leaves().values())
    first = torch.autograd.grad(y, leaves, d.cotangents["y"], retain_graph=True)
    torch.autograd.grad(y, leaves, d.cotangents["y"] * 3 + 1, retain_graph=True)
    assert_equal(torch.autograd.grad(y, leaves, d.cotangents["y"]), first)


def test_the_two_bias_gradients_do_not_share_memory(device: str) -> None:
    p = Problem(3, 2, 4, 5, bidirectional=True)
    d = make(p, device).to(torch.float32)
    call(p, d)["y"].sum().backward()
    biases = [w for row in d.weights for w in row[2:4]]
    assert_equal(biases[0].grad, biases[1].grad)
    for bias in biases[:2]:
        before = [other.grad.clone() for other in biases if other is not bias]
        bias.grad.mul_(2)
        assert_equal([other.grad for other in biases if other is not bias], before)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "nothing needs it"])
def test_nothing_is_saved_in_inference(mode: str, device: str) -> None:
    p = Problem(3, 2, 4, 5)
    d = make(p, device)
    contexts = {"no_grad": torch.no_grad(), "inference_mode": torch.inference_mode()}
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    if mode != "nothing needs it":
        d = d.to(torch.float64)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with contexts.get(mode, torch.enable_grad()), hooks:
        y, (h_n, c_n) = fused_lstm(d.x, d.hx, d.weights)
    assert not saved and not (y.requires_grad or h_n.requires_grad or c_n.requires_grad)
    close(y, truth(p, d)["y"])


def test_the_op_saves_and_is_asked_only_for_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    calls: dict[str, list[tuple[Any, ...]]] = {"layer_forward": [], "layer_backward": []}
    for name, seen in calls.items():
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, op=op, seen=seen: (seen.append(a), op(*a))[1])
    p = Problem(3, 2, 4, 5)
    d = make(p, device).to(torch.float64)
    with torch.no_grad():
        fused_lstm(d.x, d.hx, d.weights)
    _, (h_n, _) = fused_lstm(d.x, d.hx, d.weights)
    inference, training = (a[10:12] for a in calls["layer_forward"])
    assert inference == (False, False) and training == (True, False)  # save, cells
    torch.autograd.grad(h_n.sum(), d.x, retain_graph=True)
    torch.autograd.grad(h_n.sum(), d.weights[0])
    for arguments in calls["layer_backward"]:
        dy, dh_n, dc_n, dc = arguments[:4]
        assert dy is None and dc_n is None and dc is None and dh_n is not None


def test_double_backward(device: str) -> None:
    p = Problem(4, 2, 3, 4, bidirectional=True, P=2, lengths=True, reset=True)
    d = make(p, device).to(torch.float64)
    results = []
    for f in (call, truth):
        outputs = f(p, d)
        leaves = list(d.leaves().values())
        first = torch.autograd.grad(
            list(outputs.values()),
            leaves,
            [out.sin() for out in outputs.values()],
            create_graph=True,
        )
        penalty = sum((grad * grad).sum() for grad in first)
        results.append(torch.autograd.grad(penalty, leaves))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-11)


def test_third_derivative(device: str) -> None:
    d = make(Problem(3, 1, 1, 2), device).to(torch.float64)

    def third(backend: str) -> Tensor:
        value = fused_lstm(d.x, d.hx, d.weights, backend=backend)[0].pow(2).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, d.x, create_graph=True)
            value = grad.sum()
        return value

    close(third("auto"), third("torch"), 1e-11)


def test_weights_computed_from_the_input(device: str) -> None:
    """A gradient by x must not count the way through weights made from x twice."""
    d = make(Problem(3, 2, 2, 3), device)
    a = torch.randn(2, dtype=torch.float64, device=device, requires_grad=True)

    def f(a: Tensor) -> Tensor:
        x = d.x * a
        row = [d.weights[0][0] * x.sum(), *d.weights[0][1:]]
        return fused_lstm(x, d.hx, [row])[0]

    assert torch.autograd.gradcheck(f, a)
    assert torch.autograd.gradgradcheck(f, a)


def test_cells_are_the_last_layers_pt8938_pt31423(device: str) -> None:
    p = Problem(5, 3, 4, 6, L=2, bidirectional=True)
    d = make(p, device).to(torch.bfloat16)
    y, (_, c_n), cells = fused_lstm(d.x, d.hx, d.weights, bidirectional=True, return_cells=True)
    assert cells.shape == (5, 3, 12) and cells.dtype == torch.bfloat16
    assert_equal(cells[-1, :, :6], c_n[2])
    assert_equal(cells[0, :, 6:], c_n[3])
    assert y.dtype == torch.bfloat16


def test_saturated_gates(device: str) -> None:
    p = Problem(6, 3, 4, 9)
    d = make(p, device)
    with torch.no_grad():
        for w in d.weights[0]:
            w *= 30
    assert_accurate(p, d, torch.float64)
    y = call(p, d.to(torch.float32))["y"]
    assert torch.isfinite(y).all() and y.abs().max() <= 1
