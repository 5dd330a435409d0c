"""torch.func.vmap: one call for all members, whatever differs between them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from lstm_cuda import FusedLSTM, FusedLSTMCell, ops

T, B, FEATURES, H, V = 5, 2, 3, 4, 3
STACKS: dict[str, dict[str, Any]] = {
    "L1": {},
    "L2-bi-proj": {"num_layers": 2, "bidirectional": True, "proj_size": 2},
    "reverse": {"reverse": True, "bias": False},
}
Parameters = dict[str, Tensor]
pytestmark = pytest.mark.usefixtures("no_vmap_fallback")


@pytest.fixture
def calls(device: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each call of the forward op from here on."""
    made: list[tuple[Any, ...]] = []
    run = ops._forward

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(ops, "_forward", counted)
    return made


def draw(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def module(device: str, **options: Any) -> FusedLSTM:
    return FusedLSTM(FEATURES, H, dtype=torch.float64, device=device, **options)


def reference_of(fused: FusedLSTM, **options: Any) -> FusedLSTM:
    return module(str(next(fused.parameters()).device), backend="torch", **options)


def inputs(fused: FusedLSTM, device: str, count: int = V) -> dict[str, Tensor]:
    """All that a call can be given, for each member: in the first dimension."""
    LD = fused.num_layers * (2 if fused.bidirectional else 1)
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, T + 1, (count, B), generator=g)
    lengths[:, 0] = T
    return {
        "x": draw(count, T, B, FEATURES).to(device),
        "h0": draw(count, LD, B, fused.proj_size or H).to(device),
        "c0": draw(count, LD, B, H, seed=7).to(device),
        "lengths": lengths.to(device),
        "reset": (torch.rand(count, T, B, generator=g) < 0.3).to(device),
    }


