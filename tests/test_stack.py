"""Stacks in a wavefront: layers side by side, each one chunk of time behind the layer below."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
from helpers import NAMES, Problem, assert_accurate, assert_equal, close, error, make
from torch import Tensor

from lstm_cuda import fused_lstm, stack

PROBLEMS = [
    Problem(7, 3, 4, 5, L=2),
    Problem(8, 2, 3, 4, L=3, lengths=True, reset=True),
    Problem(9, 3, 3, 6, L=2, P=2, lengths=True),
    Problem(6, 2, 3, 4, L=4, hx=False, reset=True),
]


def in_chunks(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    monkeypatch.setattr("lstm_cuda.functional.wavefront_chunks", lambda *_: chunks)


@pytest.mark.parametrize("chunks", [2, 3, 5])
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_the_results_are_those_of_one_chunk(
    p: Problem, chunks: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = make(p, device).to(torch.float64)
    expected = helpers.run(helpers.call, p, d, "y h_n c_n cells")
    in_chunks(monkeypatch, chunks)
    found = helpers.run(helpers.call, p, d, "y h_n c_n cells")
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        close(found[name], t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_accuracy_in_16_bits(
    p: Problem, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks(monkeypatch, 3)
    assert_accurate(p, make(p, device), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("family", ["rec_cta", "rec_step"])
@pytest.mark.parametrize("p", PROBLEMS[1:], ids=str)
def test_nothing_is_lost_between_chunks(
    p: Problem,
    family: str,
    dtype: torch.dtype,
    emulated_ops: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of h nothing is left to lose: it is rounded in every step. (The other families have another
    sum in the first step, of h0 and its weights.)
    """
    if p.P and family == "rec_cta":
        pytest.skip("a folded projection has another sum in the first step, too")
    d = make(p).to(dtype)
    assert emulated_ops.force_kernel(family)
    try:
        with torch.no_grad():
            expected = helpers.call(p, d)
            in_chunks(monkeypatch, 3)
            found = helpers.call(p, d)
    finally:
        emulated_ops.force_kernel("")
    assert_equal([*found.values()], [*expected.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_repeats_bit_for_bit(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = PROBLEMS[1]
    in_chunks(monkeypatch, 4)
    first, *others = (
        [*helpers.run(helpers.call, p, make(p, device).to(dtype), "y h_n c_n cells").values()]
        for _ in range(3)
    )
    for other in others:
        assert_equal(other, first)


def test_gradients_of_weights_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added up in bfloat16, those of many chunks would lose what those of one do not."""
    p = Problem(1024, 2, 8, 8, L=2)
    d64 = make(p).to(torch.bfloat16).to(torch.float64)
    expected = helpers.run(helpers.truth, p, d64, "y")
    errors = []
    for chunks in (1, 16):
        in_chunks(monkeypatch, chunks)
        found = helpers.run(helpers.call, p, d64.to(torch.bfloat16), "y")
        names = [name for name in expected if name.startswith("dweights")]
        errors.append(sum(error(found[name], expected[name]) for name in names) / len(names))
    assert errors[1] <= 1.5 * errors[0]  # two roundings, of each chunk's and of the sum: 2 ** 0.5


def test_dropout_between_layers_is_drawn_in_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = [[torch.randn(16, n), torch.randn(16, 4)] for n in (3, 4)]
    in_chunks(monkeypatch, 4)
    calls = []

    def dropout(y: Tensor, probability: float) -> Tensor:
        calls.append((y.shape[0], probability))
        return y

    monkeypatch.setattr("torch.nn.functional.dropout", dropout)
    fused_lstm(torch.randn(10, 2, 3), None, weights, dropout=0.25, training=True)
    assert calls == [(2, 0.25), (3, 0.25), (2, 0.25), (3, 0.25)]


@pytest.mark.parametrize("L, chunks", [(1, 1), (2, 5), (5, 2), (3, 3)])
def test_every_chunk_comes_after_what_it_needs(L: int, chunks: int) -> None:
    done: set[tuple[int, int]] = set()
    together = 0
    before: tuple[int, int] | None = None
    for layer, k in stack._diagonals(L, chunks):
        assert layer == 0 or (layer - 1, k) in done
        assert k == 0 or (layer, k - 1) in done
        if before is not None and before[0] == layer + 1 and before[1] == k - 1:
            together += 1  # the layer above was started first, so it does not wait for this one
        before = (layer, k)
        done.add(before)
    assert done == {(layer, k) for layer in range(L) for k in range(chunks)}
    assert together == (L - 1) * (chunks - 1)


def test_where_there_is_no_wavefront(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a plain stack, on CUDA."""

    class OnCuda:
        device = torch.device("cuda")
        shape = (512, 8, 4)

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    asked: list[Any] = []

    def plan(*arguments: Any) -> int:
        asked.append(arguments)
        return 4

    monkeypatch.setattr(stack.ops, "wavefront_chunks", plan)
    monkeypatch.setattr(stack.ops.CudaDevice, "of", lambda _: None)
    one, two = ([[torch.empty(16, 4), torch.empty(16, 4)]] * n for n in (1, 2))
    x: Any = OnCuda(torch.float32)
    assert stack.wavefront_chunks(x, two, 1, 0) == 4 and len(asked) == 1
    assert stack.wavefront_chunks(x, one, 1, 0) == 1
    assert stack.wavefront_chunks(x, two, 2, 2) == 1
    assert stack.wavefront_chunks(x, two, 1, 1) == 1
    assert stack.wavefront_chunks(torch.empty(512, 8, 4), two, 1, 0) == 1
    half: Any = OnCuda(torch.bfloat16)
    assert stack.wavefront_chunks(half, two, 1, 0) == 4 and len(asked) == 2
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert stack.wavefront_chunks(x, two, 1, 0) == 1 and len(asked) == 2
