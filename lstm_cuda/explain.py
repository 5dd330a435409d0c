"""Which path each layer of a FusedLSTM takes for an input, and why, in words."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .functional import autocast_dtype
from .heads import check_recurrences
from .layer import tf32_allowed
from .module import FusedLSTM


def explain(
    module: FusedLSTM, x: Tensor | PackedSequence, device: ops.CudaDevice | None = None
) -> str:
    """Tell which path the module would take for an input, layer by layer; nothing is run.

    Args:
        module: the FusedLSTM asked about, in the mode (training or not) asked about.
        x: an input for it, as for ``FusedLSTM.forward``.
        device: a CUDA device to ask about, in this machine or not; None for x's device.

    Returns:
        One line on the choice, then one a layer, each with what the kernels' plan says under it.
    """
    if not isinstance(module, FusedLSTM):
        raise TypeError(f"module must be a FusedLSTM; got {type(module).__name__}")
    data = x.data if isinstance(x, PackedSequence) else x
    kind = data.device.type if device is None else "cuda"
    options = module._extras()
    if module.backend == "torch":
        return 'reference: backend="torch" asks for it (plain torch, one step at a time)'
    named = ", ".join(options)
    D = 2 if module.bidirectional else 1
    try:
        ops.require(kind if device is None else "cpu")
        check_recurrences(module.heads, D)
    except (RuntimeError, ValueError) as error:
        return f"error: {error}"

    if isinstance(x, PackedSequence):
        T, B = x.batch_sizes.numel(), int(x.batch_sizes[0])
    elif x.dim() == 2:
        T, B = x.shape[0], 1
    else:
        T, B = (x.shape[1], x.shape[0]) if module.batch_first else (x.shape[0], x.shape[1])
    H = module.hidden_size
    P = module.proj_size or H
    n = module.heads
    dtype = autocast_dtype(kind) or data.dtype
    training = torch.is_grad_enabled() and (
        data.requires_grad or any(p.requires_grad for p in module.parameters())
    )
    what = "saves for backward" if training else "inference, saves nothing"
    steps = module.checkpoint or module.truncate
    if training and steps is not None:  # each direction alone, in segments
        if module.checkpoint is not None:
            what = "saves one state for each segment for backward, which runs forward again"
        what += f"; segments of {steps} steps, each direction by itself"
        if module.truncate is not None:
            what += f"; gradients end every {module.truncate} steps"
    if options:
        what += f"; a cell with {named}"
    lines = [f"fused op on {kind}, {str(dtype).removeprefix('torch.')}, T={T} B={B}: {what}"]
    for layer in range(module.num_layers):
        features = module.input_size if layer == 0 else D * P
        line = f"layer {layer}: {D} x LSTM {features} -> {H}" + (f" -> {P}" if P != H else "")
        line += f", {n} heads of {H // n}" if n > 1 else ""
        for backward in (False, True)[: 1 + training] if kind in ("cpu", "cuda") else ():
            sizes = (T, B, D * n, features, H // n, P // n, dtype, backward)
            if training and steps is not None:
                sizes = (min(T, steps), B, 1, features, H // n, P // n, dtype, backward)
            if kind == "cpu":
                plan = ops.plan_cpu(*sizes)
            else:
                asked = device or ops.CudaDevice.of(data.device)
                plan = ops.plan_cuda(*sizes, tf32_allowed(kind, dtype), asked, *_of_cell(module))
            line += f"\n  {'backward' if backward else 'forward'}: "
            line += _in_words(plan)
        lines.append(line)
    return "\n".join(lines)


def _of_cell(module: FusedLSTM) -> tuple[str, bool]:
    """The kind of cell as ops.plan_cuda wants it, and whether h may be large."""
    options = module._extras()
    if not options:
        return "plain", False
    cell = module.cell
    dropped = module.training and cell.recurrent_dropout > 0
    of_h = {cell.output_activation or cell.activation, cell.recurrent_activation}
    large = dropped or bool(of_h & {"relu", "identity"})
    return "norm" if "layer_norm" in options else "options", large


def _in_words(plan: dict[str, object]) -> str:
    """A plan of ops.plan_cpu or ops.plan_cuda."""
    if "kernel" not in plan:
        return ", ".join(f"{key}={value}" for key, value in plan.items())
    kernel, because = plan["kernel"], plan["because"]
    if not plan["possible"]:
        return f"error: {kernel} cannot run it: {because}"
    how = f"{kernel}, {plan['arithmetic']} products, "
    if kernel == "rec_step":
        how += "overlapping launches" if plan["launches_overlap"] else "launches"
        return how + f" for each step, {plan['tile']} tiles: {because}"
    how += f"one launch for all steps, H padded to {plan['padded_hidden']}"
    if kernel != "rec_cta":
        team = "group" if "groups" in plan else "cluster"
        how += f", {plan['columns']} batch rows to a {team} of {plan['blocks']} blocks"
        if plan["turns"] != 1:
            how += f" in {plan['turns']} turns"
    if "groups" in plan:
        how += f", {plan['groups']} groups at once"
    if "folds_projection" in plan:
        how += ", the projection folded into the weights"
    return f"{how}: {because}"
