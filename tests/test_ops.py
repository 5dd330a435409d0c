"""The registered ops: results, accuracy with each optional argument absent, torch's own checks."""

import itertools
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    NAMES,
    Data,
    Problem,
    arguments,
    assert_accurate,
    assert_equal,
    close,
    make,
)
from torch import Tensor

from lstm_cuda import ops, shapes
from lstm_cuda.layer import fused_layer
from lstm_cuda.reference import lstm_layer
from lstm_cuda.second_order import Run

SMALL = Problem(4, 3, 2, 3, bidirectional=True, P=2, lengths=True, reset=True)
SHAPES = [
    Problem(1, 1, 1, 1),
    Problem(7, 3, 5, 33),
    Problem(4, 5, 3, 17, bidirectional=True),
    Problem(9, 2, 31, 64, lengths=True),
    Problem(5, 9, 8, 8, bidirectional=True, lengths=True, reset=True),
    Problem(6, 4, 3, 11, P=5, reset=True),
    Problem(8, 7, 1, 19, P=1, bidirectional=True, lengths=True, bias=False),
    Problem(11, 1, 40, 48, reverse=True, reset=True, hx=False),
    Problem(3, 70, 6, 10, lengths=True, bias=False, hx=False),
    Problem(3, 17, 6, 130),
]