def call(m: FusedLSTM, parameters: Parameters, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    hx = (given["h0"], given["c0"]) if "h0" in given else None
    more = {name: given[name] for name in ("lengths", "reset") if name in given}
    output, state, cells = functional_call(
        m, parameters, (given["x"], hx), {**more, "return_cells": True}
    )
    return output, *state, cells


def loss(m: FusedLSTM) -> Callable[..., Tensor]:
    """Of parameters and inputs; nowhere linear, every result with a weight of its own."""

    def of(parameters: Parameters, given: dict[str, Tensor]) -> Tensor:
        results = call(m, parameters, given)
        return sum((k + 1) * (r + 0.1 * k).pow(2).sum() for k, r in enumerate(results))  # type: ignore[return-value]

    return of


def in_a_loop(f: Callable[..., Any], dims: tuple[Any, ...], *given: Any) -> Any:
    """What ``vmap(f, dims)`` means, over nested dictionaries of tensors."""
    leaves, spec = torch.utils._pytree.tree_flatten(given)
    flat_dims = torch.utils._pytree._broadcast_to_and_flatten(dims, spec)
    assert flat_dims is not None
    size = next(t.shape[d] for t, d in zip(leaves, flat_dims, strict=True) if d is not None)
    results = []
    for v in range(size):
        member = [
            t if d is None else t.select(d, v) for t, d in zip(leaves, flat_dims, strict=True)
        ]
        results.append(f(*torch.utils._pytree.tree_unflatten(member, spec)))
    return torch.utils._pytree.tree_map(lambda *each: torch.stack(each), *results)


def agree(found: Any, expected: Any, bound: float = 1e-12) -> None:
    a, b = (torch.utils._pytree.tree_leaves(t) for t in (found, expected))
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert other.abs().sum() > 0
        close(one, other, bound)


OWN = {
    "x": ("x",),
    "state": ("h0", "c0"),
    "lengths": ("lengths",),
    "reset": ("reset",),
    "all": ("x", "h0", "c0", "lengths", "reset"),
}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("stack", STACKS)
def test_members_with_the_same_weights_are_rows(
    stack: str, own: str, device: str, calls: list[Any]
) -> None:
    fused = module(device, **STACKS[stack])
    reference = reference_of(fused, **STACKS[stack])
    weights = dict(fused.named_parameters())
    given = {k: t if k in OWN[own] else t[1] for k, t in inputs(fused, device).items()}
    dims = (None, {k: 0 if k in OWN[own] else None for k in given})
    found = vmap(lambda p, g: call(fused, p, g), dims)(weights, given)
    assert len(calls) == fused.num_layers
    agree(found, in_a_loop(lambda p, g: call(reference, p, g), dims, weights, given))


@pytest.mark.parametrize("own", [(), ("x",), ("h0", "c0"), ("x", "h0", "c0")], ids=str)
@pytest.mark.parametrize("stack", STACKS)
def test_members_with_weights_of_their_own_are_recurrences(
    stack: str, own: tuple[str, ...], device: str, calls: list[Any]
) -> None:
    members = [module(device, **STACKS[stack]) for _ in range(V)]
    weights, _ = stack_module_state(members)
    fused, reference = members[0], reference_of(members[0], **STACKS[stack])
    given = {k: t if k in own else t[1] for k, t in inputs(fused, device).items()}
    dims = (0, {k: 0 if k in own else None for k in given})
    found = vmap(lambda p, g: call(fused, p, g), dims)(weights, given)
    assert len(calls) == fused.num_layers
    agree(found, in_a_loop(lambda p, g: call(reference, p, g), dims, weights, given))


@pytest.mark.parametrize("own", ["lengths", "reset"])
def test_weights_and_lengths_or_resets_of_their_own(own: str, device: str) -> None:
    members = [module(device, bidirectional=True) for _ in range(V)]
    weights, _ = stack_module_state(members)
    reference = reference_of(members[0], bidirectional=True)
    given = inputs(members[0], device)
    dims = (0, {k: 0 if k in (own, "x") else None for k in given})
    given = {k: t if k in (own, "x") else t[1] for k, t in given.items()}
    found = vmap(grad(loss(members[0])), dims)(weights, given)
    agree(found, in_a_loop(grad(loss(reference)), dims, weights, given))


@pytest.mark.parametrize("which", ["weight_hh_l0", "bias_ih_l0", "weight_ih_l0"])
def test_one_weight_of_their_own(which: str, device: str) -> None:
    fused = module(device)
    reference = reference_of(fused)
    weights = {k: p.detach() for k, p in fused.named_parameters()}
    weights[which] = torch.stack([weights[which] * k for k in (1, 2, -1)], 1)
    dims = ({k: 1 if k == which else None for k in weights}, None)
    given = {"x": draw(T, B, FEATURES).to(device)}
    found = vmap(grad(loss(fused)), dims)(weights, given)
    agree(found, in_a_loop(grad(loss(reference)), dims, weights, given))


def test_batch_dimensions_anywhere(device: str) -> None:
    fused = module(device, batch_first=True)
    reference = reference_of(fused, batch_first=True)
    reference.load_state_dict(fused.state_dict())
    for dim in range(4):
        x = draw(B, T, FEATURES, V).movedim(3, dim).to(device)
        found = vmap(lambda x: fused(x)[0], dim, dim)(x)
        expected = torch.stack([reference(x.select(dim, v))[0] for v in range(V)], dim)
        close(found, expected)


def test_more_members_than_a_call_takes(device: str, calls: list[Any]) -> None:
    count = ops.max_recurrences() // 2 + 3  # two directions each
    members = [module(device, bidirectional=True) for _ in range(count)]
    weights, _ = stack_module_state(members)
    reference = reference_of(members[0], bidirectional=True)
    x = {"x": draw(count, T, B, FEATURES).to(device)}
    found = vmap(grad(loss(members[0])), (0, 0))(weights, x)
    assert len(calls) == 2
    agree(found, in_a_loop(grad(loss(reference)), (0, 0), weights, x))


def test_an_ensemble_on_each_of_several_batches(device: str, calls: list[Any]) -> None:
    members = [module(device, num_layers=2) for _ in range(V)]
    weights, _ = stack_module_state(members)
    reference = reference_of(members[0], num_layers=2)
    x = {"x": draw(2, T, B, FEATURES).to(device)}
    for dims in [((0, None), (None, 0)), ((None, 0), (0, None))]:
        calls.clear()
        outer, inner = dims
        f, r = (vmap(loss(m), inner) for m in (members[0], reference))
        found = vmap(f, outer)(weights, x)
        assert len(calls) == 2
        close(found, vmap(r, outer)(weights, x))
        agree(
            torch.autograd.grad(found.pow(2).sum(), list(weights.values())),
            torch.autograd.grad(vmap(r, outer)(weights, x).pow(2).sum(), list(weights.values())),
        )


def test_an_ensemble_of_ensembles_on_the_same_inputs(device: str) -> None:
    members = [module(device, bidirectional=True) for _ in range(2 * V)]
    weights = {k: w.unflatten(0, (2, V)) for k, w in stack_module_state(members)[0].items()}
    reference = reference_of(members[0], bidirectional=True)
    x = {"x": draw(V, T, B, FEATURES).to(device)}
    f, r = (vmap(vmap(loss(m), (0, 0)), (0, None)) for m in (members[0], reference))
    close(f(weights, x), r(weights, x))


def own_inputs_and_weights(device: str) -> tuple[FusedLSTM, FusedLSTM, Parameters, Any]:
    members = [module(device, **STACKS["L2-bi-proj"]) for _ in range(V)]
    weights, _ = stack_module_state(members)
    given = inputs(members[0], device)
    given = {k: t[1] if k in ("lengths", "reset") else t for k, t in given.items()}
    return members[0], reference_of(members[0], **STACKS["L2-bi-proj"]), weights, given


def per_member(device: str) -> dict[str, int | None]:
    return {"x": 0, "h0": 0, "c0": 0, "lengths": None, "reset": None}


@pytest.mark.parametrize("shared", [True, False], ids=["shared-weights", "own-weights"])
def test_inference_keeps_nothing(shared: bool, device: str, calls: list[Any]) -> None:
    members = [module(device) for _ in range(V)]
    weights = {k: w.detach() for k, w in stack_module_state(members)[0].items()}
    if shared:
        weights = {k: w[0] for k, w in weights.items()}
    x = draw(V, T, B, FEATURES).to(device)
    vmap(lambda p, x: functional_call(members[0], p, (x,))[0], (None if shared else 0, 0))(
        weights, x
    )
    assert [made[10] for made in calls] == [False]


def test_a_cell(device: str) -> None:
    cells = [FusedLSTMCell(FEATURES, H, dtype=torch.float64, device=device) for _ in range(V)]
    weights, _ = stack_module_state(cells)
    x = draw(V, B, FEATURES).to(device)
    found = vmap(lambda p, x: functional_call(cells[0], p, (x,)))(weights, x)
    for v, c in enumerate(cells):
        agree([t[v] for t in found], c(x[v]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, device: str) -> None:
    bound = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    members = [FusedLSTM(FEATURES, H, 2, dtype=dtype, device=device) for _ in range(V)]
    weights = {k: w.detach() for k, w in stack_module_state(members)[0].items()}
    x = {"x": draw(V, T, B, FEATURES).to(device, dtype)}
    found = vmap(grad(loss(members[0])))(weights, x)
    exact = {k: w.double() for k, w in weights.items()}
    reference = FusedLSTM(FEATURES, H, 2, dtype=torch.float64, device=device, backend="torch")
    expected = in_a_loop(grad(loss(reference)), (0, 0), exact, {"x": x["x"].double()})
    for name, g in found.items():
        assert g.dtype == dtype
        close(g.double(), expected[name], bound)


@pytest.mark.parametrize("empty", ["T", "B"])
def test_nothing_to_do(empty: str, device: str) -> None:
    steps, rows = (0, B) if empty == "T" else (T, 0)
    members = [module(device, bidirectional=True) for _ in range(V)]
    weights = {k: w.detach() for k, w in stack_module_state(members)[0].items()}
    x = draw(V, steps, rows, FEATURES).to(device)
    output, (h_n, _) = vmap(lambda p, x: functional_call(members[0], p, (x,)))(weights, x)
    assert output.shape == (V, steps, rows, 2 * H) and h_n.shape == (V, 2, rows, H)
    shared = {k: w[0] for k, w in weights.items()}
    found = vmap(grad(loss(members[0])), (None, 0))(shared, {"x": x})
    assert all(g.shape == (V, *shared[k].shape) for k, g in found.items())


@pytest.mark.parametrize("shared", [True, False], ids=["shared-weights", "own-weights"])
def test_no_members(shared: bool, device: str) -> None:
    fused, _, weights, given = own_inputs_and_weights(device)
    weights = {k: w[0] if shared else w[:0] for k, w in weights.items()}
    given = {k: t[:0] if per_member(device)[k] == 0 else t for k, t in given.items()}
    dims = (None if shared else 0, per_member(device))
    output, h_n, *_ = vmap(lambda p, g: call(fused, p, g), dims)(weights, given)
    assert output.shape == (0, T, B, 4) and h_n.shape == (0, 4, B, 2)


@pytest.mark.parametrize("shared", [True, False], ids=["shared-weights", "own-weights"])
@pytest.mark.parametrize("own", ["lengths", "reset"])
def test_no_members_with_lengths_or_resets_of_their_own(
    own: str, shared: bool, device: str
) -> None:
    fused, _, weights, _ = own_inputs_and_weights(device)
    weights = {k: w[0] if shared else w[:0] for k, w in weights.items()}
    given = {k: t[0] for k, t in inputs(fused, device).items()}
    given[own] = inputs(fused, device)[own][:0]
    dims = (None if shared else 0, {k: 0 if k == own else None for k in given})
    output, h_n, *_ = vmap(lambda p, g: call(fused, p, g), dims)(weights, given)
    assert output.shape == (0, T, B, 4) and h_n.shape == (0, 4, B, 2)


def test_the_example_in_readme() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    section = readme.split("## Ensembles and per-sample gradients\n```python\n")[1]
    names: dict[str, Any] = {}
    exec(section.split("```")[0], names)
    assert names["outputs"].shape == (8, 3, 20, 64)
    close(names["outputs"][5], names["members"][5](names["x"])[0], 1e-6)
    for k, sample in enumerate(names["x"]):
        expected = grad(names["loss"])(names["one"], sample)
        agree({name: g[k] for name, g in names["per_sample"].items()}, expected, 1e-5)


def test_wrong_lengths_of_a_member() -> None:
    """On a CPU, where they are looked at; elsewhere they are clamped."""
    fused, x = module("cpu"), draw(T, B, FEATURES)
    lengths = torch.tensor([[T, 1], [T + 1, 2]])
    with pytest.raises(RuntimeError, match=rf"lengths\[2\] must be in 0..{T}; got {T + 1}"):
        vmap(lambda n: fused(x, lengths=n)[0])(lengths)
