"""Forward-mode differentiation of the fused layer, and derivatives of its backward pass."""

import gc
from typing import Any

import pytest
import torch
from helpers import (
    BOUNDS,
    DTYPES,
    NAMES,
    Data,
    Problem,
    assert_equal,
    call,
    close,
    error,
    make,
    pair,
    truth,
)
from torch import Tensor
from torch.autograd import forward_ad

from lstm_cuda import FusedLSTM
from lstm_cuda.layer import fused_layer

OPTIONS = [
    Problem(4, 3, 2, 3),
    Problem(4, 2, 3, 3, bias=False, hx=False),
    Problem(5, 3, 2, 4, P=2, lengths=True),
    Problem(5, 3, 2, 3, reverse=True, lengths=True, reset=True),
    Problem(4, 3, 2, 3, bidirectional=True, P=2, reset=True, hx=False),
    Problem(4, 3, 2, 3, L=2, bidirectional=True, P=2, lengths=True, reset=True),
]
EDGES = [Problem(1, 1, 1, 1), Problem(0, 3, 2, 3), Problem(4, 0, 2, 3, reset=True)]


def dual(d: Data, names: list[str], seed: int = 5) -> Data:
    """The data, with random tangents for the named leaves."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, t in d.leaves().items():
        tangent = torch.randn(t.shape, generator=g, dtype=torch.float64).to(t)
        made[name] = forward_ad.make_dual(t, tangent) if name in names else t
    rows = [[made[f"weights[{k}][{j}]"] for j in range(len(r))] for k, r in enumerate(d.weights)]
    hx = None if d.hx is None else (made["h0"], made["c0"])
    return Data(made["x"], hx, rows, d.lengths, d.reset, d.cotangents)


def tangents(p: Problem, d: Data, names: list[str], f: Any = call) -> dict[str, Tensor]:
    """Of all outputs; zeros for None."""
    with forward_ad.dual_level():
        found = {k: forward_ad.unpack_dual(t) for k, t in f(p, dual(d, names)).items()}
    return {
        k: torch.zeros_like(u.primal) if u.tangent is None else u.tangent for k, u in found.items()
    }


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("p", OPTIONS + EDGES, ids=str)
def test_forward_mode(p: Problem, mode: str, device: str) -> None:
    d = make(p, device).to(torch.float64)
    with torch.set_grad_enabled(mode == "grad"):
        names = list(d.leaves())
        found, expected = tangents(p, d, names), tangents(p, d, names, truth)
    for name in expected:
        close(found[name], expected[name], 1e-11)


@pytest.mark.parametrize("p", [OPTIONS[0], OPTIONS[5]], ids=str)
def test_forward_mode_of_each_input_alone(p: Problem, device: str) -> None:
    d = make(p, device).to(torch.float64)
    for leaf in d.leaves():
        found, expected = tangents(p, d, [leaf]), tangents(p, d, [leaf], truth)
        assert expected["y"].abs().sum() > 0
        for name in expected:
            close(found[name], expected[name], 1e-11)


def test_forward_mode_against_differences(device: str) -> None:
    p = Problem(5, 3, 2, 3, bidirectional=True, lengths=True)
    d = make(p, device).to(torch.float64)
    found = tangents(p, d, ["x"])
    tangent = torch.randn(
        d.x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    ends = []
    with torch.no_grad():
        for step in (-1e-5, 1e-5):
            moved = d.to(torch.float64)
            moved.x += step * tangent.to(device)
            ends.append(call(p, moved))
    for name in found:
        close(found[name], (ends[1][name] - ends[0][name]) / 2e-5, 1e-8)


@pytest.mark.parametrize("p", OPTIONS + EDGES, ids=str)
def test_reverse_over_forward(p: Problem, device: str) -> None:
    d = make(p, device).to(torch.float64)
    results = []
    for f in (call, truth):
        leaves = list(d.leaves().values())
        loss = sum((t.sin() * t).sum() for t in tangents(p, d, list(d.leaves()), f).values())
        results.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-11)


@pytest.mark.parametrize("p", OPTIONS + EDGES, ids=str)
def test_second_and_third_order(p: Problem, device: str) -> None:
    """By inputs, weights and the incoming gradients."""
    d = make(p, device).to(torch.float64)
    leaves = [*d.leaves().values(), *(t.requires_grad_() for t in d.cotangents.values())]
    results = []
    for f in (call, truth):
        outputs = f(p, d)
        value = sum((outputs[k].sin() * t).sum() for k, t in d.cotangents.items())
        found: list[Tensor] = []
        for _ in range(3):
            grads = torch.autograd.grad(
                value, leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
            found += grads
            value = sum((g.cos() * g).sum() for g in grads)
        results.append(found)
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize("p", OPTIONS + EDGES, ids=str)
def test_the_last_derivative_is_that_of_the_formula(p: Problem) -> None:
    """Where no more can follow, kernels make it, and continue from the gradient of the gates."""
    d = make(p).to(torch.float64)
    leaves = [*d.leaves().values(), *(t.requires_grad_() for t in d.cotangents.values())]
    outputs = call(p, d)
    value = sum((outputs[k].sin() * t).sum() for k, t in d.cotangents.items())
    for _ in range(2):
        arguments = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(value, leaves, **arguments)
        kernel = torch.autograd.grad(
            value, leaves, **arguments | {"create_graph": False, "retain_graph": True}
        )
        for a, b in zip(kernel, grads, strict=True):
            close(a, b, 1e-11)
        value = sum((g.cos() * g).sum() for g in grads)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}])
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_pt5261_gradient_penalty(options: dict[str, Any], device: str) -> None:
    """Also pt9229, pt25315: the penalty of WGAN-GP, against nn.LSTM."""
    results = []
    lstms = pair(3, 4, device=device, dtype=torch.float64, **options)
    data = torch.randn(6, 2, 3, dtype=torch.float64, device=device)
    for lstm in lstms:
        x = data.clone().requires_grad_()
        with torch.backends.cudnn.flags(enabled=False):
            score = lstm(x)[0].mean((0, 2))
            (grad,) = torch.autograd.grad(score.sum(), x, create_graph=True)
            ((grad.norm(dim=(0, 2)) - 1).pow(2).mean() - score.mean()).backward()
        results.append([x.grad, *(w.grad for w in lstm.parameters())])
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-11)


def test_pt25315_hessian_vector_products(device: str) -> None:
    """In both orders of modes, by all weights."""
    fused = FusedLSTM(3, 4, bidirectional=True, device=device, dtype=torch.float64)
    reference = FusedLSTM.from_torch(fused.to_torch(), backend="torch")
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device)
    weights = {k: w.detach() for k, w in fused.named_parameters()}
    vector = {k: torch.randn_like(w) for k, w in weights.items()}

    def gradient(lstm: FusedLSTM) -> Any:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(lstm, weights, (x,))[0].pow(2).sum()

        return torch.func.grad(loss)

    expected = torch.func.jvp(gradient(reference), (weights,), (vector,))[1]
    forward = torch.func.jvp(gradient(fused), (weights,), (vector,))[1]
    reverse = torch.func.vjp(gradient(fused), weights)[1](vector)[0]
    for name in weights:
        close(forward[name], expected[name], 1e-11)
        close(reverse[name], expected[name], 1e-11)


def test_unbatched_and_batch_first(device: str) -> None:
    fused = FusedLSTM(3, 4, 2, batch_first=True, device=device, dtype=torch.float64)
    reference = FusedLSTM.from_torch(fused.to_torch(), backend="torch")
    for shape in ((5, 3), (2, 5, 3)):
        x = torch.randn(shape, dtype=torch.float64, device=device)
        found, expected = (
            torch.func.jvp(lambda x, m=m: m(x)[0], (x,), (x.cos(),))[1] for m in (fused, reference)
        )
        close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("what", ["forward", "double-backward"])
def test_accuracy(what: str, dtype: torch.dtype, device: str) -> None:
    """Within the bounds of first derivatives."""
    p = Problem(9, 5, 6, 17, bidirectional=True, lengths=True, reset=True)
    low = make(p, device).to(dtype)

    def run(d: Data, f: Any) -> dict[str, Tensor]:
        if what == "forward":
            return tangents(p, d, list(d.leaves()), f)
        outputs, leaves = f(p, d), d.leaves()
        value = sum((outputs[k] * t).sum() for k, t in d.cotangents.items())
        (grad,) = torch.autograd.grad(value, d.x, create_graph=True)
        grads = torch.autograd.grad((grad * d.cotangents["y"][..., :6]).sum(), leaves.values())
        return dict(zip(leaves, grads, strict=True))

    found, expected = run(low, call), run(low.to(torch.float64), truth)
    for name in expected:
        assert found[name].dtype == dtype
        assert error(found[name], expected[name]) <= 2 * BOUNDS[dtype][0], name


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_autocast(mode: str) -> None:
    """Dtypes are settled before; autocast must not touch the products of derivatives."""
    fused = FusedLSTM(3, 4)
    x = torch.randn(5, 2, 3)

    def run(m: FusedLSTM, x: Tensor) -> Tensor:
        if mode == "forward":
            return torch.func.jvp(lambda x: m(x)[0], (x,), (x.cos(),))[1].to(x.dtype)
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(m(x)[0].to(x.dtype).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), x)[0]

    with torch.autocast("cpu", torch.bfloat16):
        found = run(fused, x)
    exact = run(FusedLSTM.from_torch(fused.to_torch(), copy=True).to(torch.float64), x.double())
    assert found.dtype == torch.float32
    assert error(found, exact) < BOUNDS[torch.bfloat16][0]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
def test_nan_past_a_length_reaches_no_derivative(bidirectional: bool, device: str) -> None:
    p = Problem(6, 5, 3, 7, bidirectional=bidirectional, lengths=True, reset=True)
    clean, dirty = make(p, device).to(torch.float64), make(p, device).to(torch.float64)
    past = torch.arange(p.T, device=device)[:, None] >= dirty.lengths
    with torch.no_grad():
        dirty.x[past] = float("nan")
        dirty.cotangents["y"][past] = float("nan")
        dirty.cotangents["cells"][past] = float("nan")
    results = []
    for d in (dirty, clean):
        found = list(tangents(p, d, list(d.leaves())).values())
        outputs, leaves = call(p, d), list(d.leaves().values())
        grads = torch.autograd.grad(
            list(outputs.values()), leaves, list(d.cotangents.values()), create_graph=True
        )
        found += torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves)
        results.append(found)
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_nan_in_a_row_stays_there(device: str) -> None:
    p = Problem(5, 3, 2, 4)
    clean, dirty = make(p, device).to(torch.float64), make(p, device).to(torch.float64)
    with torch.no_grad():
        dirty.x[2, 1] = float("nan")
    rows = [0, 2]
    found, expected = (tangents(p, d, ["x", "h0"])["y"] for d in (dirty, clean))
    assert found[:, 1].isnan().any()
    close(found[:, rows], expected[:, rows])
    found, expected = (
        torch.autograd.grad(
            torch.autograd.grad(call(p, d)["y"].sum(), d.x, create_graph=True)[0].pow(2).sum(), d.x
        )[0]
        for d in (dirty, clean)
    )
    close(found[:, rows], expected[:, rows])


def test_a_reset_stops_nan(device: str) -> None:
    p = Problem(5, 2, 2, 4)
    d = make(p, device).to(torch.float64)
    d.reset = torch.zeros(5, 2, dtype=torch.bool, device=device)
    d.reset[3] = True
    with torch.no_grad():
        d.x[2] = float("nan")
    found = tangents(p, d, list(d.leaves()))["y"]
    assert found[2].isnan().all() and torch.isfinite(found[3:]).all()


def test_no_grad_holds_inside_forward_mode(device: str) -> None:
    """Where a tangent is computed under no_grad, an outer grad sees a constant."""
    fused = FusedLSTM(3, 4, device=device, dtype=torch.float64)
    reference = FusedLSTM.from_torch(fused.to_torch(), backend="torch")
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device)

    def run(m: FusedLSTM) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            with torch.no_grad():
                change = torch.func.jvp(lambda x: m(x)[0], (x,), (x.cos(),))[1]
            return (change * x.sum()).sum()

        return torch.func.grad(inner)(x)

    close(run(fused), run(reference), 1e-11)


def test_a_plain_backward_keeps_nothing_for_a_second_one(device: str) -> None:
    d = make(Problem(5, 3, 2, 4, lengths=True), device).to(torch.float64)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fused_layer(d.x, d.weights, *d.hx, d.lengths, None, 0, False)[0]
        assert len(packed) == 11  # x, h0, c0, lengths, y, gates, c and four weights
        torch.autograd.grad(y.sum(), d.x, retain_graph=True)
        assert len(packed) == 11
        torch.autograd.grad(y.sum(), d.x, create_graph=True)
    assert len(packed) > 11


@pytest.mark.parametrize("names", [["x"], []], ids=["with-tangents", "without"])
def test_results_are_freed_without_the_garbage_collector(names: list[str], device: str) -> None:
    d = make(Problem(4, 2, 3, 4), device).to(torch.float64)

    def nodes() -> int:
        return sum(
            isinstance(o, torch.autograd.function.BackwardCFunction) for o in gc.get_objects()
        )

    gc.collect()
    gc.disable()
    try:
        before = nodes()
        with forward_ad.dual_level():
            y = fused_layer(dual(d, names).x, d.weights, *d.hx, None, None, 0, True)[0]
            (grad,) = torch.autograd.grad(y.sum(), d.x, create_graph=True)
            torch.autograd.grad(grad.sum(), d.x)
            assert nodes() > before
            del y, grad
        assert nodes() == before
    finally:
        gc.enable()


def test_derivatives_repeat_bit_for_bit(device: str) -> None:
    p = Problem(6, 3, 4, 9, bidirectional=True, reset=True)

    def once() -> list[Tensor]:
        d = make(p, device).to(torch.float32)
        (grad,) = torch.autograd.grad(call(p, d)["y"].sum(), d.x, create_graph=True)
        seconds = torch.autograd.grad(grad.pow(2).sum(), list(d.leaves().values()))
        return [*seconds, *tangents(p, d, ["x"]).values()]

    assert_equal(once(), once())
