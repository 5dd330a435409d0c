"""Exports to ONNX, run by onnxruntime."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BOUNDS, error
from torch import Tensor, nn

from lstm_cuda import FusedLSTM
from lstm_cuda import onnx as lstm_onnx

onnx = pytest.importorskip("onnx", reason='needs onnx: pip install "lstm_cuda[onnx]"')
pytest.importorskip("onnxscript", reason='needs onnxscript: pip install "lstm_cuda[onnx]"')
ort = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install onnxruntime")

SIZES = [(5, 4), (9, 2), (1, 1)]  # T, B; exported with the first

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "L1": ({}, ""),
    "L1-hx": ({}, "hx"),
    "reverse-nobias-lengths": ({"reverse": True, "bias": False}, "lengths"),
    "L2-bidirectional": ({"num_layers": 2, "bidirectional": True}, ""),
    "L2-bidirectional-batch_first-hx-lengths": (
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        "hx lengths",
    ),
    "peephole-coupled-bidirectional-lengths": (
        {"peephole": True, "coupled": True, "bidirectional": True},
        "lengths",
    ),
    "activations-bidirectional": (
        {
            "recurrent_activation": "hard_sigmoid_onnx",
            "activation": "softsign",
            "output_activation": "identity",
            "bidirectional": True,
        },
        "",
    ),
    "dropouts": ({"recurrent_dropout": 0.3, "weight_dropout": 0.2, "activation": "relu"}, "hx"),
}


def arguments(
    lstm: FusedLSTM, T: int, B: int, given: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keywords of a call; what stands past the end of a row is not a number."""
    dtype = lstm.weight_hh_l0.dtype
    x = torch.randn(T, B, 3, dtype=dtype)
    lengths = torch.tensor([T, 0, 2, 1][:B])
    if "lengths" in given:
        x[torch.arange(T)[:, None] >= lengths] = float("nan")
    LD = lstm.num_layers * (2 if lstm.bidirectional else 1)
    hx = (torch.randn(LD, B, 4, dtype=dtype), torch.randn(LD, B, 4, dtype=dtype))
    args = (x.transpose(0, 1).contiguous() if lstm.batch_first else x,)
    return (
        (*args, hx) if "hx" in given else args,
        {"lengths": lengths} if "lengths" in given else {},
    )


def dynamic(lstm: FusedLSTM, given: str) -> dict[str, Any]:
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    shapes: dict[str, Any] = {"input": {0: B, 1: T} if lstm.batch_first else {0: T, 1: B}}
    if "hx" in given:
        shapes["hx"] = ({1: B}, {1: B})
    if "lengths" in given:
        shapes["lengths"] = {0: B}
    return shapes


