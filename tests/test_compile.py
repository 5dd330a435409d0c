"""Whole programs under torch.compile and torch.export; op by op: test_transforms.py."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_equal, close, error
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_cuda
from lstm_cuda import FusedLSTM

ROOT = Path(lstm_cuda.__file__).parent.parent
SIZES = [(5, 3), (7, 4), (9, 6), (23, 2)]  # T, B


class Tagger(nn.Module):
    """Rows of different length through a stack with all that the fused op has."""

    def __init__(self, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, dtype=dtype)
        self.lstm = FusedLSTM(8, 6, 2, batch_first=True, dtype=dtype, **options)
        D, H = (2 if self.lstm.bidirectional else 1), self.lstm.proj_size or 6
        self.head = nn.Linear(D * H, 5, dtype=dtype)

    def forward(self, words: Tensor, lengths: Tensor | None = None) -> Tensor:
        scores: Tensor = self.head(self.lstm(self.embedding(words), lengths=lengths)[0])
        return scores

    def loss(self, words: Tensor, lengths: Tensor | None = None) -> Tensor:
        return nn.functional.cross_entropy(
            self(words, lengths).flatten(0, 1), (words % 5).flatten()
        )


def batch(T: int, B: int) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (B, T)), torch.randint(0, T + 1, (B,))


def pair(**options: Any) -> tuple[Tagger, Tagger]:
    """Two models with the same parameters."""
    first, second = Tagger(**options), Tagger(**options)
    second.load_state_dict(first.state_dict())
    return first, second


def assert_same_training(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        close(p.grad, q.grad)
        close(p, q)


MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@pytest.mark.parametrize("mode", MODES)
def test_training_in_each_mode(mode: str) -> None:
    torch._dynamo.reset()
    model, expected = pair(bidirectional=True)
    loss = torch.compile(model.loss, fullgraph=True, dynamic=True, mode=mode)
    for T, B in SIZES[:2]:
        words, lengths = batch(T, B)
        found, wanted = loss(words, lengths), expected.loss(words, lengths)
        close(found, wanted)
        found.backward()
        wanted.backward()
    assert_same_training(model, expected)


def test_compiled_training_steps() -> None:
    """Backward in the same graph as forward, and a compiled optimizer; dropout draws as eager."""
    torch._dynamo.reset()
    model, expected = pair(bidirectional=True, proj_size=3, dropout=0.4)

    def gradients(model: Tagger, words: Tensor, lengths: Tensor) -> Tensor:
        loss = model.loss(words, lengths)
        loss.backward()
        return loss.detach()

    steps: list[tuple[Tagger, Callable[..., Tensor], Callable[[], Any]]] = []
    for m in model, expected:
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        steps.append((m, gradients, optimizer.step))
    compiled = torch.compile(gradients, fullgraph=True, dynamic=True, backend="aot_eager")
    steps[0] = model, compiled, torch.compile(steps[0][2], backend="aot_eager")
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for T, B in SIZES:
            words, lengths = batch(T, B)
            losses = []
            for m, backward, step in steps:
                torch.manual_seed(T)
                m.zero_grad()
                losses.append(backward(m, words, lengths))
                step()
            close(*losses)
    assert_same_training(model, expected)


@pytest.mark.parametrize("given", ["dense", "lengths"])
@pytest.mark.parametrize("how", ["automatic", "mark_dynamic"])
def test_recompiles(how: str, given: str) -> None:
    """Other sizes cost one recompile, which makes them dynamic; none where they are so marked."""
    torch._dynamo.reset()
    model = Tagger(bidirectional=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter)
    for T, B in SIZES:
        words, lengths = batch(T, B)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(words, (0, 1))
            torch._dynamo.mark_dynamic(lengths, 0)
        compiled(words, lengths if given == "lengths" else None).backward()
    assert counter.frame_count == (2 if how == "automatic" else 1)


def test_packed_sequences_break_the_graph_but_work() -> None:
    torch._dynamo.reset()
    lstm = FusedLSTM(3, 4, bidirectional=True, dtype=torch.float64)

    def f(x: Tensor, lengths: Tensor) -> Tensor:
        packed, _ = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
        result: Tensor = packed.data.sin()
        return result

    x, lengths = torch.randn(7, 3, 3, dtype=torch.float64), torch.tensor([7, 2, 5])
    close(torch.compile(f, backend="aot_eager")(x, lengths), f(x, lengths))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
def test_an_exported_program_in_a_file(strict: bool, tmp_path: Path) -> None:
    model = Tagger(bidirectional=True, proj_size=3, dropout=0.4).eval()
    B = torch.export.Dim("B")
    shapes = {"words": {0: B, 1: torch.export.Dim("T")}, "lengths": {0: B}}
    exported = torch.export.export(model, batch(*SIZES[0]), dynamic_shapes=shapes, strict=strict)
    layers = [n for n in exported.graph.nodes if "layer_forward" in str(n.target)]
    names = [a.name for a in torch.ops.lstm_cuda.layer_forward.default._schema.arguments]
    assert len(layers) == 2, "a layer is not a node of the outermost graph"
    # Parameters that want gradients must not make a program for inference keep the gates.
    assert not any(layer.args[names.index("save")] for layer in layers)
    torch.export.save(exported, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for T, B in SIZES:
        words, lengths = batch(T, B)
        assert_equal(loaded(words, lengths), model(words, lengths))


class Mixed(nn.Module):
    """Layers with and without biases and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FusedLSTM(3, 6, bidirectional=True, batch_first=True)
        self.second = FusedLSTM(12, 5, bias=False, proj_size=4, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor]:
        output, state = self.second(self.first(x)[0].relu(), (h0, c0), lengths=lengths)
        return output, state[1]


RUN_PACKAGE = """
import sys, torch, lstm_cuda
package, data = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save([model(*inputs) for inputs in torch.load(data)], data)
"""


def test_aot_inductor_in_another_process(tmp_path: Path) -> None:
    model = Mixed().eval()
    B = torch.export.Dim("B")
    shapes = ({0: B, 1: torch.export.Dim("T")}, {0: B}, {1: B}, {1: B})
    inputs = []
    for T, rows in SIZES[:2]:
        _, lengths = batch(T, rows)
        state = torch.randn(1, rows, 4), torch.randn(1, rows, 5)
        inputs.append((torch.randn(rows, T, 3), lengths, *state))
    exported = torch.export.export(model, inputs[0], dynamic_shapes=shapes)
    package, data = str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")
    torch._inductor.aoti_compile_and_package(exported, package_path=package)
    torch.save(inputs, data)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # for a package built in place
    result = subprocess.run(
        [sys.executable, "-c", RUN_PACKAGE, package, data],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for found, given in zip(torch.load(data), inputs, strict=True):
        for a, b in zip(found, model(*given), strict=True):
            assert error(a, b) < 1e-6
