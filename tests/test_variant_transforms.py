"""Options of the cell in what torch does with a function: derivatives, transforms, graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import close
from test_variants import ACTIVATIONS, PAIRS, SINGLE, name, pair
from torch import Tensor, nn
from torch.autograd import forward_ad

from lstm_cuda import FusedLSTM


@pytest.mark.parametrize("options", SINGLE + PAIRS + ACTIVATIONS[1:], ids=name)
def test_first_and_second_derivatives(options: dict[str, Any]) -> None:
    fused = FusedLSTM(2, 3, dtype=torch.float64, **options)

    def call(x: Tensor, *weights: Tensor) -> Any:
        torch.manual_seed(3)
        named = dict(zip(dict(fused.named_parameters()), weights, strict=True))
        y, (h, c) = torch.func.functional_call(fused, named, (x,))
        return y, h, c

    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(p.detach().clone().requires_grad_() for p in fused.parameters()))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("options", [SINGLE[0], SINGLE[5], SINGLE[9]], ids=name)
def test_inputs_that_depend_on_each_other(options: dict[str, Any]) -> None:
    """A gradient with a graph counts no path from one input to another: autograd follows those."""
    fused, _ = pair(3, 4, **options)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    h = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        _, state = fused(x, (h, 2 * h))
        y, _ = fused(x, state)
        return torch.autograd.grad(
            y.sin().sum(), [h, *fused.parameters()], create_graph=create_graph
        )

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [SINGLE[5], PAIRS[2], PAIRS[5]], ids=name)
def test_transforms_take_the_reference(options: dict[str, Any]) -> None:
    fused, reference = pair(3, 4, **options)
    x, change = torch.randn(2, 5, 2, 3, dtype=torch.float64)

    def of(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            torch.manual_seed(2)
            y: Tensor = module(x)[0]
            return y

        return f

    for a, b in zip(
        torch.func.jvp(of(fused), (x,), (change,)),
        torch.func.jvp(of(reference), (x,), (change,)),
        strict=True,
    ):
        close(a, b)
    close(
        torch.func.grad(lambda x: of(fused)(x).sin().sum())(x),
        torch.func.grad(lambda x: of(reference)(x).sin().sum())(x),
    )


@pytest.mark.parametrize("options", [SINGLE[0], SINGLE[9], PAIRS[2]], ids=name)
def test_forward_mode_by_one_parameter(options: dict[str, Any]) -> None:
    """Whichever it is, and though no other input has a tangent."""
    fused, reference = (m.requires_grad_(False) for m in pair(3, 4, **options))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for key, w in fused.named_parameters():
        tangents = []
        for module in (fused, reference):
            with forward_ad.dual_level():
                dual = {key: forward_ad.make_dual(w.detach(), torch.ones_like(w))}
                y = torch.func.functional_call(module, dual, (x,))[0]
                tangents.append(forward_ad.unpack_dual(y).tangent)
        assert tangents[0] is not None, key
        close(tangents[0], tangents[1])


@pytest.mark.parametrize("options", [SINGLE[0], SINGLE[5], SINGLE[9], PAIRS[5]], ids=name)
def test_compiles_without_a_break(device: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    fused = FusedLSTM(3, 4, 2, device=device, **options)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3, device=device, requires_grad=True)
    results = []
    for module in (fused, compiled):
        torch.manual_seed(4)
        y = module(x)[0]
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *fused.parameters()])])
    for a, b in zip(*results, strict=True):
        close(a, b)


@pytest.mark.parametrize("options", [SINGLE[0], SINGLE[5], SINGLE[9], PAIRS[5]], ids=name)
def test_exports_with_dynamic_sizes(device: str, options: dict[str, Any]) -> None:
    fused = FusedLSTM(3, 4, 2, bidirectional=True, device=device, **options).eval()
    sizes = {"input": {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}}
    x = torch.randn(6, 5, 3, device=device)
    exported = torch.export.export(fused, (x,), dynamic_shapes=sizes)
    called = [str(node.target) for node in exported.graph.nodes if "lstm_cuda" in str(node.target)]
    assert len(called) == 2 and all("variant_forward" in target for target in called)
    for T, B in ((6, 5), (11, 9)):
        x = torch.randn(T, B, 3, device=device)
        close(exported.module()(x)[0], fused(x)[0])
