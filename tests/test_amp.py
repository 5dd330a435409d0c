"""Mixed precision: autocast, its regions and dtypes, and GradScaler."""

import copy
from typing import Any

import pytest
import torch
from conftest import CUDA
from helpers import BOUNDS, NAMES, assert_equal, close, error, pair
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from lstm_cuda import FusedLSTM, FusedLSTMCell, shapes

HALVES = [torch.bfloat16, torch.float16]
both_halves = pytest.mark.parametrize("half", HALVES, ids=NAMES.get)


def everything(result: tuple[Any, ...]) -> list[Tensor]:
    """Output, h_n, c_n and, if there, cells."""
    output, state, *cells = result
    return [output.data if isinstance(output, PackedSequence) else output, *state, *cells]


def dtypes_of_torch(lstm: nn.Module, *arguments: Any) -> list[torch.dtype] | None:
    """None where torch cannot run it: float16 in oneDNN on most processors."""
    try:
        return [t.dtype for t in everything(lstm(*arguments))]
    except RuntimeError as e:
        assert "create a primitive" in str(e)
        return None


CASES = {
    "plain": ({}, False),
    "stack": ({"num_layers": 2, "bidirectional": True}, False),
    "projected": ({"proj_size": 3}, False),
    "packed": ({}, True),
    "packed-stack": ({"num_layers": 2, "bidirectional": True}, True),
    "packed-projected": ({"proj_size": 3}, True),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
@both_halves
@pytest.mark.parametrize("x_dtype", [torch.float32, *HALVES], ids=lambda d: f"x-{NAMES[d]}")
@pytest.mark.parametrize(
    "c_dtype", [None, torch.float32, *HALVES], ids=lambda d: f"c-{NAMES.get(d)}"
)
@pytest.mark.parametrize("case", CASES)
def test_results_have_the_dtypes_of_torch(
    case: str, c_dtype: torch.dtype | None, x_dtype: torch.dtype, half: torch.dtype, device: str
) -> None:
    options, packed = CASES[case]
    lstm, fused = pair(3, 4, device=device, **options)
    x = torch.randn(5, 2, 3, device=device)
    LD = lstm.num_layers * (2 if lstm.bidirectional else 1)
    hx = c32 = None
    if c_dtype is not None:
        h0 = torch.randn(LD, 2, lstm.proj_size or 4, device=device)
        c0 = torch.randn(LD, 2, 4, device=device)
        hx, c32 = (h0, c0.to(c_dtype)), (h0, c0)

    def rows(x: Tensor) -> Any:
        return pack_padded_sequence(x, torch.tensor([5, 3])) if packed else x

    exact = everything(lstm(rows(x), c32))
    given = rows(x.to(x_dtype))
    with torch.autocast(device, half):
        found = everything(fused(given, hx))
        expected = dtypes_of_torch(lstm, given, hx)
    assert [t.dtype for t in found] == (expected or [half] * 3)
    bound = max(BOUNDS[d][0] for d in (half, x_dtype, c_dtype) if d is not None)
    for a, b in zip(found, exact, strict=True):
        assert error(a.float(), b) < bound
    found[0].float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
@both_halves
@pytest.mark.parametrize(
    "c_dtype", [None, torch.float32, *HALVES], ids=lambda d: f"c-{NAMES.get(d)}"
)
def test_cell_has_the_dtypes_of_torch(
    c_dtype: torch.dtype | None, half: torch.dtype, device: str
) -> None:
    theirs, ours = nn.LSTMCell(3, 4, device=device), FusedLSTMCell(3, 4, device=device)
    ours.load_state_dict(theirs.state_dict())
    state = [torch.randn(2, 4, device=device) for _ in range(2)]
    hx = None if c_dtype is None else (state[0], state[1].to(c_dtype))
    x = torch.randn(2, 3, device=device)
    with torch.autocast(device, half):
        found, expected = ours(x, hx), theirs(x, hx)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert error(a.float(), b.float()) < BOUNDS[torch.bfloat16][0]


OPTIONS: dict[str, dict[str, Any]] = {
    "L1": {},
    "L2-both-ways": {"num_layers": 2, "bidirectional": True},
    "P3": {"proj_size": 3},
}


@both_halves
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("options", OPTIONS)
def test_autocast_is_the_module_in_that_dtype(
    options: str, backend: str, half: torch.dtype, device: str
) -> None:
    """With lengths, resets and cells; the gradients come back in float32."""
    fused = FusedLSTM(3, 4, device=device, backend=backend, **OPTIONS[options])
    converted = copy.deepcopy(fused).to(half)
    x = torch.randn(5, 2, 3, device=device)
    keywords = {
        "lengths": torch.tensor([5, 2]),
        "reset": torch.rand(5, 2, device=device) < 0.3,
        "return_cells": True,
    }
    with torch.autocast(device, half):
        found = everything(fused(x, **keywords))
    expected = everything(converted(x.to(half), **keywords))
    for a, b in zip(found, expected, strict=True):
        assert_equal(a.to(half), b)
    for outputs in (found, expected):  # backward outside the region
        sum(t.to(half).float().sin().sum() for t in outputs).backward()
    for p, q in zip(fused.parameters(), converted.parameters(), strict=True):
        assert p.grad is not None and p.grad.dtype == torch.float32
        assert_equal(p.grad, q.grad.float())


def test_regions_nest(device: str) -> None:
    fused = FusedLSTM(3, 4, 2, device=device)
    x = torch.randn(5, 2, 3, device=device)
    plain = fused(x)
    half = copy.deepcopy(fused).half()(x.half())
    brain = copy.deepcopy(fused).bfloat16()(x.bfloat16())
    with torch.autocast(device, torch.bfloat16):
        assert_equal(fused(x), brain)
        with torch.autocast(device, enabled=False):
            assert_equal(fused(x), plain)
            with pytest.raises(ValueError, match="must have the input's dtype"):
                fused(x.bfloat16())
        with torch.autocast(device, torch.float16):
            found = fused(x)
            assert found[0].dtype == torch.float16
            assert_equal(found, half)
        assert_equal(fused(x), brain)
    assert_equal(fused(x), plain)


def test_a_region_for_another_device_does_not_matter() -> None:
    fused, x = FusedLSTM(3, 4), torch.randn(5, 2, 3)
    expected = fused(x)
    torch.set_autocast_enabled("cuda", True)  # autocast() itself leaves it off without a GPU
    try:
        assert_equal(fused(x), expected)
    finally:
        torch.set_autocast_enabled("cuda", False)


@both_halves
def test_backward_inside_the_region_is_backward_outside(half: torch.dtype, device: str) -> None:
    fused = FusedLSTM(3, 4, 2, device=device)
    x = torch.randn(5, 2, 3, device=device)
    found = []
    for inside in (False, True):
        fused.zero_grad()
        with torch.autocast(device, half):
            loss = fused(x)[0].float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([p.grad for p in fused.parameters()])
    assert_equal(*found)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_float64_is_left_alone(backend: str, device: str) -> None:
    fused = FusedLSTM(3, 4, dtype=torch.float64, backend=backend, device=device)
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = fused(x)[0]
        assert y.dtype == torch.float64
        with pytest.raises(ValueError, match=r"hx\[0\] .* autocast leaves float64 as it is"):
            fused(x, (torch.zeros(1, 2, 4, device=device),) * 2)
    close(y, fused(x)[0])


MIXES = {  # of weights, x, h_0, c_0
    "w32-x16": (torch.float32, torch.bfloat16, None, None),
    "w16-x32": (torch.float16, torch.float32, None, None),
    "w32-x64": (torch.float32, torch.float64, None, None),
    "x32-h16": (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
    "x16-h32": (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    "xf16-xbf16": (torch.float16, torch.bfloat16, torch.float16, torch.float16),
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_dtypes_are_an_error_without_autocast(mix: str, device: str) -> None:
    """As in torch.nn.LSTM; under autocast the same call runs."""
    w, x_dtype, h, c = MIXES[mix]
    lstm, fused = pair(3, 4, device=device, dtype=w)
    x = torch.randn(5, 2, 3, device=device).to(x_dtype)
    hx = None
    if h is not None and c is not None:
        hx = tuple(torch.randn(1, 2, 4, device=device).to(d) for d in (h, c))
    with pytest.raises((ValueError, RuntimeError)):
        lstm(x, hx)
    culprit = r"hx\[0\]" if w == x_dtype else r"weights\[0\]\[0\] \(w_ih\)"
    with pytest.raises(ValueError, match=f"{culprit} must have the input's dtype, {x_dtype}; got"):
        fused(x, hx)
    if torch.float64 not in MIXES[mix]:
        with torch.autocast(device, torch.bfloat16):
            assert fused(x, hx)[0].dtype == torch.bfloat16


@both_halves
@pytest.mark.parametrize("how", ["autocast", "module"])
def test_the_cell_state_is_kept_in_float32(how: str, half: torch.dtype, device: str) -> None:
    """What is added at each step is a quarter of the spacing of 16-bit numbers at the sum."""
    T, c0, added = 256, 4.0, torch.finfo(half).eps
    fused = FusedLSTM(2, 3, device=device)
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
        fused.bias_ih_l0[:6] = 20.0  # i = f = 1
        fused.bias_ih_l0[6:9] = added  # g
    x = torch.zeros(T, 1, 2, device=device)
    hx = (torch.zeros(1, 1, 3, device=device), torch.full((1, 1, 3), c0, device=device))
    if how == "module":
        fused, x, hx = fused.to(half), x.to(half), (hx[0].to(half), hx[1].to(half))
    assert torch.tensor(c0).to(half) + added == c0
    with torch.autocast(device, half, enabled=how == "autocast"):
        gained = fused(x, hx)[1][1].float() - c0
    # The gates of bfloat16 on CUDA are right to 2^-12: 256 times that of c is an eighth of the sum.
    torch.testing.assert_close(gained, torch.full_like(gained, T * added), rtol=0.25, atol=0)


def small_sums(module: nn.Module, half: torch.dtype) -> float:
    """Makes each step add half a unit in the last place of a 16-bit number from 4 up to c."""
    added = torch.finfo(half).eps * 2
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.get_parameter("bias_ih" + ("_l0" if isinstance(module, nn.RNNBase) else "")).copy_(
            torch.tensor([20.0, 20.0, added, 0.0]).repeat_interleave(3)
        )
    return added


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@both_halves
@pytest.mark.parametrize("way", ["cell", "packed", "projected", "x16"])
@pytest.mark.parametrize("given", ["float32", "half", "nohx"])
def test_between_calls_c_is_as_exact_as_in_torch(
    given: str, way: str, half: torch.dtype, device: str
) -> None:
    """A call for each step: c in float32 where torch keeps that, else a sum in 16 bits stands."""
    options = {"proj_size": 2} if way == "projected" else {}
    modules = pair(2, 3, device=device, **options)
    if way == "cell":
        modules = nn.LSTMCell(2, 3, device=device), FusedLSTMCell(2, 3, device=device)
    c_dtype = half if given == "half" else torch.float32
    c_n = []
    for module in modules:
        added = small_sums(module, half)
        x = torch.zeros(2 if way == "packed" else 1, 2, 2, device=device)
        if way == "x16":
            x = x.half()
        h, c = torch.zeros(1, 2, options.get("proj_size", 3)), torch.full((1, 2, 3), 4.0)
        state: Any = None if given == "nohx" else (h.to(device), c.to(device, c_dtype))
        if way == "cell":
            x, state = x[0], None if state is None else tuple(t[0] for t in state)
        for _ in range(16):
            with torch.autocast(device, half):
                if way == "cell":
                    state = module(x, state)
                else:
                    rows = pack_padded_sequence(x, torch.tensor([2, 1])) if way == "packed" else x
                    state = module(rows, state)[1]
        c_n.append(state[1][..., 1, :])  # of a row that has one step in each call
    theirs, ours = c_n
    assert ours.dtype == theirs.dtype
    # With pre-activations of bfloat16, kernels for CUDA take gates from tanh.approx: to 2^-12.
    approximate = shapes.saved_gates_dtype(x.to(half)) is torch.bfloat16
    rtol = 1e-3 + (16 * 2**-12 if approximate else 0)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    gained = ours.float() - (0 if given == "nohx" else 4)
    assert (gained == 0).all() if given == "half" else (gained > 14 * added).all()


@both_halves
def test_checkpointing_recomputes_in_the_same_dtype(half: torch.dtype, device: str) -> None:
    fused = FusedLSTM(3, 4, 2, device=device)
    x = torch.randn(5, 2, 3, device=device, requires_grad=True)
    with torch.autocast(device, half):
        plain = fused(x)[0]
        recomputed = checkpoint(lambda x: fused(x)[0], x, use_reentrant=False)
    assert_equal(recomputed, plain)
    assert_equal(
        torch.autograd.grad(recomputed.float().sum(), x),
        torch.autograd.grad(plain.float().sum(), x),
    )


def test_double_backward(device: str) -> None:
    fused = FusedLSTM(3, 4, device=device)
    x = torch.randn(5, 2, 3, requires_grad=True, device=device)
    with torch.autocast(device, torch.bfloat16):
        (grad,) = torch.autograd.grad(fused(x)[0].float().pow(2).sum(), x, create_graph=True)
        grad.pow(2).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


def test_derivatives_of_a_state_in_float32_are_not_rounded() -> None:
    cell = FusedLSTMCell(3, 4)
    h, c = torch.randn(2, 4), torch.randn(2, 4, requires_grad=True)
    x = torch.randn(2, 3)

    def c_n(c: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cell(x, (h, c))[1]

    plain = torch.autograd.grad(c_n(c).sum(), c)[0]
    twice = torch.autograd.grad(c_n(c).sum(), c, create_graph=True)[0]
    _, tangent = torch.func.jvp(c_n, (c.detach(),), (torch.ones(2, 4),))
    for found in (twice, tangent):  # dc_n/dc_0 is f
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)


def scaled_step(
    model: nn.Module, x: Tensor, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer
) -> list[Tensor]:
    """One step of training; its gradients, unscaled and clipped."""
    optimizer.zero_grad()
    with torch.autocast(x.device.type, torch.float16):
        loss = model(x)[0].float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    scaler.step(optimizer)
    scaler.update()
    return grads


def test_grad_scaler(device: str) -> None:
    """Steps whose scaled gradients overflow are left out; the others are those of float32."""
    fused = FusedLSTM(3, 5, 2, device=device)
    x = torch.randn(6, 4, 3, device=device)
    optimizer = torch.optim.SGD(fused.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**32, backoff_factor=2.0**-10)
    before = [p.detach().clone() for p in fused.parameters()]
    for left in (2.0**22, 2.0**12):
        scaled_step(fused, x, scaler, optimizer)
        assert scaler.get_scale() == left
        assert_equal(list(fused.parameters()), before)

    exact = copy.deepcopy(fused).double()
    exact(x.double())[0].square().mean().backward()
    nn.utils.clip_grad_norm_(exact.parameters(), 1e-3)
    grads = scaled_step(fused, x, scaler, optimizer)
    assert scaler.get_scale() == 2.0**12
    for grad, old, new, parameter in zip(
        grads, before, fused.parameters(), exact.parameters(), strict=True
    ):
        assert error(grad.double(), parameter.grad) < BOUNDS[torch.float16][0]
        assert_equal(new, old - grad)
