"""FusedLSTM under torch.compile, export, torch.func, checkpointing, DDP."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import CUDA
from helpers import assert_equal, close, error
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lstm_cuda import FusedLSTM, FusedLSTMCell

SIZES = [(5, 13), (7, 14), (9, 6), (23, 2), (2, 40)]  # none is 0, 1, or a size of the weights
STACKS: dict[str, dict[str, Any]] = {
    "L1": {},
    "L2": {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True},
}
KEYWORDS = ["nothing", "hx", "one-tensor-hx", "lengths", "reset", "lengths-reset", "return_cells"]


def arguments(
    lstm: FusedLSTM, T: int, B: int, keywords: str, device: str
) -> tuple[Tensor, dict[str, Any]]:
    g = torch.Generator().manual_seed(T)
    x = torch.randn(T, B, 3, generator=g, dtype=torch.float64).to(device)
    kwargs: dict[str, Any] = {}
    LD = lstm.num_layers * (2 if lstm.bidirectional else 1)
    if "hx" in keywords:
        h0 = torch.randn(LD, B, lstm.proj_size or 4, generator=g, dtype=torch.float64).to(device)
        c0 = torch.randn(LD, B, 4, generator=g, dtype=torch.float64).to(device)
        kwargs["hx"] = (h0, h0) if keywords == "one-tensor-hx" else (h0, c0)
    if "lengths" in keywords:
        kwargs["lengths"] = torch.randint(0, T + 1, (B,), generator=g).to(device)
    if "reset" in keywords:
        kwargs["reset"] = (torch.rand(T, B, generator=g) < 0.3).to(device)
    if keywords == "return_cells":
        kwargs["return_cells"] = True
    if lstm.batch_first:
        x = x.transpose(0, 1)
        if "reset" in kwargs:
            kwargs["reset"] = kwargs["reset"].t()
    return x, kwargs


def everything(result: tuple[Any, ...]) -> list[Tensor]:
    return [result[0], *result[1], *result[2:]]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize("stack", STACKS)
def test_compile_once_for_all_lengths_pt149909_pt158007_pt167275(
    stack: str, keywords: str, training: bool, device: str
) -> None:
    if keywords == "one-tensor-hx" and "proj_size" in STACKS[stack]:
        pytest.skip("h and c differ in size")
    torch._dynamo.reset()
    lstm = FusedLSTM(3, 4, device=device, dtype=torch.float64, **STACKS[stack]).train(training)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lstm, fullgraph=True, dynamic=True, backend=counter)
    for T, B in SIZES:
        x, kwargs = arguments(lstm, T, B, keywords, device)
        x.requires_grad_(training)
        with torch.set_grad_enabled(training):
            found, expected = everything(compiled(x, **kwargs)), everything(lstm(x, **kwargs))
        for a, b in zip(found, expected, strict=True):
            close(a, b)
        if training:
            leaves = [x, *lstm.parameters()]
            grads = [torch.linspace(-1, 2, out.numel()).view(out.shape).to(out) for out in found]
            for a, b in zip(
                torch.autograd.grad(found, leaves, grads),
                torch.autograd.grad(expected, leaves, grads),
                strict=True,
            ):
                close(a, b)
        if SIZES[0][0] == T:
            graphs = len(counter.graphs)
    assert len(counter.graphs) == graphs, "recompiled for another length or batch"


def test_compile_with_inductor_pt140845(device: str) -> None:
    torch._dynamo.reset()
    lstm = FusedLSTM(3, 4, 2, dropout=0.0, device=device)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def f(x: Tensor) -> Tensor:
        return lstm(model(x).relu())[0].sin()

    x = torch.randn(7, 5, 3, device=device)
    with torch.no_grad():
        y, code = run_and_get_code(torch.compile(f, fullgraph=True), x)
        assert error(y, f(x)) < 5e-6
    # Nothing is unrolled: a layer is one call of the op, as without torch.compile.
    assert len(re.findall(r"= torch\.ops\.lstm_cuda\w*\.layer_forward\b", "".join(code))) == 2


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_a_cell(autocast: bool, device: str) -> None:
    torch._dynamo.reset()
    cell = FusedLSTMCell(3, 4, device=device)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    zeros = torch.zeros(5, 4, device=device)
    x = torch.randn(5, 3, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        found, expected = compiled(x, (zeros, zeros)), cell(x, (zeros, zeros))
    assert_equal(found, expected)
    leaves = list(cell.parameters())
    assert_equal(
        torch.autograd.grad(found[0].sum(), leaves), torch.autograd.grad(expected[0].sum(), leaves)
    )


def test_compile_the_reference(device: str) -> None:
    torch._dynamo.reset()
    lstm = FusedLSTM(3, 4, peephole=True, zoneout=0.2, device=device, dtype=torch.float64).eval()
    x = torch.randn(4, 5, 3, device=device, dtype=torch.float64)
    close(torch.compile(lstm, fullgraph=True, backend="aot_eager")(x)[0], lstm(x)[0])


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
def test_compile_lengths_out_of_range_raise_when_run(device: str) -> None:
    """What cannot be looked at while compiling, the op looks at; on a GPU it clamps."""
    torch._dynamo.reset()
    lstm = FusedLSTM(3, 4, device=device)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3, device=device)
    compiled(x, lengths=torch.tensor([5, 3], device=device))
    wrong = torch.tensor([6, -1], device=device)
    if device == "cpu":
        with pytest.raises((RuntimeError, ValueError), match="lengths"):
            compiled(x, lengths=wrong)
    else:
        found = compiled(x, lengths=wrong)[0]
        assert_equal(found, lstm(x, lengths=torch.tensor([5, 0], device=device))[0])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("stack", STACKS)
def test_export_with_dynamic_sizes_pt115092(
    stack: str, gradients: bool, strict: bool, device: str
) -> None:
    lstm = FusedLSTM(3, 4, device=device, dtype=torch.float64, **STACKS[stack]).eval()
    x = torch.randn(6, 5, 3, device=device, dtype=torch.float64)
    sizes = {"input": {0: torch.export.Dim("first"), 1: torch.export.Dim("second")}}
    with torch.set_grad_enabled(gradients):
        exported = torch.export.export(lstm, (x,), dynamic_shapes=sizes, strict=strict)
        for first, second in ((6, 5), (11, 9)):
            x = torch.randn(first, second, 3, device=device, dtype=torch.float64)
            found = everything(exported.module()(x))
            for a, b in zip(found, everything(lstm(x)), strict=True):
                close(a, b)


def both(device: str, **options: Any) -> tuple[FusedLSTM, FusedLSTM]:
    """A FusedLSTM on the op, and one with its parameters on the reference."""
    fused = FusedLSTM(3, 4, device=device, dtype=torch.float64, **options)
    reference = FusedLSTM.from_torch(fused.to_torch(), backend="torch")
    return fused, reference


def x64(*shape: int, device: str) -> Tensor:
    return torch.randn(shape or (5, 2, 3), dtype=torch.float64, device=device)


REVERSE_MODE: dict[str, Callable[[FusedLSTM, Tensor], Any]] = {
    "grad": lambda m, x: torch.func.grad(lambda x: m(x)[0].pow(2).sum())(x),
    "vjp": lambda m, x: torch.func.vjp(lambda x: m(x)[0], x)[1](m(x)[0])[0],
    "jacrev": lambda m, x: torch.func.jacrev(lambda x: m(x)[0].sum((0, 1)))(x),
    "grad-of-grad": lambda m, x: torch.func.grad(
        lambda x: torch.func.grad(lambda x: m(x)[0].pow(2).sum())(x).pow(2).sum()
    )(x),
    # no_grad holds for what is computed under it, at both levels.
    "no_grad-inside": lambda m, x: torch.func.grad(
        lambda x: torch.func.grad(lambda s: (s * torch.no_grad()(m)(x)[0]).sum())(x.sum()).sin()
    )(x),
    "grad-of-a-weight": lambda m, x: torch.func.grad(
        lambda w: torch.func.functional_call(m, {"weight_hh_l0": w}, (x,))[0].sum()
    )(m.weight_hh_l0.detach()),
}


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("transform", REVERSE_MODE)
def test_reverse_mode_transforms(transform: str, mode: str, device: str) -> None:
    fused, reference = both(device, num_layers=2)
    x = x64(device=device)
    with torch.set_grad_enabled(mode == "grad"):
        f = REVERSE_MODE[transform]
        close(f(fused, x), f(reference, x), 1e-11)


def dual(m: FusedLSTM, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m(forward_ad.make_dual(x, x))[0]).tangent.clone()


def dual_weight(m: FusedLSTM, x: Tensor) -> Any:
    w = m.weight_hh_l0.detach()
    with forward_ad.dual_level():
        weights = {"weight_hh_l0": forward_ad.make_dual(w, w)}
        y = torch.func.functional_call(m, weights, (x,))[0]
        return forward_ad.unpack_dual(y).tangent.clone()


def jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Along a vector that depends on x, so that each derivative sees that too."""
    return torch.func.jvp(f, (x,), (x.cos(),))[1]


