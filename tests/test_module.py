"""FusedLSTM and FusedLSTMCell against torch.nn's modules."""

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from helpers import BOUNDS, NAMES, assert_equal, close, compare, error, pair
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lstm_cuda import FusedLSTM, FusedLSTMCell

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def named(
    module: nn.Module, x: Tensor, hx: Any, output: Tensor, state: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Outputs and the gradients of all leaves, for gradients that depend on the shapes alone."""
    outputs = {"y": output, "h_n": state[0], "c_n": state[1]}
    leaves = {"x": x, **dict(module.named_parameters())}
    if hx is not None:
        leaves |= {"h0": hx[0], "c0": hx[1]}
    g = torch.Generator().manual_seed(4)
    cotangents = [
        torch.randn(out.shape, generator=g, dtype=torch.float64).to(out) for out in outputs.values()
    ]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    return outputs | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def results(module: nn.Module, x: Tensor, hx: Any, packed: Tensor | None) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    hx = None if hx is None else tuple(t.detach().requires_grad_() for t in hx)
    if packed is None:
        output, state = module(x, hx)
    else:
        first = module.batch_first
        rows = pack_padded_sequence(x, packed, batch_first=first, enforce_sorted=False)
        output, state = module(rows, hx)
        output = output.data
    return named(module, x, hx, output, state)


STACKS = [
    {"num_layers": L, "bidirectional": bi, "proj_size": P}
    for L, bi, P in itertools.product([1, 2], [False, True], [0, 3])
]
STACKS += [{"bias": False}, {"num_layers": 3, "bias": False, "bidirectional": True}]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("layout", ["TBI", "BTI", "TI", "packed", "packed-BTI"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "nohx"])
@pytest.mark.parametrize("stack", STACKS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_parity(
    stack: dict[str, Any], hx: bool, layout: str, dtype: torch.dtype, device: str
) -> None:
    T, B, features, H = 5, 3, 4, 7
    batch_first = layout.endswith("BTI")
    lstm, fused = pair(features, H, batch_first=batch_first, device=device, dtype=dtype, **stack)
    truth = copy.deepcopy(lstm).double()
    lead = {"TI": (T,), "BTI": (B, T), "packed-BTI": (B, T)}.get(layout, (T, B))
    x = torch.randn(*lead, features, device=device, dtype=dtype)
    state = None
    if hx:
        LD = lstm.num_layers * (2 if lstm.bidirectional else 1)
        batch = () if layout == "TI" else (B,)
        out = lstm.proj_size or H
        state = tuple(torch.randn(LD, *batch, n, device=device, dtype=dtype) for n in (out, H))
    packed = torch.tensor([2, 5, 4]) if layout.startswith("packed") else None
    ours = results(fused, x, state, packed)
    theirs = results(lstm, x, state, packed)
    exact = results(
        truth, x.double(), None if state is None else [t.double() for t in state], packed
    )
    for name in theirs:
        assert ours[name].shape == theirs[name].shape, name
        assert ours[name].dtype == theirs[name].dtype, name
    compare(ours, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", BOUNDS, ids=NAMES.get)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "nohx"])
def test_cell_parity(dtype: torch.dtype, batched: bool, bias: bool, hx: bool, device: str) -> None:
    theirs = nn.LSTMCell(5, 9, bias, device=device, dtype=dtype)
    ours = FusedLSTMCell(5, 9, bias, device=device, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    lead = (3,) if batched else ()
    x = torch.randn(*lead, 5, device=device, dtype=dtype)
    state = None
    if hx:
        state = tuple(torch.randn(*lead, 9, device=device, dtype=dtype) for _ in range(2))

    def run(cell: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, *(state or ()))]
        h, c = cell(inputs[0], tuple(inputs[1:]) or None)
        leaves = {"x": inputs[0], **dict(cell.named_parameters())}
        leaves |= dict(zip(("h0", "c0"), inputs[1:], strict=False))
        grads = torch.autograd.grad(
            [h, c], list(leaves.values()), [torch.linspace(-1, 2, h.numel()).view_as(h).to(h)] * 2
        )
        return {"h": h, "c": c} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}

    exact = run(copy.deepcopy(theirs).double(), torch.float64)
    compare(run(ours, dtype), run(theirs, dtype), exact, dtype)
    assert ours.extra_repr() == theirs.extra_repr()


def test_lengths_equal_packing_pt2312_pt31422(device: str) -> None:
    lstm, fused = pair(4, 6, 2, bidirectional=True, device=device, dtype=torch.float64)
    x = torch.randn(7, 4, 4, device=device, dtype=torch.float64)
    lengths = torch.tensor([3, 7, 1, 5])
    rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
    packed, state = lstm(rows)
    expected, _ = pad_packed_sequence(packed)
    output, (h_n, c_n) = fused(x, lengths=lengths.to(device))
    close(output, expected)
    close(h_n, state[0])
    close(c_n, state[1])


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_output_is_packed_as_the_input(enforce_sorted: bool, device: str) -> None:
    lstm, fused = pair(4, 6, device=device, dtype=torch.float64)
    lengths = torch.tensor([7, 5, 2] if enforce_sorted else [2, 7, 5])
    x = torch.randn(7, 3, 4, device=device, dtype=torch.float64)
    rows = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    ours, _ = fused(rows)
    theirs, _ = lstm(rows)
    assert isinstance(ours, PackedSequence)
    close(ours.data, theirs.data)
    assert_equal(ours.batch_sizes, theirs.batch_sizes)
    if enforce_sorted:
        assert ours.sorted_indices is None and ours.unsorted_indices is None
    else:
        assert_equal(ours.sorted_indices, theirs.sorted_indices)
        assert_equal(ours.unsorted_indices, theirs.unsorted_indices)


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_reset_and_cells(batch_first: bool, device: str) -> None:
    _, fused = pair(4, 6, bidirectional=True, batch_first=batch_first, dtype=torch.float64)
    fused = fused.to(device)
    lengths = torch.tensor([2, 7, 5])
    x = torch.randn(7, 3, 4, device=device, dtype=torch.float64)
    reset = torch.rand(7, 3, device=device) < 0.4
    if batch_first:
        x, reset = x.transpose(0, 1), reset.t()
    y, state, cells = fused(x, lengths=lengths, reset=reset, return_cells=True)
    rows = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    packed_y, packed_state, packed_cells = fused(rows, reset=reset, return_cells=True)
    for packed, padded in ((packed_y, y), (packed_cells, cells)):
        close(pad_packed_sequence(packed, batch_first=batch_first)[0], padded)
    close(packed_state[0], state[0])
    close(packed_state[1], state[1])


def test_unbatched_is_a_batch_of_one(device: str) -> None:
    _, fused = pair(4, 6, 2, bidirectional=True, device=device, batch_first=True)
    x = torch.randn(7, 4, device=device)
    hx = tuple(torch.randn(4, 6, device=device) for _ in range(2))
    reset = torch.arange(7, device=device) == 3
    y, (h_n, c_n), cells = fused(x, hx, lengths=5, reset=reset, return_cells=True)
    batch = fused(
        x[None], tuple(t[:, None] for t in hx), lengths=[5], reset=reset[None], return_cells=True
    )
    assert_equal(
        (y, h_n, c_n, cells), (batch[0][0], batch[1][0][:, 0], batch[1][1][:, 0], batch[2][0])
    )
    for lengths in (torch.tensor(5), torch.tensor([5])):
        assert_equal(fused(x, hx, lengths=lengths, reset=reset)[0], y)


def test_eval_changes_nothing_without_dropout_and_backward_works_pt5878(device: str) -> None:
    _, fused = pair(4, 6, 2, device=device)
    x = torch.randn(5, 3, 4, device=device)
    before = results(fused, x, None, None)
    fused.eval()
    after = results(fused, x, None, None)
    for name in before:
        assert_equal(after[name], before[name])


def test_dropout_follows_the_mode(device: str) -> None:
    _, fused = pair(4, 6, 2, dropout=0.5, device=device)
    x = torch.randn(5, 3, 4, device=device)
    assert not torch.equal(fused(x)[0], fused(x)[0])
    torch.manual_seed(1)
    first = fused(x)[0]
    torch.manual_seed(1)
    assert_equal(fused(x)[0], first)
    fused.eval()
    assert_equal(fused(x)[0], fused(x)[0])


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.25},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "proj_size": 3, "bidirectional": True},
]


@pytest.mark.parametrize("kwargs", ARGUMENTS, ids=str)
def test_parameters_are_those_of_torch(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(11)
    lstm = nn.LSTM(4, 6, **kwargs)
    torch.manual_seed(11)
    fused = FusedLSTM(4, 6, **kwargs)
    theirs = lstm.state_dict()
    assert list(fused.state_dict()) == list(theirs)
    for name, value in fused.state_dict().items():
        assert_equal(value, theirs[name])  # the same seed draws the same parameters
    assert fused._all_weights == lstm._all_weights
    assert [[w.shape for w in row] for row in fused.all_weights] == [
        [w.shape for w in row] for row in lstm.all_weights
    ]
    assert fused._flat_weights_names == lstm._flat_weights_names
    assert all(a is b for a, b in zip(fused._flat_weights, fused.parameters(), strict=True))
    assert fused.extra_repr() == lstm.extra_repr()
    assert repr(fused) == repr(lstm).replace("LSTM", "FusedLSTM")
    fresh = nn.LSTM(4, 6, **kwargs)
    fresh.load_state_dict(fused.state_dict(), strict=True)
    fused.load_state_dict(nn.LSTM(4, 6, **kwargs).state_dict(), strict=True)
    fused.load_state_dict(lstm.state_dict(), strict=True, assign=True)
    assert_equal(fused.weight_hh_l0, lstm.weight_hh_l0)


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [through_pickle, through_torch_save, copy.deepcopy])
@pytest.mark.parametrize(
    "options", [{}, {"peephole": True, "zoneout": 0.1}], ids=["plain", "options"]
)
def test_copies(through: Any, options: dict[str, Any], device: str) -> None:
    fused = FusedLSTM(
        4, 6, 2, device=device, backend="torch" if options else "auto", **options
    ).eval()
    x = torch.randn(5, 3, 4, device=device)
    expected = fused(x)[0]
    copied = through(fused)
    assert_equal(copied(x)[0], expected)
    assert copied.extra_repr() == fused.extra_repr()
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert_equal(copied(x)[0], expected)


def test_to_changes_dtype() -> None:
    fused = FusedLSTM(4, 6)
    assert fused.double()(torch.randn(5, 3, 4).double())[0].dtype == torch.float64
    assert fused.to(torch.bfloat16)(torch.randn(5, 3, 4).bfloat16())[0].dtype == torch.bfloat16


def test_meta_and_to_empty() -> None:
    fused = FusedLSTM(4, 6, 2, bidirectional=True, device="meta")
    y, (h_n, c_n) = fused(torch.empty(5, 3, 4, device="meta"))
    assert y.device.type == "meta" and y.shape == (5, 3, 12)
    assert h_n.shape == c_n.shape == (4, 3, 6)
    lstm, _ = pair(4, 6, 2, bidirectional=True)
    real = fused.to_empty(device="cpu")
    real.load_state_dict(lstm.state_dict())
    x = torch.randn(5, 3, 4)
    assert error(real(x)[0], lstm(x)[0]) < 5e-6
    other = FusedLSTM(4, 6, 2, bidirectional=True, device="meta")
    other.load_state_dict(lstm.state_dict(), assign=True)
    assert_equal(other(x)[0], real(x)[0])


def test_flatten_parameters_is_silent_pt86457(
    device: str, recwarn: pytest.WarningsRecorder
) -> None:
    fused = FusedLSTM(4, 6, device=device)
    before = [p.data_ptr() for p in fused.parameters()]
    assert fused.flatten_parameters() is None
    assert before == [p.data_ptr() for p in fused.parameters()]
    nn.utils.parametrizations.weight_norm(fused, "weight_hh_l0")
    fused.flatten_parameters()
    fused(torch.randn(5, 3, 4, device=device))
    assert not recwarn


def test_share_memory() -> None:
    fused = FusedLSTM(4, 6).share_memory()
    assert all(p.is_shared() for p in fused.parameters())
    assert fused(torch.randn(5, 3, 4))[0].shape == (5, 3, 6)


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def test_weights_are_read_at_the_call(device: str) -> None:
    """However a weight comes to be: .data writes, assignment, parametrization, functional_call."""
    lstm, fused = pair(4, 6, device=device, dtype=torch.float64)
    x = torch.randn(5, 3, 4, device=device, dtype=torch.float64)

    def expected(scale: float) -> Tensor:
        weight = lstm.weight_hh_l0.detach() * scale
        return torch.func.functional_call(lstm, {"weight_hh_l0": weight}, (x,))[0]

    w = fused.weight_hh_l0
    close(torch.func.functional_call(fused, {"weight_hh_l0": w * 3}, (x,))[0], expected(3))
    close(fused(x)[0], expected(1))
    w.data.mul_(0.5)
    close(fused(x)[0], expected(0.5))
    fused.weight_hh_l0 = nn.Parameter(w.detach() * 8)
    close(fused(x)[0], expected(4))
    parametrize.register_parametrization(fused, "weight_hh_l0", Doubled())
    y = fused(x)[0]
    close(y, expected(8))
    (grad,) = torch.autograd.grad(y.sum(), fused.parametrizations.weight_hh_l0.original)
    assert grad.abs().sum() > 0
    parametrize.remove_parametrizations(fused, "weight_hh_l0")
    close(fused(x)[0], expected(8))


def test_weight_norm(device: str) -> None:
    lstm, fused = pair(4, 6, device=device, dtype=torch.float64)
    x = torch.randn(5, 3, 4, device=device, dtype=torch.float64)
    for module in (lstm, fused):
        nn.utils.parametrizations.weight_norm(module, "weight_ih_l0")
    close(fused(x)[0], lstm(x)[0])
    with torch.no_grad():
        for module in (lstm, fused):
            module.parametrizations.weight_ih_l0.original0.mul_(1.5)
    close(fused(x)[0], lstm(x)[0])
