"""Derivatives under torch.func.vmap: of each member by itself, and of all members together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import close
from test_vmap import (
    FEATURES,
    B,
    H,
    Parameters,
    T,
    V,
    agree,
    call,
    draw,
    in_a_loop,
    loss,
    module,
    own_inputs_and_weights,
    per_member,
    reference_of,
)
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from lstm_cuda import FusedLSTM

pytestmark = pytest.mark.usefixtures("no_vmap_fallback")


def test_gradients_by_an_input_that_all_share(device: str) -> None:
    members = [module(device, bidirectional=True) for _ in range(V)]
    weights = {k: w.detach() for k, w in stack_module_state(members)[0].items()}
    reference = reference_of(members[0], bidirectional=True)
    x = draw(T, B, FEATURES).to(device)

    def by_x(m: FusedLSTM) -> Callable[[Parameters], Tensor]:
        return lambda p: grad(by_input(m, p, {}))(x)

    agree(vmap(by_x(members[0]))(weights), in_a_loop(by_x(reference), (0,), weights))


def by_input(m: FusedLSTM, p: Parameters, given: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: loss(m)(p, {**given, "x": x})


DERIVATIVES: dict[str, Callable[[FusedLSTM], Callable[..., Any]]] = {
    "grad": lambda m: grad(loss(m), (0,)),
    "grad-of-input": lambda m: lambda p, g: grad(by_input(m, p, g))(g["x"]),
    "jacrev": lambda m: lambda p, g: jacrev(lambda x: call(m, p, {**g, "x": x})[1])(g["x"]),
    "jvp": lambda m: lambda p, g: jvp(by_input(m, p, g), (g["x"],), (g["x"] + 1,)),
    "hessian": lambda m: (
        lambda p, g: hessian(
            lambda x: loss(m)(p, {"x": x, **{k: t for k, t in g.items() if k != "x"}})
        )(g["x"])
    ),
    "grad-of-grad": lambda m: (
        lambda p, g: grad(lambda p: grad(by_input(m, p, g))(g["x"]).pow(2).sum())(p)
    ),
}


@pytest.mark.parametrize("transform", DERIVATIVES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared-weights", "own-weights"])
def test_derivatives_of_members(shared: bool, transform: str, device: str) -> None:
    fused, reference, weights, given = own_inputs_and_weights(device)
    if shared:
        weights = {k: w[0] for k, w in weights.items()}
    if transform == "hessian":
        given = {k: t[:, :2, :1] if k == "x" else t for k, t in given.items() if k == "x"}
    dims = (None if shared else 0, {k: per_member(device)[k] for k in given})
    weights = {k: w.detach() for k, w in weights.items()}
    derive = DERIVATIVES[transform]
    found = vmap(derive(fused), dims)(weights, given)
    agree(found, in_a_loop(derive(reference), dims, weights, given), 1e-11)


@pytest.mark.parametrize("shared", [True, False], ids=["shared-weights", "own-weights"])
def test_derivatives_of_all_members_together(shared: bool, device: str) -> None:
    fused, reference, weights, given = own_inputs_and_weights(device)
    if shared:
        weights = {k: w[0] for k, w in weights.items()}
    leaves = [w.detach().requires_grad_() for w in weights.values()] + [
        given[k].requires_grad_() for k in ("x", "h0", "c0")
    ]
    weights = dict(zip(weights, leaves, strict=False))
    dims = (None if shared else 0, per_member(device))

    def twice(m: FusedLSTM) -> list[tuple[Tensor, ...]]:
        total = vmap(loss(m), dims)(weights, given).pow(2).sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return [first, torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)]  # type: ignore[arg-type]

    agree(twice(fused), twice(reference), 1e-11)
    close(
        grad(lambda p: vmap(loss(fused), dims)(p, given).sum())(weights)["weight_hh_l0"],
        grad(lambda p: vmap(loss(reference), dims)(p, given).sum())(weights)["weight_hh_l0"],
    )


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(results):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return results


def test_opacus_783_per_sample_gradients_are_sums_not_lists_of_outer_products(device: str) -> None:
    """At most the gradients themselves, or the gates: V*4H*H or T*V*4H, not their product."""
    steps, hidden, samples = 40, 12, 8
    fused = FusedLSTM(hidden, hidden, dtype=torch.float64, device=device)
    weights = {k: p.detach() for k, p in fused.named_parameters()}
    x = draw(samples, steps, 1, hidden).to(device)
    with LargestTensor() as seen:
        vmap(grad(loss(fused)), (None, 0))(weights, {"x": x})
    assert seen.elements <= 4 * hidden * max(samples * hidden, samples * steps)


def test_opacus_53_pt134606_clipped_per_sample_gradients(device: str) -> None:
    """A step of differentially private training: each sample's gradient clipped, then the mean."""
    fused = module(device, num_layers=2, bidirectional=True, batch_first=True)
    weights = {k: p.detach() for k, p in fused.named_parameters()}
    samples, lengths = (
        draw(6, T, FEATURES).to(device),
        torch.tensor([5, 1, 3, 5, 2, 4], device=device),
    )
    target = draw(6, T, 2 * H, seed=5).to(device)

    def sample_loss(p: Parameters, x: Tensor, n: Tensor, y: Tensor) -> Tensor:
        output, _ = functional_call(fused, p, (x[None],), {"lengths": n[None]})
        return (output[0] - y).pow(2).mean()

    def clipped(grads: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
        norms = sum(g.flatten(1).pow(2).sum(1) for g in grads.values())
        factor = (0.05 / torch.as_tensor(norms).sqrt()).clamp(max=1)
        assert (factor < 1).sum() > 0
        return {k: torch.einsum("v,v...->...", factor, g) / samples for k, g in grads.items()}

    per_sample = vmap(grad(sample_loss), (None, 0, 0, 0))(weights, samples, lengths, target)
    loop: dict[str, list[Tensor]] = {k: [] for k in weights}
    for k in range(6):
        n = int(lengths[k])
        output, _ = fused(samples[k : k + 1], lengths=[n])
        mean = (output[0] - target[k]).pow(2).mean()
        for name, g in zip(
            weights, torch.autograd.grad(mean, list(fused.parameters())), strict=True
        ):
            loop[name].append(g)
    agree(clipped(per_sample, 6), clipped({k: torch.stack(g) for k, g in loop.items()}, 6))