FORWARD_MODE: dict[str, Callable[[FusedLSTM, Tensor], Any]] = {
    "jvp": lambda m, x: jvp(lambda x: m(x)[0], x),
    "jvp-of-a-weight": lambda m, x: jvp(
        lambda w: torch.func.functional_call(m, {"weight_hh_l0": w}, (x,))[0],
        m.weight_hh_l0.detach(),
    ),
    "jacfwd": lambda m, x: torch.func.jacfwd(lambda x: m(x)[0].sum((0, 1)))(x),
    "jacfwd-of-a-weight": lambda m, x: torch.func.jacfwd(
        lambda w: torch.func.functional_call(m, {"weight_hh_l0": w}, (x,))[0].sum((0, 1))
    )(m.weight_hh_l0.detach()),
    "hessian": lambda m, x: torch.func.hessian(lambda x: m(x)[0].sum())(x[:2]),
    "jacrev-of-jacrev": lambda m, x: torch.func.jacrev(torch.func.jacrev(lambda x: m(x)[0].sum()))(
        x[:2]
    ),
    "jacrev-of-jacfwd": lambda m, x: torch.func.jacrev(torch.func.jacfwd(lambda x: m(x)[0].sum()))(
        x[:2]
    ),
    "jacfwd-of-jacfwd": lambda m, x: torch.func.jacfwd(torch.func.jacfwd(lambda x: m(x)[0].sum()))(
        x[:2]
    ),
    "jvp-of-jvp": lambda m, x: jvp(lambda x: jvp(lambda x: m(x)[0], x), x),
    "jvp-of-grad": lambda m, x: jvp(torch.func.grad(lambda x: m(x)[0].pow(2).sum()), x),
    "grad-of-jvp": lambda m, x: torch.func.grad(lambda x: jvp(lambda x: m(x)[0], x).sum())(x),
    "jacfwd-of-hessian": lambda m, x: torch.func.jacfwd(
        torch.func.hessian(lambda x: m(x)[0].sum())
    )(x[:2, :1]),
    "forward_ad": dual,
    "forward_ad-weight": dual_weight,
}


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("transform", FORWARD_MODE)
def test_forward_mode_transforms(transform: str, mode: str, device: str) -> None:
    fused, reference = both(device, num_layers=2, bidirectional=True, proj_size=2)
    x = x64(device=device)
    with torch.set_grad_enabled(mode == "grad"):
        f = FORWARD_MODE[transform]
        expected = f(reference, x)
        assert expected.abs().sum() > 0
        close(f(fused, x), expected, 1e-11)


