"""Export to ONNX: a fused layer becomes the standard's ``LSTM`` node.

Needs ``pip install onnx onnxscript`` (the extra ``onnx``), loaded when something is exported.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import ops
from .reference import ACTIVATIONS

_Table = dict[Callable[..., Any], Callable[..., Any]]
_GATES = (0, 3, 1, 2)  # where ONNX's i, o, f, c are among i, f, g, o
# ONNX's names for ours, with alpha and beta where they take those.
_ACTIVATIONS: dict[str, tuple[str, tuple[float, ...]]] = {
    "tanh": ("Tanh", ()),
    "sigmoid": ("Sigmoid", ()),
    "relu": ("Relu", ()),
    "hard_sigmoid_keras": ("HardSigmoid", (1 / 6, 0.5)),
    "hard_sigmoid_onnx": ("HardSigmoid", (0.2, 0.5)),
    "softsign": ("Softsign", ()),
    "identity": ("Affine", (1.0, 0.0)),
}


def translations() -> _Table:
    """What ``torch.onnx.export`` needs to know of the fused op.

    ::

        torch.onnx.export(model, args, path, custom_translation_table=translations())

    Weights are put into ONNX's order by nodes of the graph, which runtimes fold when they load it;
    ``export`` folds them into the file.

    Returns:
        A new table, for ``custom_translation_table``.

    Raises:
        RuntimeError: the compiled part of lstm_cuda is missing, and the op with it.
    """
    ops.require("cpu")
    return {
        torch.ops.lstm_cuda.layer_forward.default: _layer_forward,
        torch.ops.lstm_cuda.variant_forward.default: _variant_forward,
    }


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    external_data: bool = True,
    custom_translation_table: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
) -> torch.onnx.ONNXProgram:
    """``torch.onnx.export`` for a model with fused LSTMs in it.

    Each layer becomes one ``LSTM`` node, its weights initializers in ONNX's order.

    Args:
        model: in ``eval()``; or a program that ``torch.export.export`` made of it.
        path: the file to write, or None.
        external_data: put the weights in a file of their own beside it.
        custom_translation_table: for further ops of the model.
        args, kwargs, dynamic_shapes, input_names, output_names, opset_version:
            as for ``torch.onnx.export``.

    Returns:
        The ``torch.onnx.ONNXProgram``.

    Raises:
        ImportError: onnx or onnxscript is missing.
        NotImplementedError: a layer uses an option that ONNX's node does not have; the message says
            which, and what to do.
        ValueError: a layer in bfloat16 needs a later ``opset_version``.
    """
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"exporting to ONNX needs {name} ({error}); pip install onnx onnxscript"
            ) from error
    try:
        program = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            opset_version=opset_version,
            dynamo=True,
            verbose=False,
            custom_translation_table={**translations(), **(custom_translation_table or {})},
        )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, _Inexpressible):
            cause = cause.__cause__
        raise cause or error from None
    assert program is not None  # torch's type is that of both its exporters
    layers = [node for node in program.model.graph if node.op_type == "LSTM"]
    opset = program.model.opset_imports[""]
    inputs = [node.inputs[0] for node in layers]
    if opset < 22 and any(x is not None and str(x.dtype) == "BFLOAT16" for x in inputs):
        raise ValueError(
            "opset_version must be at least 22 for a layer in bfloat16, which ONNX's LSTM node has "
            f"not had before; got {opset}"
        )
    _fold_weights(program.model, layers)
    if path is not None:
        program.save(path, external_data=external_data)
    return program


class _Inexpressible(NotImplementedError):
    def __init__(self, option: str) -> None:
        super().__init__(
            f'ONNX\'s LSTM node has no {option}. A module made with backend="torch" exports as '
            "plain operations, for the one number of time steps that it is exported with."
        )


def _layer_forward(
    x: Any,
    w_ih: Sequence[Any],
    w_hh: Sequence[Any],
    bias: Sequence[Any] | None,
    w_hr: Sequence[Any] | None,
    h0: Any,
    c0: Any,
    lengths: Any,
    reset: Any,
    reversed: int,
    save: bool,
    cells: bool,
    allow_tf32: bool,
    packed: Any = None,
    packed_layout: int = 0,
    before: int = 0,
    after: int = 0,
) -> tuple[Any, ...]:
    """``ops.layer_forward`` in ONNX; every input a value of the graph under construction."""
    return _node(x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, reversed, cells)


def _variant_forward(
    x: Any,
    w_ih: Sequence[Any] | None,
    w_hh: Sequence[Any],
    bias: Sequence[Any] | None,
    w_hr: Sequence[Any] | None,
    h0: Any,
    c0: Any,
    lengths: Any,
    reset: Any,
    reversed: int,
    save: bool,
    cells: bool,
    allow_tf32: bool,
    forget: int,
    recurrent_activation: int,
    activation: int,
    output_activation: int,
    cell_clip: float,
    zoneout_h: float,
    zoneout_c: float,
    peephole: Any,
    norm: Any,
    h_scale: Any,
    seed: Any,
    first_step: int,
) -> tuple[Any, ...]:
    """``variant_ops.variant_forward``, in evaluation, in ONNX."""
    op: Any = importlib.import_module("onnxscript").opset18
    known = list(ACTIVATIONS)
    names = [known[k] for k in (recurrent_activation, activation, output_activation)]
    for option, used in {
        "normalisation (layer_norm)": norm is not None,
        "cell without a forget gate (forget_gate)": forget == 1,
        "bound of the cell state (cell_clip; its own bounds the pre-activations)": cell_clip > 0,
        "mean of two states (zoneout)": zoneout_h > 0 or zoneout_c > 0,
        "random choices (recurrent_dropout in training)": h_scale is not None or seed is not None,
        **{f"{name} (activation)": name not in _ACTIVATIONS for name in names},
    }.items():
        if used:
            raise _Inexpressible(option)
    assert w_ih is not None  # but for norm
    D, H = len(w_hh), w_hh[0].shape[0] // 4
    functions, parameters = zip(*(_ACTIVATIONS[name] for name in names), strict=True)
    attributes = {"activations": D * functions, "input_forget": int(forget == 2)}
    if any(parameters):
        alpha, beta = zip(*filter(None, parameters), strict=True)
        attributes |= {"activation_alpha": D * alpha, "activation_beta": D * beta}
    if peephole is not None:  # w_ci, w_cf, w_co: there i, o, f
        peephole = op.Gather(op.CastLike(peephole, x), _ints(op, 0, 2, 1), axis=1)
        peephole = op.Reshape(peephole, _ints(op, D, 3 * H))
    results = _node(
        x, w_ih, w_hh, bias, w_hr, h0, c0, lengths, reset, reversed, cells, peephole, **attributes
    )
    return *results, _ints(op, 0), _ints(op, 0)


def _node(
    x: Any,
    w_ih: Sequence[Any],
    w_hh: Sequence[Any],
    bias: Sequence[Any] | None,
    w_hr: Sequence[Any] | None,
    h0: Any,
    c0: Any,
    lengths: Any,
    reset: Any,
    reversed: int,
    cells: bool,
    peephole: Any = None,
    **attributes: Any,
) -> tuple[Any, ...]:
    """A layer as one node, and what surrounds it; ``peephole`` and ``attributes`` are ONNX's."""
    op: Any = importlib.import_module("onnxscript").opset18  # what torch's exporter builds on

    D, H = len(w_hh), w_hh[0].shape[0] // 4
    for option, used in {
        "recurrences side by side (heads, vmap)": D > 2 or (D == 2 and reversed != 2),
        "projection (proj_size)": w_hr,
        "resets inside a sequence (reset)": reset,
        "cell states of all steps (return_cells)": cells,
    }.items():
        if used:
            raise _Inexpressible(option)
    # Those of the input and of h, direction by direction.
    biases = [b for d in range(D) for b in bias[d::D]] if bias else None
    y, h_n, c_n = op.LSTM(
        x,
        _weights(op, w_ih, D, H),
        _weights(op, w_hh, D, H),
        None if biases is None else _weights(op, biases, D, H),
        None if lengths is None else op.Cast(lengths, to=6),  # TensorProto.INT32
        h0,
        c0,
        peephole,
        direction="bidirectional" if D == 2 else ("reverse" if reversed else "forward"),
        hidden_size=H,
        **attributes,
    )
    if lengths is not None and h0 is not None:
        # onnxruntime's final state of a row without steps is zero; it is the initial one.
        empty = op.Unsqueeze(op.Equal(lengths, _ints(op, 0)), _ints(op, 0, 2))
        h_n, c_n = op.Where(empty, h0, h_n), op.Where(empty, c0, c_n)
    # [T, D, B, H] -> [T, B, D*H]; a 0 keeps the size.
    y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), _ints(op, 0, 0, D * H))
    return y, h_n, c_n, _ints(op, 0), _ints(op, 0)  # what backward would read


def _weights(op: Any, parts: Sequence[Any], D: int, H: int) -> Any:
    """Tensors [4H, ...] of D directions as one [D, ...], their gates in ONNX's order."""
    rows = [
        (4 * k + gate) * H + row for k in range(len(parts)) for gate in _GATES for row in range(H)
    ]
    joined = op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]
    ordered = op.Gather(joined, _ints(op, *rows), axis=0)
    return op.Reshape(ordered, _ints(op, D, len(rows) // D, *parts[0].shape[1:]))


def _ints(op: Any, *values: int) -> Any:
    return op.Constant(value_ints=values)


def _fold_weights(model: Any, layers: Sequence[Any]) -> None:
    """Put the weights of all LSTM nodes in order now; the exporter folds only small tensors."""
    optimizer: Any = importlib.import_module("onnxscript.optimizer")
    found = set()
    above = [value.producer() for node in layers for value in node.inputs[1:4] if value is not None]
    while above:
        producer = above.pop()
        if producer is not None and producer.op_type in ("Reshape", "Gather", "Concat"):
            found.add(producer)
            above += [value.producer() for value in producer.inputs]
    optimizer.optimize_ir(model, should_fold=lambda node: node in found)