def forward(p: Problem, d: Data, save: bool, cells: bool) -> tuple[Tensor, ...]:
    h0, c0 = d.hx if d.hx is not None else (None, None)
    bits = 2 if p.bidirectional else int(p.reverse)
    return ops.layer_forward(*arguments(d), h0, c0, d.lengths, d.reset, bits, save, cells, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("p", SHAPES, ids=str)
def test_accuracy(p: Problem, dtype: torch.dtype, device: str) -> None:
    saved = shapes.saved_gates_dtype(torch.empty(0, dtype=dtype, device=device))
    if p == SHAPES[0] and saved.itemsize == 2:
        pytest.skip("one number, the sum of rounded terms that may cancel, has any relative error")
    assert_accurate(p, make(p, device), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("capability", ops.build_info()["cpu_capabilities"])
def test_accuracy_of_each_cpu_capability(capability: str, dtype: torch.dtype) -> None:
    before = ops.build_info()["cpu_capability"]
    try:
        ops._C.set_cpu_capability(capability)
        if ops.build_info()["cpu_capability"] != capability:
            pytest.skip(f"this CPU has no {capability}")
        for p in SHAPES[:8]:
            assert_accurate(p, make(p), dtype)
    finally:
        ops._C.set_cpu_capability(before)


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_accuracy_where_packing_begins_to_pay(dtype: torch.dtype, hx: bool, device: str) -> None:
    for T, B in itertools.product((1, 2, 3, 7), range(1, 9)):
        p = Problem(T, B, 5, 9, hx=hx)
        d = make(p, device)
        assert_accurate(p, d, dtype)
        given = d.to(dtype)
        with torch.no_grad():
            inference, training = (forward(p, given, save, False)[:3] for save in (False, True))
        for a, b in zip(inference, training, strict=True):
            assert_equal(a, b)


def test_a_single_step_reads_weights_where_they_are_pt94457() -> None:
    """To pack them first, as oneDNN does in each call, costs more than the step itself."""
    for H, dtype in itertools.product((32, 512, 2048), DTYPES):
        plan = ops.plan_cpu(1, 1, 1, H, H, H, dtype, False)
        assert not plan["weights_packed"] and not plan["input_within_step"], (H, dtype)


def test_x_is_multiplied_within_the_step_only_by_packed_weights() -> None:
    seen = set()
    for T, B, H in itertools.product((1, 2, 3, 20), range(1, 40), (1, 9, 64, 200, 600)):
        for dtype in DTYPES:
            plan = ops.plan_cpu(T, B, 1, H, H, H, dtype, False)
            assert plan["weights_packed"] or not plan["input_within_step"], (T, B, H, dtype)
            seen.add((plan["weights_packed"], plan["input_within_step"]))
    assert len(seen) == 3


# Enough work to be shared out: by rows, by directions, and with fewer rows than threads.
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    "p",
    [
        Problem(6, 67, 64, 65, lengths=True, reset=True),
        Problem(5, 2, 100, 130, bidirectional=True, P=60),
        Problem(3, 1, 64, 300),
    ],
    ids=str,
)
def test_accuracy_with_threads(p: Problem, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    assert_accurate(p, make(p), dtype)


@pytest.mark.parametrize("save, cells", [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_what_is_returned(dtype: torch.dtype, save: bool, cells: bool, device: str) -> None:
    p = SMALL
    d = make(p, device).to(dtype)
    with torch.no_grad():
        y, h_n, c_n, gates, c = forward(p, d, save, cells)
    assert y.shape == (p.T, p.B, 2 * p.P) and y.is_contiguous()
    assert h_n.shape == (2, p.B, p.P) and c_n.shape == (2, p.B, p.H)
    assert {t.dtype for t in (y, h_n, c_n)} == {dtype}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (gates.dtype, c.dtype) == (shapes.saved_gates_dtype(d.x), wide)
    assert gates.shape == ((p.T, p.B, 2, 4 * p.H) if save else (0,))
    assert c.shape == ((p.T, p.B, 2, p.H) if save or cells else (0,))


def test_gates_are_activated_and_cells_are_those_of_the_reference(device: str) -> None:
    p = Problem(5, 3, 4, 6)
    d = make(p, device)
    _, _, _, gates, c = forward(p, d, True, False)
    i, f, g, _ = gates.chunk(4, -1)
    before = torch.cat([d.hx[1][None].transpose(1, 2), c[:-1]])
    close(f * before + i * g, c)
    close(c, lstm_layer(d.x, d.weights, *d.hx)[3])


# Past a row's length the saved gates hold nothing in particular, so two calls need not agree there.
@pytest.mark.parametrize(
    "p, save",
    [
        (SMALL, False),
        (Problem(4, 3, 2, 3, P=2, reset=True), True),
        (Problem(3, 2, 3, 5, bias=False, hx=False), True),
    ],
    ids=str,
)
def test_opcheck_forward(p: Problem, save: bool) -> None:
    d = make(p).to(torch.float32)
    h0, c0 = d.hx if d.hx is not None else (None, None)
    detached = [[w.detach() for w in part] for part in arguments(d)[1:]]
    hx = [None if t is None else t.detach() for t in (h0, c0)]
    args = (d.x.detach(), *detached, *hx, d.lengths, d.reset, 0, save, True, False)
    torch.library.opcheck(torch.ops.lstm_cuda.layer_forward.default, args)


@pytest.mark.parametrize("need_dx, need_dw", [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("p", [SMALL, Problem(3, 2, 3, 5, bidirectional=True, hx=False)], ids=str)
def test_opcheck_backward(p: Problem, need_dx: bool, need_dw: bool) -> None:
    d = make(p)
    with torch.no_grad():
        y, _, _, gates, c = forward(p, d, True, False)
    x, w_ih, w_hh, _, w_hr = arguments(d)
    grads = [d.cotangents[name] for name in ("y", "h_n", "c_n")]
    for dy, dh_n, dc_n in [grads, (None, grads[1], None)]:
        args = (
            dy, dh_n, dc_n, None, x, w_ih, w_hh, w_hr, *(d.hx or (None, None)),
            d.lengths, d.reset, 2, y, gates, c, need_dx, need_dw, False,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.lstm_cuda.layer_backward.default, args)


OUTPUTS = ["y", "h_n", "c_n", "cells"]


@pytest.mark.parametrize(
    "absent",
    [set(), *({name} for name in OUTPUTS), set(OUTPUTS) - {"h_n"}, set(OUTPUTS) - {"y"}],
    ids=lambda s: "without-" + "-".join(sorted(s)) if s else "all",
)
@pytest.mark.parametrize("p", [SMALL, Problem(5, 2, 3, 4, bias=False)], ids=str)
def test_absent_gradients_count_as_zero(p: Problem, absent: set[str], device: str) -> None:
    d = make(p, device).to(torch.float64)
    bits = 2 if p.bidirectional else 0
    found, expected = [], []
    for layer, results in ((fused_layer, found), (lstm_layer, expected)):
        args = (d.x, d.weights, *d.hx, d.lengths, d.reset, bits)
        outputs = layer(*args, True) if layer is fused_layer else layer(*args)
        # Everything that has a gradient is a leaf: absent ones arrive in backward as None.
        used = [
            (out, d.cotangents[name].view_as(out))
            for name, out in zip(OUTPUTS, outputs, strict=True)
            if name not in absent
        ]
        results += torch.autograd.grad(
            [out for out, _ in used], list(d.leaves().values()), [grad for _, grad in used]
        )
    for a, b in zip(found, expected, strict=True):
        close(a, b)


def test_cells_carry_a_gradient_only_if_asked_for(device: str) -> None:
    d = make(SMALL, device).to(torch.float64)
    for wanted in (False, True):
        *outputs, c = fused_layer(d.x, d.weights, *d.hx, None, None, 2, wanted)
        assert all(out.requires_grad for out in outputs) and c.requires_grad == wanted


@pytest.mark.parametrize("missing", ["none", "hx", "bias", "projection", "lengths", "reset"])
@pytest.mark.parametrize("bits", [0, 1, 2, 3], ids=lambda bits: f"reversed{bits}")
def test_gradcheck(missing: str, bits: int, device: str) -> None:
    d = make(
        Problem(
            3, 2, 2, 3, bidirectional=True, P=0 if missing == "projection" else 2,
            bias=missing != "bias", hx=missing != "hx", lengths=missing != "lengths",
            reset=missing != "reset",
        ),
        device,
    ).to(torch.float64)  # fmt: skip
    leaves = list(d.leaves().values())
    per = len(d.weights[0])

    def f(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        h0, c0 = rest[:2] if d.hx is not None else (None, None)
        flat = rest[2:] if d.hx is not None else rest
        rows = [list(flat[:per]), list(flat[per:])]
        return fused_layer(x, rows, h0, c0, d.lengths, d.reset, bits, True)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_repeats_bit_for_bit(dtype: torch.dtype, device: str) -> None:
    p = Problem(13, 9, 7, 37, bidirectional=True, lengths=True, reset=True)

    def once() -> list[Tensor]:
        d = make(p, device).to(dtype)
        outputs = fused_layer(d.x, d.weights, *d.hx, d.lengths, d.reset, 2, True)
        grads = [out.sin() for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs, list(d.leaves().values()), grads)]

    first = once()
    for _ in range(3):
        assert_equal(once(), first)


def test_saved_tensors_are_only_read(device: str) -> None:
    p = SMALL
    d = make(p, device)
    with torch.no_grad():
        y, _, _, gates, c = forward(p, d, True, False)
    x, w_ih, w_hh, _, w_hr = arguments(d)
    read = [x, *w_ih, *w_hh, *w_hr, *d.hx, d.lengths, d.reset, y, gates, c, *d.cotangents.values()]
    before = [t.clone() for t in read]
    ops.layer_backward(
        *[d.cotangents[name] for name in ("y", "h_n", "c_n")], None, x, w_ih, w_hh, w_hr, *d.hx,
        d.lengths, d.reset, 2, y, gates, c, True, True, False,
    )  # fmt: skip
    assert_equal(read, before)


def test_a_gradient_of_the_gates(emulator: Any) -> None:
    """On CPUs what the formula makes of it, without anything else; CUDA's op refuses it."""
    p = Problem(5, 3, 4, 6, bidirectional=True, P=2, lengths=True, reset=True)
    d = make(p).to(torch.float64)
    with torch.no_grad():
        y, _, _, gates, c = forward(p, d, True, False)
    x, w_ih, w_hh, _, w_hr = arguments(d)
    dgates = torch.randn_like(gates)
    run = (x, w_ih, w_hh, w_hr, *d.hx, d.lengths, d.reset, 2, y, gates, c)
    backward = (None, None, None, None, *run, True, True, False)
    with torch.no_grad():
        expected = Run(*run).gradients(None, None, None, dgates, None, True, True)
        for a, b in zip(ops.layer_backward(*backward, dgates), expected, strict=True):
            close(a, b, 1e-12)
        torch.library.opcheck(torch.ops.lstm_cuda.layer_backward.default, (*backward, dgates))
        with pytest.raises(RuntimeError, match=r"dgates must be \[5, 3, 2, 24\]; got"):
            ops.layer_backward(*backward, dgates[1:])
        with pytest.raises(RuntimeError, match="dgates must be None on CUDA"):
            torch.ops.lstm_cuda_emulated.layer_backward.default(*backward, dgates)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "reversed-features"])
def test_any_strides(layout: str, device: str) -> None:
    p = Problem(5, 4, 6, 7)
    d = make(p, device)
    x = {
        "transposed": d.x.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": torch.cat([d.x, d.x.flip(2)], 2)[..., ::2],
        "expanded": d.x[:1].expand(5, -1, -1),
        "reversed-features": d.x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    }[layout]
    rows = [[w.t().contiguous().t() if w.dim() == 2 else w for w in d.weights[0]]]
    hx = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in d.hx]
    leaves = [x, *hx, *rows[0]]
    for t in leaves:
        t.requires_grad_()
    outputs = fused_layer(x, rows, *hx, None, None, 0, True)
    expected = lstm_layer(x, rows, *hx)
    # Gradients that are not contiguous either.
    grads = [out.detach().sin().transpose(0, 1).contiguous().transpose(0, 1) for out in outputs]
    for a, b in zip(outputs, expected, strict=True):
        close(a, b)
    for a, b in zip(
        torch.autograd.grad(outputs, leaves, grads),
        torch.autograd.grad(expected, leaves, grads),
        strict=True,
    ):
        close(a, b)


def test_wrong_shapes_raise_from_the_op_too() -> None:
    d = make(Problem(3, 2, 4, 5))
    x, w_ih, w_hh, bias, w_hr = arguments(d)
    for bad in (
        (x[..., :3], w_ih, w_hh, bias, w_hr, *d.hx, None, None),
        (x, w_ih, w_hh, bias[:1], w_hr, *d.hx, None, None),
        (x, w_ih, w_hh, bias, w_hr, d.hx[0][:, :1], d.hx[1], None, None),
        (x, w_ih, w_hh, bias, w_hr, *d.hx, torch.tensor([3, 3, 3]), None),
        (x, w_ih, w_hh, bias, w_hr, *d.hx, torch.tensor([3, 4]), None),
        (x, w_ih, w_hh, bias, w_hr, *d.hx, torch.tensor([3, -1]), None),
        (x, w_ih, w_hh, bias, w_hr, *d.hx, None, torch.zeros(2, 2, dtype=torch.bool)),
        (x, w_ih, [w.float() for w in w_hh], bias, w_hr, *d.hx, None, None),
        (x, [], [], [], [], None, None, None, None),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            ops.layer_forward(*bad, 0, False, False, False)