def grad_of_weights(m: FusedLSTM, x: Tensor) -> dict[str, Tensor]:
    weights = {k: p.detach() for k, p in m.named_parameters()}
    return torch.func.grad(
        lambda w: torch.func.functional_call(m, w, (x,))[0].pow(2).sum()  # type: ignore[no-any-return]
    )(weights)


def test_autograd_through_func_grad(device: str) -> None:
    """torch.func differentiates once and cannot see that others go on."""
    fused, reference = both(device, num_layers=2, bidirectional=True, proj_size=2)
    x = x64(device=device).requires_grad_()

    def further(m: FusedLSTM) -> list[Tensor]:
        second = sum(g.pow(2).sum() for g in grad_of_weights(m, x).values())
        (by_x,) = torch.autograd.grad(second, x, create_graph=True)  # type: ignore[arg-type]
        return [by_x, *torch.autograd.grad(by_x.pow(2).sum(), x)]

    for a, b in zip(further(fused), further(reference), strict=True):
        assert b.abs().sum() > 0
        close(a, b, 1e-11)


def test_forward_ad_through_func_grad(device: str) -> None:
    fused, reference = both(device, num_layers=2, bidirectional=True, proj_size=2)
    x, dx = x64(device=device), x64(device=device).cos()

    def tangents(m: FusedLSTM) -> list[Tensor]:
        with forward_ad.dual_level():
            grads = grad_of_weights(m, forward_ad.make_dual(x, dx)).values()
            return [forward_ad.unpack_dual(g).tangent for g in grads]  # type: ignore[misc]

    for a, b in zip(tangents(fused), tangents(reference), strict=True):
        assert b.abs().sum() > 0
        close(a, b, 1e-11)


