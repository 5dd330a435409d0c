"""Is it right? Outputs and gradients against nn.LSTM in float64."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cases import Case
from .variants import Forward, gradient_penalty

BOUNDS = {
    # Largest relative error, and what is granted beyond twice nn.LSTM's own error in the dtype.
    # float32: 10 times the worst seen of eager torch, for another order of sums. 16 bits: some
    # units in the last place of the stored states and gradients.
    torch.float64: (1e-12, 1e-13),
    torch.float32: (5e-6, 1e-6),
    torch.float16: (4e-3, 1e-3),
    torch.bfloat16: (3e-2, 8e-3),
}


@dataclass(frozen=True)
class Check:
    """Errors relative to the float64 truth, by tensor.

    Attributes:
        failures: one sentence for each tensor that is wrong; empty if all are right.
        worst_error: the largest of our relative errors.
        worst_torch_error: the largest of nn.LSTM's.
    """

    failures: list[str]
    worst_error: float
    worst_torch_error: float


def check(case: Case, bounds: tuple[float, float] | None = None) -> Check:
    """Compares what inference gives, and outputs and every gradient of one step of training.

    Args:
        case: what to run.
        bounds: in place of the dtype's of BOUNDS.
    """
    largest, granted = bounds or BOUNDS[case.inputs[0].dtype]
    truth = _tensors(case, copy.deepcopy(case.torch_lstm).double(), case.variant.torch_way)
    torch_tensors = _tensors(case, case.torch_lstm, case.variant.torch_way)
    fused_tensors = _tensors(case, case.fused_lstm, case.variant.fused_way)
    failures, errors, torch_errors = [], [], []
    for name, expected in truth.items():
        error = relative_error(fused_tensors[name], expected)
        torch_error = relative_error(torch_tensors[name], expected)
        bound = min(largest, 2 * torch_error + granted)
        if not error <= bound:  # NaN is wrong too
            failures.append(f"{name}: relative error {error:.1e}, allowed {bound:.1e}")
        errors.append(error)
        torch_errors.append(torch_error)
    return Check(failures, max(errors), max(torch_errors))


def relative_error(tensor: Tensor, expected: Tensor) -> float:
    """norm(tensor - expected) / norm(expected), in float64; absolute where all is zero."""
    norm = expected.norm().item()
    return (tensor.double() - expected).norm().item() / (norm or 1.0)


def _tensors(case: Case, lstm: nn.Module, forward: Forward) -> dict[str, Tensor]:
    """Outputs of inference; outputs and gradients of a loss that sees y, h_n and c_n.

    Options of the cell are evaluated, for masks are drawn in another order by each.
    """
    lstm.train(not case.workload.options)
    dtype = next(lstm.parameters()).dtype
    x = case.inputs[0].detach().to(dtype).requires_grad_()
    dy = case.gradients[0].to(dtype)
    with torch.inference_mode():
        y, (h_n, c_n) = forward(lstm, x.detach(), case.boundaries)
    result = {"inference y": y, "inference h_n": h_n, "inference c_n": c_n}
    lstm.zero_grad(set_to_none=True)
    y, (h_n, c_n) = forward(lstm, x, case.boundaries)
    if case.workload.last_step_only:
        torch.autograd.backward([y[-1]], [dy[-1]])
    else:
        dh = dy[-1, :, : h_n.shape[-1]].expand_as(h_n)
        # With a projection, c is wider than h.
        columns = torch.arange(c_n.shape[-1], device=dh.device) % dh.shape[-1]
        torch.autograd.backward([y, h_n, c_n], [dy, dh, -dh[..., columns]])
    result |= {"y": y.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()}
    for name, tensor in [("x", x), *lstm.named_parameters()]:
        assert tensor.grad is not None, f"no gradient reached {name}"
        result[f"d{name}"] = tensor.grad
    if case.workload.gradient_penalty:
        y, _ = forward(lstm, x, case.boundaries)
        names, tensors = zip(*lstm.named_parameters(), strict=True)
        found = torch.autograd.grad(gradient_penalty(x, y), tensors)
        result |= {f"penalty d{name}": grad for name, grad in zip(names, found, strict=True)}
    return result
