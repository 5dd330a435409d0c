"""checkpoint=k and truncate=k in what torch does with a function: transforms, graphs, checks."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from helpers import Problem, assert_equal, close, make
from test_memory_modes import call_with
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from lstm_cuda import FusedLSTM, ops, piece_ops, segment_ops


@pytest.mark.parametrize(
    "modes", [{"checkpoint": 2}, {"truncate": 4}, {"checkpoint": 2, "truncate": 4}]
)
def test_backward_twice_and_of_backward(modes: dict[str, int]) -> None:
    p = Problem(7, 3, 2, 4, bidirectional=True, P=3, lengths=True, reset=True)
    d = make(p).to(torch.float64)

    def second(backend: str, **modes: int) -> list[Tensor]:
        outputs = call_with(backend=backend, **modes)(p, d)
        loss = sum((t * d.cotangents[name]).sum() for name, t in outputs.items())
        leaves = list(d.leaves().values())
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert_equal(torch.autograd.grad(loss, leaves, retain_graph=True), first)
        created = torch.autograd.grad(loss, leaves, create_graph=True)
        for a, b in zip(created, first, strict=True):
            close(a, b)
        return [*first, *torch.autograd.grad(sum(t.pow(2).sum() for t in created), leaves)]

    by_reference = {name: k for name, k in modes.items() if name != "checkpoint"}
    for a, b in zip(second("auto", **modes), second("torch", **by_reference), strict=True):
        close(a, b, 1e-11)


def test_double_backward_with_checkpoint_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    lstm = FusedLSTM(3, 4, checkpoint=2, dtype=torch.float64)
    x = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)

    def second() -> Tensor:
        (grad,) = torch.autograd.grad(lstm(x)[0].pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), x)[0]

    monkeypatch.delattr("lstm_cuda.reference.lstm_layer")
    found = second()
    lstm.checkpoint = None
    close(found, second())


def test_with_other_memory_savers() -> None:
    lstm = FusedLSTM(3, 4, 2, bidirectional=True, checkpoint=2, dtype=torch.float64)
    x = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *lstm.parameters()]
    expected = torch.autograd.grad(lstm(x)[0].pow(2).sum(), leaves)
    y = torch_checkpoint(lstm, x, use_reentrant=False)[0]
    assert_equal(torch.autograd.grad(y.pow(2).sum(), leaves), expected)
    with torch.autograd.graph.save_on_cpu():
        y = lstm(x)[0]
    assert_equal(torch.autograd.grad(y.pow(2).sum(), leaves), expected)


def test_under_torch_func_and_autocast() -> None:
    lstm = FusedLSTM(3, 4, dtype=torch.float64)
    x = torch.randn(7, 2, 3, dtype=torch.float64)

    def grad() -> Tensor:
        return torch.func.grad(lambda x: lstm(x)[0].pow(2).sum())(x)

    expected = grad()
    lstm.checkpoint = 3
    close(grad(), expected)
    with pytest.raises(NotImplementedError, match=r"torch\.func\.vmap"):
        torch.func.vmap(lambda x: lstm(x)[0])(x.expand(3, -1, -1, -1))
    lstm.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = lstm(x.float())[0]
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and lstm.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("bidirectional", [False, True])
def test_forward_mode_with_checkpoint(bidirectional: bool) -> None:
    lstm = FusedLSTM(3, 4, 2, bidirectional=bidirectional, checkpoint=3, dtype=torch.float64)
    x, change = torch.randn(2, 7, 2, 3, dtype=torch.float64)
    lengths = torch.tensor([7, 4])

    def all_of(x: Tensor) -> tuple[Tensor, ...]:
        y, state, cells = lstm(x, lengths=lengths, return_cells=True)
        return y, *state, cells

    def loss(x: Tensor) -> Tensor:
        return lstm(x)[0].pow(2).sum()

    def derivatives() -> list[Tensor]:
        jvp, grad = torch.func.jvp, torch.func.grad
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, change))).tangent
        return [
            *jvp(all_of, (x,), (change,))[1], dual, jvp(grad(loss), (x,), (change,))[1],
            grad(lambda x: jvp(loss, (x,), (change,))[1])(x),
        ]  # fmt: skip

    found = derivatives()
    lstm.checkpoint = None
    for a, b in zip(found, derivatives(), strict=True):
        close(a, b)
    lstm.truncate = 3
    with pytest.raises(NotImplementedError, match="truncate cannot go under forward-mode"):
        derivatives()


def test_each_gradient_has_storage_of_its_own() -> None:
    """Clipping scales each in place."""
    lstm = FusedLSTM(3, 4, checkpoint=2)
    lstm(torch.randn(5, 2, 3))[0].sum().backward()
    assert_equal(lstm.bias_ih_l0.grad, lstm.bias_hh_l0.grad)
    assert lstm.bias_ih_l0.grad.data_ptr() != lstm.bias_hh_l0.grad.data_ptr()


def test_one_compiled_graph_holds_for_all_lengths() -> None:
    torch._dynamo.reset()
    lstm = FusedLSTM(3, 4, bidirectional=True, checkpoint=3, truncate=6, dtype=torch.float64)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lstm, fullgraph=True, dynamic=True, backend=counter)
    graphs = 0
    for T, B in [(7, 5), (12, 6), (25, 2)]:
        x = torch.randn(T, B, 3, dtype=torch.float64, requires_grad=True)
        lengths = torch.randint(0, T + 1, (B,))
        leaves = [x, *lstm.parameters()]
        found, expected = compiled(x, lengths=lengths)[0], lstm(x, lengths=lengths)[0]
        assert_equal(found, expected)
        grads = [torch.autograd.grad(y.pow(2).sum(), leaves) for y in (found, expected)]
        assert_equal(*grads)
        graphs = graphs or len(counter.graphs)
    assert len(counter.graphs) == graphs, "recompiled for another length"
    with pytest.raises((RuntimeError, ValueError), match="lengths must be in"):
        compiled(x, lengths=torch.tensor([3, T + 1]))


@pytest.mark.parametrize("recompute", [True, False])
def test_the_ops_as_torch_checks_them(recompute: bool) -> None:
    p = Problem(5, 3, 2, 4, bidirectional=True, P=3, lengths=True, reset=True)
    d = make(p).to(torch.float32)
    rows = [[w.detach() for w in row] for row in d.weights]
    w_ih, w_hh, b_ih, b_hh, w_hr = (list(column) for column in zip(*rows, strict=True))
    h0, c0 = (t.detach() for t in d.hx)
    given = (d.x.detach(), w_ih, w_hh, [*b_ih, *b_hh], w_hr, h0, c0, d.lengths, d.reset, 2)
    checks = ("test_schema", "test_faketensor")
    if recompute:
        torch.library.opcheck(segment_ops.forward, (*given, 2, True, False), test_utils=checks)
        y, _, _, _, *kept = segment_ops.forward(*given, 2, False, False)
    else:
        y, _, _, gates, c = ops.layer_forward(*given, True, False, False)
        kept = [y, gates, c]
    backward = (torch.randn_like(y), None, None, None, *given, kept, recompute, 2, 4)
    for wanted in (True, False):
        arguments = (*backward, wanted, wanted, False)
        torch.library.opcheck(segment_ops.backward, arguments, test_utils=checks)


def test_a_piece_as_torch_checks_it() -> None:
    p = Problem(5, 3, 2, 4)
    d = make(p).to(torch.float32)
    x, (h0, c0) = d.x.detach(), [t.detach() for t in d.hx]
    weights = [[w.detach()] for w in d.weights[0][:2]]
    y, _, _, gates, c = ops.layer_forward(
        x, *weights, [], [], h0, c0, None, None, 0, True, True, False
    )
    given = (torch.randn_like(y), None, None, None, x, *weights, None, h0, c0, None, None, 0)
    carry, sums = torch.randn(1, 3, 16), piece_ops.piece_sums(x, *weights, [])
    arguments = (*given, y, gates, c, True, True, 2, 3, carry)
    op = torch.ops.lstm_cuda.piece_backward.default
    torch.library.opcheck(op, (*arguments, sums.zero_()), test_utils="test_schema")
    with pytest.raises(RuntimeError, match=rf"sums must be \[{len(sums)}\]; got \[7\]"):
        op(*arguments, sums[:7])