def test_forward_ad_elsewhere_does_not_matter(device: str) -> None:
    fused, _ = both(device)
    x = x64(device=device)
    expected = fused(x)[0]
    with forward_ad.dual_level():
        assert_equal(fused(x)[0], expected)


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
def test_vmap_when_compiled(mode: str, device: str) -> None:
    """It runs outside the graph, as forward mode does."""
    torch._dynamo.reset()
    fused, reference = both(device)
    x = x64(device=device).expand(3, -1, -1, -1) + torch.arange(3, device=device).view(3, 1, 1, 1)
    compiled = torch.compile(lambda x: torch.func.vmap(fused)(x)[0], backend="aot_eager")
    with torch.set_grad_enabled(mode == "grad"):
        close(compiled(x), torch.stack([reference(member)[0] for member in x]))


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
def test_jvp_when_compiled(mode: str, device: str) -> None:
    """It runs outside the graph: torch.compile follows no rule for forward mode."""
    torch._dynamo.reset()
    fused, reference = both(device)
    compiled = torch.compile(lambda x: FORWARD_MODE["jvp"](fused, x), backend="aot_eager")
    x = x64(device=device)
    with torch.set_grad_enabled(mode == "grad"):
        close(compiled(x), FORWARD_MODE["jvp"](reference, x), 1e-11)


def test_batched_gradients_raise(device: str) -> None:
    fused, _ = both(device)
    y = fused(x64(device=device).requires_grad_())[0]
    grads = torch.ones(2, *y.shape, dtype=y.dtype, device=device)
    with pytest.raises(RuntimeError, match=r"lstm_cuda\w*::layer_backward"):
        torch.autograd.grad(y, list(fused.parameters()), grads, is_grads_batched=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, device: str) -> None:
    fused, _ = both(device, num_layers=2, dropout=0.5)
    x = x64(device=device).requires_grad_()
    results = []
    for wrap in (False, True):
        torch.manual_seed(3)
        y = checkpoint(lambda x: fused(x)[0], x, use_reentrant=reentrant) if wrap else fused(x)[0]
        results.append([y, *torch.autograd.grad(y.sum(), x)] if not reentrant else [y])
        if reentrant:
            x.grad = None
            y.sum().backward()
            results[-1].append(x.grad)
    assert_equal(*results)


def test_data_parallel_replicas_and_ddp(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        fused = FusedLSTM(3, 4, 2, bidirectional=True)
        x = torch.randn(5, 2, 3)
        expected = torch.autograd.grad(fused(x)[0].sum(), list(fused.parameters()))
        nn.parallel.DistributedDataParallel(fused)(x)[0].sum().backward()
        assert_equal([p.grad for p in fused.parameters()], list(expected))
    finally:
        torch.distributed.destroy_process_group()