def run(model: Any, *inputs: Any) -> list[Tensor]:
    """What onnxruntime makes of a model (bytes, or the path of a file)."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    flat = [t for t in torch.utils._pytree.tree_leaves(inputs) if t is not None]
    named = {i.name: t.numpy() for i, t in zip(session.get_inputs(), flat, strict=True)}
    return [torch.from_numpy(out) for out in session.run(None, named)]


@pytest.mark.parametrize("case", CASES)
def test_equals_eager_for_all_sizes_pt126339(case: str) -> None:
    options, given = CASES[case]
    lstm = FusedLSTM(3, 4, **options).eval()
    args, kwargs = arguments(lstm, *SIZES[0], given)
    program = lstm_onnx.export(lstm, args, kwargs=kwargs, dynamic_shapes=dynamic(lstm, given))
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert [n.op_type for n in program.model.graph].count("LSTM") == lstm.num_layers
    for T, B in SIZES:
        args, kwargs = arguments(lstm, T, B, given)
        found = run(program.model_proto.SerializeToString(), args, kwargs)
        y, (h_n, c_n) = lstm(*args, **kwargs)
        for a, b in zip(found, (y, h_n, c_n), strict=True):
            assert error(a, b) < BOUNDS[torch.float32][0]


def test_float16() -> None:
    lstm = FusedLSTM(3, 4, dtype=torch.float16).eval()
    args, kwargs = arguments(lstm, 5, 4, "hx lengths")
    program = lstm_onnx.export(lstm, args, kwargs=kwargs)
    y, (h_n, c_n) = lstm(*args, **kwargs)
    found = run(program.model_proto.SerializeToString(), args, kwargs)
    for a, b in zip(found, (y, h_n, c_n), strict=True):
        assert a.dtype == torch.float16 and error(a, b) < BOUNDS[torch.float16][0]


def test_bfloat16_needs_a_later_opset() -> None:
    """onnxruntime cannot run it on a CPU; the checker knows the standard."""
    lstm = FusedLSTM(3, 4, dtype=torch.bfloat16).eval()
    args, _ = arguments(lstm, 5, 4, "")
    with pytest.raises(ValueError, match=r"opset_version .* least 22 .* got"):
        lstm_onnx.export(lstm, args)
    program = lstm_onnx.export(lstm, args, opset_version=22)
    onnx.checker.check_model(program.model_proto, full_check=True)


class Tagger(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lstm = FusedLSTM(8, hidden_size, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden_size, 5)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.lstm(self.embedding(words), lengths=lengths)
        scores: Tensor = self.head(output)
        return scores


@pytest.mark.parametrize("how", ["export", "torch.onnx.export", "exported program"])
def test_a_model_in_a_file(how: str, tmp_path: Path) -> None:
    model, path = Tagger(48).eval(), tmp_path / "tagger.onnx"
    words, lengths = torch.randint(11, (3, 7)), torch.tensor([7, 2, 0])
    B = torch.export.Dim("B")
    shapes = {"words": {0: B, 1: torch.export.Dim("T")}, "lengths": {0: B}}
    if how == "export":
        lstm_onnx.export(model, (words, lengths), path, dynamic_shapes=shapes)
    elif how == "exported program":
        program = torch.export.export(model, (words, lengths), dynamic_shapes=shapes)
        lstm_onnx.export(program, path=path, external_data=False)
        assert [file.name for file in tmp_path.iterdir()] == ["tagger.onnx"]
    else:
        torch.onnx.export(
            model, (words, lengths), path, dynamic_shapes=shapes, verbose=False, dynamo=True,
            custom_translation_table=lstm_onnx.translations(),
        )  # fmt: skip
    graph = onnx.load(path).graph
    (lstm,) = [node for node in graph.node if node.op_type == "LSTM"]
    # Converters and quantizers want weights as they are, not computed; 8 * 4 * 48 * 48 are many.
    ready = set(lstm.input[1:4]) <= {tensor.name for tensor in graph.initializer}
    assert ready == (how != "torch.onnx.export")
    for B, T in (3, 7), (2, 30):
        words, lengths = torch.randint(11, (B, T)), torch.tensor([T, T // 3, 0][:B])
        (found,) = run(path, words, lengths)
        assert error(found, model(words, lengths)) < BOUNDS[torch.float32][0]


def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(lstm_onnx.__file__).parent.parent / "README.md").read_text()
    example = re.search(r"^## Compile, export, ONNX\n```python\n(.+?)^```", readme, re.M | re.S)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example[1], names)
    x, lengths = torch.randn(2, 30, 32), torch.tensor([0, 30])
    expected = names["lstm"](x, lengths=lengths)[0]
    assert error(run("lstm.onnx", x, lengths)[0], expected) < BOUNDS[torch.float32][0]


INEXPRESSIBLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "proj_size": ({"proj_size": 3}, {}),
    "reset": ({}, {"reset": torch.tensor([[False, True], [True, False], [False, False]])}),
    "return_cells": ({}, {"return_cells": True}),
    "layer_norm": ({"layer_norm": True}, {}),
    "forget_gate": ({"forget_gate": False}, {}),
    "cell_clip": ({"cell_clip": 0.3}, {}),
    "zoneout": ({"zoneout": 0.1}, {}),
    "activation": ({"activation": "hard_tanh"}, {}),
}


@pytest.mark.parametrize("option", INEXPRESSIBLE)
def test_what_the_node_does_not_have_is_named(option: str) -> None:
    """And what the message advises works."""
    options, kwargs = INEXPRESSIBLE[option]
    lstm = FusedLSTM(3, 4, **options).eval()
    x = torch.randn(3, 2, 3)
    with pytest.raises(NotImplementedError, match=rf'{option}.*backend="torch" exports'):
        lstm_onnx.export(lstm, (x,), kwargs=kwargs)
    lstm.backend = "torch"
    program = lstm_onnx.export(lstm, (x,), kwargs=kwargs)
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    found = run(program.model_proto.SerializeToString(), x, tensors)
    y, state, *cells = lstm(x, **kwargs)
    for a, b in zip(found, (y, *state, *cells), strict=True):
        assert error(a, b) < BOUNDS[torch.float32][0]


def test_other_failures_of_the_exporter_stay() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x).abs()

    with pytest.raises(torch.onnx.errors.OnnxExporterError):
        lstm_onnx.export(Unknown(), (torch.randn(3, 3),))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package} .*pip install onnx onnxscript"):
        lstm_onnx.export(nn.Identity(), (torch.randn(2),))
