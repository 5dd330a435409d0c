"""checkpoint=k: a plain layer's bits in less memory. truncate=k: a loop over calls of k steps."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
import torch._dynamo.testing
from helpers import DTYPES, NAMES, Data, Problem, Results, assert_equal, close, compare, error, make
from torch import Tensor

from lstm_cuda import FusedLSTM, explain, fused_lstm, ops

ALL = "y h_n c_n cells"
PROBLEMS = [
    Problem(7, 3, 4, 5),
    Problem(9, 4, 3, 6, reverse=True, lengths=True, reset=True),
    Problem(8, 3, 2, 7, L=2, P=2, bias=False, reset=True),
    Problem(10, 5, 3, 9, L=2, bidirectional=True, P=3, lengths=True, reset=True),
    Problem(6, 4, 3, 17, bidirectional=True, lengths=True, hx=False),
]
STEPS = [1, 3, 4, 20]


def call_with(**modes: Any) -> Callable[[Problem, Data], Results]:
    def call(p: Problem, d: Data) -> Results:
        y, (h_n, c_n), cells = fused_lstm(
            d.x, d.hx, d.weights, lengths=d.lengths, reset=d.reset, return_cells=True,
            **p.options(), **modes,
        )  # fmt: skip
        return {"y": y, "h_n": h_n, "c_n": c_n, "cells": cells}

    return call


def run(p: Problem, d: Data, of: str = ALL, **modes: Any) -> Results:
    return helpers.run(call_with(**modes), p, d, of)


def loop(k: int) -> Callable[[Problem, Data], Results]:
    """What users write: calls of k steps, the grid counted from the first step of time."""

    def call(p: Problem, d: Data) -> Results:
        starts = range(0, p.T, k)
        state, parts = d.hx, []
        for start in reversed(starts) if p.reverse else starts:
            if parts:
                state = (state[0].detach(), state[1].detach())
            y, state, cells = fused_lstm(
                d.x[start : start + k], state, d.weights, return_cells=True, **p.options()
            )
            parts.append((y, cells))
        y, cells = zip(*(parts[::-1] if p.reverse else parts), strict=True)
        return {"y": torch.cat(y), "h_n": state[0], "c_n": state[1], "cells": torch.cat(cells)}

    return call


def same(a: Results, b: Results) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def near(a: Results, b: Results) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert error(a[name], b[name]) <= 1e-12, f"{name}: error {error(a[name], b[name]):.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_checkpoint_is_accurate(p: Problem, dtype: torch.dtype) -> None:
    d = make(p).to(dtype).to(torch.float64)
    ref, eager = (
        helpers.run(helpers.truth, p, d, ALL),
        helpers.run(helpers.truth, p, d.to(dtype), ALL),
    )
    for k in STEPS:
        compare(run(p, d.to(dtype), checkpoint=k), eager, ref, dtype)


@pytest.mark.parametrize("p", PROBLEMS[1:4:2], ids=str)
def test_on_each_device(p: Problem, device: str) -> None:
    d = make(p, device).to(torch.float64)
    near(run(p, d, checkpoint=4), run(p, d))
    near(run(p, d, truncate=4), run(p, d, truncate=4, backend="torch"))
    near(run(p, d, truncate=4, checkpoint=2), run(p, d, truncate=4))


@pytest.mark.parametrize("of", ["y", "h_n", "c_n", "cells"])
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_any_output_alone(p: Problem, of: str) -> None:
    d = make(p).to(torch.float64)
    near(run(p, d, of, checkpoint=4), run(p, d, of))
    expected = run(p, d, of, truncate=4, backend="torch")
    near(run(p, d, of, truncate=4), expected)
    near(run(p, d, of, truncate=4, checkpoint=2), expected)


# Of many rows, chunks and spans of a sum; of rows that end and begin inside them.
LARGE = [
    Problem(90, 16, 20, 32, lengths=True),
    Problem(61, 1, 5, 7),
    Problem(150, 7, 16, 130, reverse=True, lengths=True),
    Problem(12, 300, 3, 24, reset=True),
    Problem(40, 13, 33, 48, bidirectional=True, P=24, lengths=True, reset=True),
    Problem(9, 3, 2, 520, P=40),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("p", PROBLEMS + LARGE, ids=str)
def test_checkpoint_gives_the_bits_of_a_plain_backward(p: Problem, dtype: torch.dtype) -> None:
    """Where pairs of bfloat16 are multiplied, a pair of rows must not fall into two segments."""
    d = make(p).to(dtype)
    pairs = dtype == torch.bfloat16 and ops._C.cpu_capability() == "avx512_bf16"
    if pairs and (p.lengths or p.B % 2):
        pytest.skip("an odd number of rows in a step")
    plain = run(p, d)
    for k in (1, 3, 4, 7, 20, 64):
        if k <= max(p.T, 4):
            same(run(p, d, checkpoint=k), plain)


@pytest.mark.parametrize("p", LARGE[:4:3], ids=str)
def test_the_bits_on_two_threads(p: Problem) -> None:
    torch.set_num_threads(2)  # the fixture of all tests sets it back
    d = make(p).to(torch.float32)
    plain = run(p, d)
    assert ops.plan_cpu(p.T, p.B, 1, p.I, p.H, p.H, torch.float32, True)["parts"] == min(2, p.B)
    for k in (5, 40):
        same(run(p, d, checkpoint=k), plain)


@pytest.mark.parametrize("p", PROBLEMS[:4], ids=str)
def test_truncated_gradients_have_the_same_bits_with_checkpoint(p: Problem) -> None:
    d = make(p).to(torch.float32)
    for truncate, k in ((4, 1), (4, 2), (3, 3), (6, 3)):
        same(run(p, d, truncate=truncate, checkpoint=k), run(p, d, truncate=truncate))


LOOPS = [Problem(11, 3, 5, 7), Problem(11, 8, 40, 33, reverse=True), Problem(9, 4, 3, 6, P=2)]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=NAMES.get)
@pytest.mark.parametrize("k", STEPS)
@pytest.mark.parametrize("p", LOOPS, ids=str)
def test_truncate_equals_a_loop(p: Problem, k: int, dtype: torch.dtype) -> None:
    d = make(p).to(dtype)
    detached = helpers.run(loop(k), p, d, ALL)
    found, whole = run(p, d, truncate=k), run(p, d)
    for name in detached:
        assert error(found[name], detached[name]) <= helpers.BOUNDS[dtype][0], name
    same({n: found[n] for n in ALL.split()}, {n: whole[n] for n in ALL.split()})
    if k < p.T:
        assert error(whole["dx"], detached["dx"]) > 1e-3


def test_truncated_layers_equal_a_loop_over_the_stack() -> None:
    p = Problem(10, 3, 4, 6, L=3)
    d = make(p).to(torch.float64)
    near(run(p, d, truncate=3), helpers.run(loop(3), p, d, ALL))


def test_no_wavefront_moves_the_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Problem(10, 3, 4, 6, L=2)
    d = make(p).to(torch.float64)
    expected = run(p, d, truncate=4)
    monkeypatch.setattr("lstm_cuda.functional.wavefront_chunks", lambda *_: 3)
    same(run(p, d, truncate=4), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_that_have_ended_keep_the_gradient_of_their_last_state(reverse: bool) -> None:
    """A row alone is cut at the same steps: others must not matter."""
    p = Problem(12, 4, 3, 5, reverse=reverse)
    d = make(p).to(torch.float64)
    d.lengths = torch.tensor([12, 5, 3, 0])
    found = run(p, d, "h_n c_n", truncate=4)
    for b, n in enumerate(d.lengths.tolist()):
        row = slice(b, b + 1)
        alone = make(p).to(torch.float64)
        alone.x = d.x.detach()[:n, row].requires_grad_()
        alone.hx = tuple(t.detach()[:, row].requires_grad_() for t in d.hx)
        alone.cotangents = {name: t[:, row] for name, t in d.cotangents.items()}
        q = Problem(n, 1, 3, 5, reverse=reverse)
        expected = helpers.run(loop(4), q, alone, "h_n c_n") if n else {}
        for name in ("dx", "dh0", "dc0") if n else ():
            part = found[name][:n, row] if name == "dx" else found[name][:, row]
            close(part, expected[name])
    assert_equal(found["dh0"][:, 3], d.cotangents["h_n"][:, 3])


def saved_elements(f: Callable[[], Any]) -> int:
    """Elements of the distinct storages that a forward pass keeps for backward."""
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.detach()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = f()
    del result
    return sum(t.untyped_storage().nbytes() // t.itemsize for t in found.values())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_memory_kept_for_backward(bidirectional: bool) -> None:
    """Of T steps only their input; and h and c of every k-th."""
    T, B, H, k, L = 64, 3, 8, 16, 2
    D = 2 if bidirectional else 1
    lstm = FusedLSTM(H, H, L, bidirectional=bidirectional)
    x = torch.randn(T, B, H, requires_grad=True)
    weights = sum(w.numel() for w in lstm.parameters())
    plain = saved_elements(lambda: lstm(x))
    assert plain == weights + T * B * (H + L * D * 6 * H)  # x, then gates, c and y of each layer
    lstm.truncate = k
    assert saved_elements(lambda: lstm(x)) == plain
    lstm.checkpoint = k
    states = L * T // k * B * D * 2 * H
    assert saved_elements(lambda: lstm(x)) == weights + T * B * (H + D * H) + states


def test_dropout_between_layers_is_drawn_once() -> None:
    lstm = FusedLSTM(4, 6, 3, dropout=0.5, dtype=torch.float64)
    x = torch.randn(9, 2, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for lstm.checkpoint in (None, 2):
        torch.manual_seed(5)
        y, _ = lstm(x)
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), [x, *lstm.parameters()])])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_what_runs_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward runs forward again with checkpoint alone; without gradients there is one call."""
    calls: list[int] = []
    forward = ops.layer_forward

    def counted(x: Tensor, *arguments: Any) -> Any:
        calls.append(x.shape[0])
        return forward(x, *arguments)

    monkeypatch.setattr(ops, "layer_forward", counted)
    lstm = FusedLSTM(3, 4)
    x = torch.randn(7, 2, 3)
    for modes, in_forward, in_backward in [
        ({}, [7], []),
        ({"truncate": 3}, [7], []),
        ({"checkpoint": 3}, [3, 3, 1], [1, 3, 3]),
        ({"checkpoint": 2, "truncate": 4}, [2, 2, 2, 1], [1, 2, 2, 2]),
    ]:
        for name in ("checkpoint", "truncate"):
            setattr(lstm, name, modes.get(name))
        with torch.no_grad():
            lstm(x)
        assert calls == [7]
        calls.clear()
        y = lstm(x)[0]
        assert calls == in_forward
        calls.clear()
        y.sum().backward()
        assert calls == in_backward
        calls.clear()


