"""heads: a recurrence in blocks is that of a dense LSTM with block-diagonal matrices."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import BOUNDS, NAMES, assert_equal, close, error
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import pack_padded_sequence

from lstm_cuda import CudaDevice, FusedLSTM, explain, fused_lstm, ops
from lstm_cuda import onnx as lstm_onnx

T, B, FEATURES, H, N = 7, 3, 5, 12, 3
STACKS: dict[str, dict[str, Any]] = {
    "L1": {},
    "L2-bi": {"num_layers": 2, "bidirectional": True},
    "L2-proj": {"num_layers": 2, "proj_size": 6},
    "bi-proj-nobias": {"bidirectional": True, "proj_size": 3, "bias": False},
    "batch_first": {"batch_first": True},
}
BACKENDS = ["auto", "torch"]
Named = dict[str, Tensor]


def module(device: str, **options: Any) -> FusedLSTM:
    sizes = {"input_size": FEATURES, "hidden_size": H, "heads": N, "dtype": torch.float64}
    return FusedLSTM(**{**sizes, "device": device, **options})


def dense(parameters: Named, heads: int = N) -> Named:
    """The parameters of the same LSTM without heads, differentiable."""

    def diagonal(w: Tensor, gates: int) -> Tensor:
        return torch.cat([torch.block_diag(*gate.chunk(heads)) for gate in w.chunk(gates)])

    return {
        name: diagonal(w, 4 if "hh" in name else 1) if name[:9] in ("weight_hh", "weight_hr") else w
        for name, w in parameters.items()
    }


def torch_lstm(m: FusedLSTM) -> nn.LSTM:
    return nn.LSTM(
        m.input_size, m.hidden_size, m.num_layers, m.bias, m.batch_first, 0.0, m.bidirectional,
        m.proj_size, device="meta",
    )  # fmt: skip


def without_heads(m: FusedLSTM, **options: Any) -> FusedLSTM:
    return FusedLSTM(
        m.input_size, m.hidden_size, m.num_layers, m.bias, m.batch_first, 0.0, m.bidirectional,
        m.proj_size, "meta", reverse=m.reverse, backend="torch", **options,
    )  # fmt: skip


def state(m: FusedLSTM, rows: int = B) -> tuple[Tensor, Tensor]:
    LD = m.num_layers * (2 if m.bidirectional else 1)
    w = m.weight_ih_l0
    h0 = torch.randn(LD, rows, m.proj_size or m.hidden_size).to(w).requires_grad_()
    return h0, torch.randn(LD, rows, m.hidden_size).to(w).requires_grad_()


def agree(m: FusedLSTM, other: nn.Module, *args: Any, **kwargs: Any) -> None:
    """What m gives, and all gradients, are those of the other with dense weights."""

    def flat(result: Any) -> list[Tensor]:
        return [result] if isinstance(result, Tensor) else [t for r in result for t in flat(r)]

    found = flat(m(*args, **kwargs))
    expected = flat(functional_call(other, dense(dict(m.named_parameters())), args, kwargs))
    leaves = [t for t in flat(args) if t.requires_grad] + list(m.parameters())
    cotangents = [torch.randn_like(t) for t in found]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    for a, b in zip(
        torch.autograd.grad(found, leaves, cotangents),
        torch.autograd.grad(expected, leaves, cotangents),
        strict=True,
    ):
        close(a, b)


def draw(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(device).requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
def test_a_dense_lstm_of_torch(options: dict[str, Any], backend: str, device: str) -> None:
    m = module(device, backend=backend, **options)
    x = draw(T, B, FEATURES, device=device)
    agree(m, torch_lstm(m), x.transpose(0, 1) if m.batch_first else x, state(m))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_projection_as_wide_as_the_gates(backend: str) -> None:
    """w_hr's rows are of the output, though there are 4H of them."""
    h, P = 3, 4 * 3 * N
    weights = [draw(P, FEATURES), draw(P, P // N), draw(P, h)]
    named = {"weight_hh_l0": weights[1], "weight_hr_l0": weights[2]}
    x = draw(T, B, FEATURES)
    y = fused_lstm(x, None, [weights], heads=N, backend=backend)[0]
    expected = fused_lstm(x, None, [[weights[0], *dense(named).values()]], backend="torch")[0]
    close(y, expected)


@pytest.mark.parametrize("options", [*STACKS.values(), {"reverse": True}], ids=[*STACKS, "reverse"])
def test_lengths_resets_and_cells(options: dict[str, Any], device: str) -> None:
    m = module(device, **options)
    x, reset = draw(T, B, FEATURES, device=device), torch.rand(T, B, device=device) < 0.3
    if m.batch_first:
        x, reset = x.transpose(0, 1), reset.t()
    given = {"lengths": [T, 0, 4], "reset": reset, "return_cells": True}
    agree(m, without_heads(m), x, state(m), **given)


@pytest.mark.parametrize("options", [{"num_layers": 2, "bidirectional": True}, {"proj_size": 6}])
def test_packed_and_unbatched_input(options: dict[str, Any]) -> None:
    m = module("cpu", **options)
    x = pack_padded_sequence(draw(T, B, FEATURES), [4, T, 1], enforce_sorted=False)
    weights = dense(dict(m.named_parameters()))
    expected, expected_state = functional_call(torch_lstm(m), weights, (x,))
    output, found_state = m(x)
    close(output.data, expected.data)
    for a, b in zip(found_state, expected_state, strict=True):
        close(a, b)
    agree(m, torch_lstm(m), draw(T, FEATURES))


def test_one_call_of_the_op_for_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no head has an input of its own."""
    m, calls, run = module("cpu", num_layers=2, bidirectional=True), [], ops._forward

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(ops, "_forward", counted)
    m(draw(T, B, FEATURES))
    assert [len(w_hh) for _, _, w_hh, *_ in calls] == [2 * N, 2 * N]
    assert [x.shape[2] for x, *_ in calls] == [FEATURES, 2 * H]


@pytest.mark.parametrize("options", [{"peephole": True}, {"zoneout": 0.2}, {"coupled": True}])
def test_options_of_the_reference(options: dict[str, Any]) -> None:
    m = module("cpu", num_layers=2, bidirectional=True, **options).eval()
    agree(m, without_heads(m, **options).eval(), draw(T, B, FEATURES), state(m))


def test_each_head_is_normalised_by_itself() -> None:
    """Head k is a module of its own, with the k-th rows of each gate."""
    m, h = module("cpu", layer_norm=True), H // N
    for p in m.parameters():
        nn.init.normal_(p)
    x = draw(T, B, FEATURES)
    output, (_, c_n) = m(x)
    for k in range(N):
        own = slice(k * h, (k + 1) * h)
        rows = torch.arange(4 * H).view(4, H)[:, own].flatten()
        named = {n: p[rows if len(p) == 4 * H else own] for n, p in m.named_parameters()}
        head = FusedLSTM(FEATURES, h, layer_norm=True, dtype=torch.float64)
        expected, (_, c) = functional_call(head, named, (x,))
        close(output[..., own], expected)
        close(c_n[..., own], c)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 3}])
def test_checkpoint_is_the_same_to_the_bit(options: dict[str, Any]) -> None:
    m, x = module("cpu", dtype=torch.float32, **options), torch.randn(T, B, FEATURES)
    again = module("cpu", dtype=torch.float32, checkpoint=3, **options)
    again.load_state_dict(m.state_dict())
    for each in (m, again):
        each(x)[0].square().sum().backward()
    assert_equal(again(x), m(x))
    assert_equal([p.grad for p in again.parameters()], [p.grad for p in m.parameters()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncate(backend: str) -> None:
    m = module("cpu", bidirectional=True, truncate=2, backend=backend)
    agree(m, without_heads(m, truncate=2), draw(T, B, FEATURES), state(m))


def test_gradcheck_of_both_orders() -> None:
    m = module("cpu", hidden_size=4, heads=2, proj_size=2, bidirectional=True)
    x = draw(3, 2, FEATURES)
    names, values = zip(*m.named_parameters(), strict=True)

    def outputs(x: Tensor, *values: Tensor) -> Any:
        y, (h_n, c_n) = functional_call(m, dict(zip(names, values, strict=True)), (x,))
        return y, h_n, c_n

    assert torch.autograd.gradcheck(outputs, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, (x, *values), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
def test_16_bits(dtype: torch.dtype, device: str) -> None:
    m = module(device, dtype=dtype, bidirectional=True)
    x = torch.randn(T, B, FEATURES).to(device, dtype).requires_grad_()
    y, (_, c_n) = m(x)
    found = [y, c_n, *torch.autograd.grad(y.sum(), [x, *m.parameters()])]
    exact, x = m.double(), x.detach().double().requires_grad_()
    y, (_, c_n) = functional_call(torch_lstm(exact), dense(dict(exact.named_parameters())), x)
    expected = [y, c_n, *torch.autograd.grad(y.sum(), [x, *exact.parameters()])]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert error(a, b) < BOUNDS[dtype][0]


def test_autocast() -> None:
    m, x = module("cpu", dtype=torch.float32), torch.randn(T, B, FEATURES)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = m(x)
    expected, _ = functional_call(torch_lstm(m), dense(dict(m.named_parameters())), x)
    assert y.dtype == torch.bfloat16
    assert error(y, expected) < BOUNDS[torch.bfloat16][0]


def test_compile() -> None:
    m, x = module("cpu", num_layers=2, bidirectional=True), draw(T, B, FEATURES)
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    expected, found = m(x)[0], compiled(x)[0]
    close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.sum(), [x, *m.parameters()]),
        torch.autograd.grad(expected.sum(), [x, *m.parameters()]),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("shared", [True, False], ids=["shared-weights", "own-weights"])
def test_vmap_of_gradients(shared: bool) -> None:
    members = [module("cpu", num_layers=2, proj_size=3) for _ in range(4)]
    weights = {k: w.detach() for k, w in stack_module_state(members)[0].items()}
    weights = {k: w[0] for k, w in weights.items()} if shared else weights
    x = torch.randn(4, T, B, FEATURES, dtype=torch.float64)

    def loss(weights: Named, x: Tensor) -> Tensor:
        return functional_call(members[0], weights, (x,))[0].square().sum()

    found = vmap(grad(loss), (None if shared else 0, 0))(weights, x)
    for k in range(4):
        mine = weights if shared else {name: w[k] for name, w in weights.items()}
        for name, g in grad(loss)(mine, x[k]).items():
            close(found[name][k], g)


def test_vmap_of_as_many_backwards_as_a_call_takes() -> None:
    """All 64 bits of ``reversed`` are set, and members must not spill over them."""
    most = ops.max_recurrences()
    m = module("cpu", hidden_size=most, heads=most, reverse=True)
    weights = {k: torch.stack([w, 2 * w]).detach() for k, w in m.named_parameters()}
    x = draw(T, B, FEATURES)
    found = vmap(lambda w: functional_call(m, w, (x,))[0])(weights)
    for k in range(2):
        mine = {name: w[k] for name, w in weights.items()}
        expected = functional_call(without_heads(m), dense(mine, most), (x,))[0]
        close(found[k], expected)


def test_parameters() -> None:
    m = module("cpu", num_layers=2, bidirectional=True, proj_size=6, dtype=torch.float32)
    lstm = nn.LSTM(FEATURES, H, 2, bidirectional=True, proj_size=6)
    assert [*m.state_dict()] == [*lstm.state_dict()]
    for name, p in lstm.named_parameters():
        own, narrow = getattr(m, name), name[:9] in ("weight_hh", "weight_hr")
        assert own.shape == ((len(p), p.shape[1] // N) if narrow else p.shape)
        assert own.requires_grad and own.is_contiguous() and own.dtype == torch.float32
    for _ in range(2):
        largest = torch.stack([p.abs().max() for p in m.parameters()])
        assert (largest <= H**-0.5).all() and (largest > 0.5 * H**-0.5).all()
        before = m.weight_hh_l0.clone()
        m.reset_parameters()
        assert not torch.equal(m.weight_hh_l0, before)
    assert all(p.is_meta for p in module("meta").parameters())


def test_copies_and_state_dicts() -> None:
    m, x = module("cpu", num_layers=2), draw(T, B, FEATURES)
    expected = m(x)[0]
    assert_equal(copy.deepcopy(m)(x)[0], expected)
    assert_equal(pickle.loads(pickle.dumps(m))(x)[0], expected)
    other = module("cpu", num_layers=2)
    other.load_state_dict(m.state_dict(), strict=True)
    assert_equal(other(x)[0], expected)
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        module("cpu", num_layers=2, heads=1).load_state_dict(m.state_dict())
    assert_equal(m.freeze()(x)[0], expected)


def test_to_and_from_torch() -> None:
    m, x = module("cpu", num_layers=2, proj_size=6), draw(T, B, FEATURES)
    m.weight_hh_l1.requires_grad_(False)
    lstm = m.to_torch(copy=True)
    assert type(lstm) is nn.LSTM
    for a, b in zip(lstm(x, state(m)), m(x, state(m)), strict=True):
        assert type(a) is type(b)
    close(lstm(x)[0], m(x)[0])
    assert not lstm.weight_hh_l1.requires_grad and lstm.weight_hh_l0.requires_grad
    with pytest.raises(ValueError, match=r"copy must be True with heads.*; got False"):
        m.to_torch()
    with pytest.raises(ValueError, match=r"heads must be 1 .* nn\.LSTM.*; got 2"):
        FusedLSTM.from_torch(lstm, heads=2)


def test_words() -> None:
    m, x = module("cpu", bidirectional=True, proj_size=6), torch.randn(T, B, FEATURES).double()
    assert "heads=3" in m.extra_repr() and "heads" not in module("cpu", heads=1).extra_repr()
    assert "layer 0: 2 x LSTM 5 -> 12 -> 6, 3 heads of 4" in explain(m, x)
    h100 = CudaDevice(architecture=90, multiprocessors=132, shared_bytes=232448)
    wide = module("cpu", hidden_size=256, heads=4, dtype=torch.bfloat16)
    assert "H padded to 64" in explain(wide, x.bfloat16(), h100)


def test_onnx_has_no_heads() -> None:
    pytest.importorskip("onnxscript", reason='needs onnxscript: pip install "lstm_cuda[onnx]"')
    pytest.importorskip("onnx", reason='needs onnx: pip install "lstm_cuda[onnx]"')
    for heads in (2, 3):  # two recurrences are not two directions
        m = module("cpu", heads=heads, dtype=torch.float32).eval()
        with pytest.raises(NotImplementedError, match="heads"):
            lstm_onnx.export(m, (torch.randn(T, B, FEATURES),))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"heads": 2.0}, TypeError, "heads must be an int; got float"),
        ({"heads": True}, TypeError, "heads must be an int; got bool"),
        ({"heads": 0}, ValueError, "heads must be at least 1; got 0"),
        ({"heads": 5}, ValueError, "heads must divide hidden_size, 12; got 5"),
        ({"heads": 3, "proj_size": 4}, ValueError, "heads must divide proj_size, 4; got 3"),
    ],
)
def test_wrong_heads(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        module("cpu", **options)


def test_too_many_heads_for_a_call() -> None:
    most = ops.max_recurrences()
    m = module("cpu", hidden_size=most, heads=most, bidirectional=True)
    x = draw(2, 1, FEATURES)
    message = f"heads times directions must be at most {most} .*; got {most} times 2"
    with pytest.raises(ValueError, match=message):
        m(x)
    assert "error: heads times directions" in explain(m, x)
    m.backend = "torch"
    assert m(x)[0].shape == (2, 1, 2 * most)


def test_wrong_heads_of_the_function() -> None:
    m, x = module("cpu"), draw(T, B, FEATURES)
    with pytest.raises(ValueError, match="heads must divide hidden_size, 12; got 5"):
        fused_lstm(x, None, m.all_weights, heads=5)
    with pytest.raises(ValueError, match=r"\(w_hh\) must be \[48, 6\] .* got \[48, 4\]"):
        fused_lstm(x, None, m.all_weights, heads=2)
    with pytest.raises(ValueError, match=r"\(w_hh\) must be \[48, 12\] .* got \[48, 4\]"):
        fused_lstm(x, None, m.all_weights)
    with pytest.raises(TypeError, match="heads must be an int; got str"):
        fused_lstm(x, None, m.all_weights, heads="3")  # type: ignore[arg-type]
