"""c_0 and c_n in the compute dtype beside x in 16 bits: nothing of c is rounded between calls."""

from typing import Any

import pytest
import torch
from helpers import BOUNDS, NAMES, Data, Problem, arguments, assert_equal, close, make
from test_ops import OUTPUTS, SMALL
from torch import Tensor

from lstm_cuda import ops
from lstm_cuda.layer import fused_layer
from lstm_cuda.reference import lstm_layer

# c0's dtype is that of c_n and of their gradients. In the compute dtype, nothing is rounded there.
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
STATES = pytest.mark.parametrize("p", [SMALL, Problem(5, 3, 4, 6, lengths=True)], ids=str)


def with_c0(layer: Any, p: Problem, d: Data, c0: Tensor, dc_n: Tensor) -> list[Tensor]:
    """y, h_n, c_n, cells; the gradients of x, h0, c0 and of the weights."""
    arguments = (d.x, d.weights, d.hx[0], c0, d.lengths, d.reset, 2 if p.bidirectional else 0)
    outputs = layer(*arguments, True) if layer is fused_layer else layer(*arguments)
    cotangents = d.cotangents | {"c_n": dc_n}
    grads = [cotangents[k].view_as(out) for k, out in zip(OUTPUTS, outputs, strict=True)]
    grads[3] = grads[3].to(outputs[3].dtype)
    leaves = [d.x, d.hx[0], c0, *(w for row in d.weights for w in row)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


@HALVES
@STATES
def test_the_dtype_of_a_cell_state_changes_nothing_else(
    p: Problem, dtype: torch.dtype, device: str
) -> None:
    d = make(p, device).to(dtype)
    c0, dc_n = d.hx[1], d.cotangents["c_n"]
    narrow = with_c0(fused_layer, p, d, c0, dc_n)
    wide = with_c0(fused_layer, p, d, c0.detach().float().requires_grad_(), dc_n.float())
    for k, (a, b) in enumerate(zip(narrow, wide, strict=True)):
        assert b.dtype == (torch.float32 if k in (2, 3, 6) else dtype)
        assert_equal(b.to(a.dtype), a)


@HALVES
@STATES
def test_a_wide_cell_state_is_not_rounded(p: Problem, dtype: torch.dtype, device: str) -> None:
    exact = make(p, device)
    d = exact.to(dtype)
    c0 = exact.hx[1].float().requires_grad_()
    dc_n = exact.cotangents["c_n"].float()
    found, expected = (with_c0(layer, p, d, c0, dc_n) for layer in (fused_layer, lstm_layer))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        close(a, b, BOUNDS[dtype][0])
    _, _, c_n, cells, _, _, dc0, *_ = found
    assert_equal(c_n[0, 0], cells[-1, 0, 0])
    assert_equal((c_n[:, -1], dc0[:, -1]), (c0[:, -1], dc_n[:, -1]))  # this row has no steps


@HALVES
@pytest.mark.parametrize("T, B", [(0, 3), (4, 0)])
def test_a_wide_cell_state_of_an_empty_sequence(
    T: int, B: int, dtype: torch.dtype, device: str
) -> None:
    p = Problem(T, B, 3, 4)
    exact = make(p, device)
    d = exact.to(dtype)
    c0, dc_n = exact.hx[1].float().requires_grad_(), exact.cotangents["c_n"].float()
    _, _, c_n, _, _, _, dc0, *_ = with_c0(fused_layer, p, d, c0, dc_n)
    assert c_n.dtype == dc0.dtype == torch.float32
    assert_equal((c_n, dc0), (c0, dc_n))


def test_double_backward_with_a_wide_cell_state(device: str) -> None:
    p = Problem(3, 2, 3, 4)
    d = make(p, device).to(torch.bfloat16)
    c0 = d.hx[1].detach().float().requires_grad_()
    second = []
    for layer in (fused_layer, lstm_layer):
        extra = (True,) if layer is fused_layer else ()
        c_n = layer(d.x, d.weights, d.hx[0], c0, None, None, 0, *extra)[2]
        (dc0,) = torch.autograd.grad(c_n.square().sum(), c0, create_graph=True)
        second += torch.autograd.grad(dc0.square().sum(), [c0, d.x])
    assert [t.dtype for t in second[:2]] == [torch.float32, torch.bfloat16]
    for a, b in zip(second[:2], second[2:], strict=True):
        close(a, b, BOUNDS[torch.bfloat16][0])


def test_a_cell_state_of_another_dtype_is_refused(device: str) -> None:
    d = make(Problem(3, 2, 4, 5), device)
    for dtype, c_dtype, message in (
        (torch.bfloat16, torch.float16, "c0 must be BFloat16 like x, or Float; got Half"),
        (torch.float32, torch.float64, "c0 must be Float like x, or Float; got Double"),
    ):
        x, w_ih, w_hh, bias, w_hr = arguments(d.to(dtype))
        h0, c0 = d.hx[0].to(dtype), d.hx[1].to(c_dtype)
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            ops.layer_forward(x, w_ih, w_hh, bias, w_hr, h0, c0, None, None, 0, False, False, False)


def test_opcheck_with_a_wide_cell_state() -> None:
    p = Problem(4, 3, 2, 3, reset=True)
    d = make(p).to(torch.bfloat16)
    x, w_ih, w_hh, bias, w_hr = (
        part.detach() if isinstance(part, Tensor) else [w.detach() for w in part]
        for part in arguments(d)
    )
    h0, c0 = d.hx[0].detach(), d.hx[1].detach().float()
    options = (None, d.reset, 0)
    args = (x, w_ih, w_hh, bias, w_hr, h0, c0, *options, True, True, False)
    torch.library.opcheck(torch.ops.lstm_cuda.layer_forward.default, args)
    y, _, c_n, gates, c = ops.layer_forward(*args)
    given = (None, None, c_n, None, x, w_ih, w_hh, w_hr, h0, c0, *options)
    backward = (*given, y, gates, c, True, True, False)
    torch.library.opcheck(torch.ops.lstm_cuda.layer_backward.default, backward)