@pytest.mark.parametrize("given", [True, False], ids=["hx", "nohx"])
def test_c_is_not_rounded_between_segments(given: bool) -> None:
    """In bfloat16 a sum of small terms in c would stand still at 256 times their size."""
    T, H = 600, 4
    w_ih, w_hh = torch.zeros(4 * H, 1), torch.zeros(4 * H, H)
    bias = torch.tensor([30.0, 30.0, 0.01, 30.0]).repeat_interleave(H)  # c_t = c_{t-1} + 0.01
    row = [t.bfloat16().requires_grad_() for t in (w_ih, w_hh, bias, torch.zeros(4 * H))]
    x = torch.ones(T, 1, 1, dtype=torch.bfloat16)
    zeros = torch.zeros(1, 1, H, dtype=torch.bfloat16)
    hx = (zeros, zeros) if given else None
    results = []
    for k in (None, 1):
        _, (_, c_n) = fused_lstm(x, hx, [row], checkpoint=k)
        results.append([c_n, *torch.autograd.grad(c_n.sum(), row)])
    for a, b in zip(*results, strict=True):
        assert error(b, a) < 1e-2
    assert results[0][0].min() > 5


@pytest.mark.parametrize("T, B", [(0, 3), (4, 0)])
def test_empty(T: int, B: int) -> None:
    p = Problem(T, B, 3, 4, bidirectional=True)
    d = make(p).to(torch.float64)
    for modes in ({"checkpoint": 2}, {"truncate": 2}):
        near(run(p, d, **modes), run(p, d))


def test_the_reference_truncates_its_options() -> None:
    """The masks are those of the whole sequence, and the values do not change."""
    options = {"recurrent_dropout": 0.5, "peephole": True, "layer_norm": True, "backend": "torch"}
    lstm = FusedLSTM(3, 4, dtype=torch.float64, **options)
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for lstm.truncate in (None, 3):
        torch.manual_seed(2)
        y = lstm(x)[0]
        found.append((y, torch.autograd.grad(y[3:].sum(), x)[0]))
    (y, dx), (truncated, dx_truncated) = found
    assert_equal(y, truncated)
    assert (dx[:3] != 0).all() and (dx_truncated[:3] == 0).all()
    close(dx[3:], dx_truncated[3:])


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"checkpoint": 0}, ValueError, "checkpoint must be at least 1 step; got 0"),
    ({"truncate": -2}, ValueError, "truncate must be at least 1 step; got -2"),
    ({"checkpoint": 2.0}, TypeError, "checkpoint must be a number of steps.* got float"),
    ({"truncate": True}, TypeError, "truncate must be a number of steps.* got bool"),
    ({"checkpoint": 4, "truncate": 6}, ValueError, "multiple of checkpoint, 4.* got 6"),
    ({"checkpoint": 4, "backend": "torch"}, ValueError, 'backend="torch" runs on the reference'),
]


@pytest.mark.parametrize(
    "modes, kind, message", ERRORS, ids=lambda v: str(v) if v is dict else None
)
def test_errors(modes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        FusedLSTM(3, 4, **modes)
    d = make(Problem(4, 2, 3, 4))
    with pytest.raises(kind, match=message):
        fused_lstm(d.x, d.hx, d.weights, **modes)


def test_the_module() -> None:
    lstm = FusedLSTM(3, 4, checkpoint=16, truncate=32)
    assert lstm.extra_repr() == "3, 4, checkpoint=16, truncate=32"
    again = pickle.loads(pickle.dumps(lstm))
    assert (again.checkpoint, again.truncate) == (16, 32)
    assert lstm.state_dict().keys() == FusedLSTM(3, 4).state_dict().keys()
    with pytest.raises(ValueError, match=r"torch\.nn\.LSTM has no truncate"):
        lstm.to_torch()
    lstm.truncate = None
    again = FusedLSTM.from_torch(lstm.to_torch(), checkpoint=8)
    assert again.extra_repr() == "3, 4, checkpoint=8"
    meta = FusedLSTM(3, 4, checkpoint=2, device="meta")
    assert meta(torch.empty(5, 3, 3, device="meta"))[0].shape == (5, 3, 4)


def test_a_module_pickled_without_them() -> None:
    lstm = FusedLSTM(3, 4)
    del lstm.__dict__["checkpoint"], lstm.__dict__["truncate"]
    old = pickle.loads(pickle.dumps(lstm))
    assert old.extra_repr() == "3, 4"
    assert old(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


def test_explain() -> None:
    lstm = FusedLSTM(3, 4, 2, bidirectional=True, checkpoint=16, truncate=32)
    x = torch.randn(64, 2, 3)
    first = explain(lstm, x).splitlines()[0]
    assert "forward again" in first and "segments of 16 steps" in first
    assert "gradients end every 32 steps" in first
    with torch.no_grad():
        assert "segments" not in explain(lstm, x)
