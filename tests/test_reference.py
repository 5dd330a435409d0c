"""The specification against torch.nn.LSTM and against each option's formula, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import Data, Problem, close, gradients, make, torch_lstm, truth
from torch import Tensor

from lstm_cuda.reference import ACTIVATIONS, Cell, lstm_layer

State = tuple[Tensor, Tensor]

STACKS = [
    Problem(5, 3, 4, 6),
    Problem(1, 1, 1, 1),
    Problem(7, 2, 3, 5, L=2, bidirectional=True),
    Problem(4, 3, 2, 5, L=3, P=3),
    Problem(6, 2, 5, 7, bidirectional=True, P=2, bias=False),
    Problem(3, 4, 2, 9, bias=False, hx=False),
]


@pytest.mark.parametrize("p", STACKS, ids=str)
def test_agrees_with_torch(p: Problem) -> None:
    ours, theirs = make(p).to(torch.float64), make(p).to(torch.float64)
    a, b = truth(p, ours), torch_lstm(p, theirs)
    for name in b:
        close(a[name], b[name])
    a, b = gradients(a, ours, "y h_n c_n"), gradients(b, theirs, "y h_n c_n")
    for name in b:
        close(a[name], b[name])


def layer_problem(T: int = 6, B: int = 3, **options: object) -> tuple[Data, int]:
    p = Problem(T, B, 3, 4, **options)  # type: ignore[arg-type]
    return make(p), 2 if p.bidirectional else int(p.reverse)


def test_cells_are_the_states_of_each_step() -> None:
    d, _ = layer_problem()
    _, _, c_n, cells = lstm_layer(d.x, d.weights, *d.hx)
    for t in range(6):
        _, _, c_t, _ = lstm_layer(d.x[: t + 1], d.weights, *d.hx)
        close(cells[t, :, 0], c_t[0])
    close(cells[-1, :, 0], c_n[0])


@pytest.mark.parametrize("bits", [0, 1, 2, 3])
def test_lengths_run_each_row_alone(bits: int) -> None:
    d, _ = layer_problem(B=5, bidirectional=True)
    lengths = torch.tensor([6, 0, 1, 4, 5])
    y, h_n, c_n, cells = lstm_layer(d.x, d.weights, *d.hx, lengths=lengths, reversed=bits)
    for b, n in enumerate(lengths.tolist()):
        row = slice(b, b + 1)
        alone = lstm_layer(d.x[:n, row], d.weights, d.hx[0][:, row], d.hx[1][:, row], reversed=bits)
        for out, expected in zip(
            (y[:n, row], h_n[:, row], c_n[:, row], cells[:n, row]), alone, strict=True
        ):
            close(out, expected)
        assert (y[n:, b] == 0).all() and (cells[n:, b] == 0).all()


@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
def test_reset_splits_the_sequence(reverse: bool) -> None:
    d, bits = layer_problem(T=7, B=1, reverse=reverse)
    reset = torch.zeros(7, 1, dtype=torch.bool)
    reset[3] = True
    y, h_n, _, _ = lstm_layer(d.x, d.weights, *d.hx, reset=reset, reversed=bits)
    first, last = (None, None), d.hx
    if not reverse:
        first, last = last, first
    y0, h0, _, _ = lstm_layer(d.x[:3], d.weights, *first, reversed=bits)
    y1, h1, _, _ = lstm_layer(d.x[3:], d.weights, *last, reversed=bits)
    close(y, torch.cat([y0, y1]))
    close(h_n, h0 if reverse else h1)


def test_reset_past_a_length_does_nothing() -> None:
    d, _ = layer_problem(bidirectional=True)
    lengths = torch.tensor([4, 0, 6])
    reset = torch.zeros(6, 3, dtype=torch.bool)
    expected = lstm_layer(d.x, d.weights, *d.hx, lengths=lengths, reversed=2)
    reset[4:, 0] = True
    reset[:, 1] = True
    found = lstm_layer(d.x, d.weights, *d.hx, lengths=lengths, reset=reset, reversed=2)
    for a, b in zip(found, expected, strict=True):
        close(a, b)


def steps(d: Data, change: Callable[..., State]) -> Tensor:
    """h of each step of a plain cell whose pre-activations and states a function may change."""
    (w_ih, w_hh, b_ih, b_hh), (h, c) = d.weights[0], (d.hx[0][0], d.hx[1][0])
    hs = []
    for x_t in d.x:
        h, c = change(F.linear(x_t, w_ih), F.linear(h, w_hh), b_ih + b_hh, h, c)
        hs.append(h)
    return torch.stack(hs)


def test_peephole() -> None:
    d, _ = layer_problem()
    ci, cf, co = torch.randn(3, 4, dtype=torch.float64)

    def change(zx: Tensor, zh: Tensor, b: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, g, o = (zx + zh + b).chunk(4, 1)
        c_t = torch.sigmoid(f + cf * c) * c + torch.sigmoid(i + ci * c) * torch.tanh(g)
        return torch.sigmoid(o + co * c_t) * torch.tanh(c_t), c_t

    close(lstm_layer(d.x, d.weights, *d.hx, peephole=[[ci, cf, co]])[0], steps(d, change))


def test_layer_norm() -> None:
    d, _ = layer_problem()
    gain_x, gain_h = torch.randn(2, 16, dtype=torch.float64)
    gain_c, shift_c = torch.randn(2, 4, dtype=torch.float64)

    def norm(z: Tensor, gain: Tensor) -> Tensor:
        z = z - z.mean(1, keepdim=True)
        return gain * z / (z.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()

    def change(zx: Tensor, zh: Tensor, b: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, g, o = (norm(zx, gain_x) + norm(zh, gain_h) + b).chunk(4, 1)
        c_t = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(norm(c_t, gain_c) + shift_c), c_t

    rows = [[gain_x, gain_h, gain_c, shift_c]]
    close(lstm_layer(d.x, d.weights, *d.hx, layer_norm=rows)[0], steps(d, change))
    shift_c.zero_()
    rows = [[gain_x, gain_h, gain_c]]
    close(lstm_layer(d.x, d.weights, *d.hx, layer_norm=rows)[0], steps(d, change))


@pytest.mark.parametrize("kind", ["forget_gate", "coupled", "cell_clip"])
def test_cell_formula(kind: str) -> None:
    d, _ = layer_problem()
    cells = {
        "forget_gate": Cell(forget_gate=False),
        "coupled": Cell(coupled=True),
        "cell_clip": Cell(cell_clip=0.2),
    }

    def change(zx: Tensor, zh: Tensor, b: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, g, o = (zx + zh + b).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        f = {"forget_gate": torch.ones_like(f), "coupled": 1 - i, "cell_clip": f}[kind]
        c_t = f * c + i * g
        if kind == "cell_clip":
            c_t = c_t.clamp(-0.2, 0.2)
        return o * c_t.tanh(), c_t

    close(lstm_layer(d.x, d.weights, *d.hx, cell=cells[kind])[0], steps(d, change))


ACTIVATION_FORMULAS = {
    "tanh": math.tanh,
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "relu": lambda z: max(z, 0.0),
    "hard_sigmoid_keras": lambda z: min(max(z / 6 + 0.5, 0.0), 1.0),
    "hard_sigmoid_onnx": lambda z: min(max(0.2 * z + 0.5, 0.0), 1.0),
    "hard_tanh": lambda z: min(max(z, -1.0), 1.0),
    "softsign": lambda z: z / (1 + abs(z)),
    "identity": lambda z: z,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_formula(name: str) -> None:
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    expected = torch.tensor([ACTIVATION_FORMULAS[name](v) for v in z.tolist()], dtype=torch.float64)
    close(ACTIVATIONS[name](z), expected)


@pytest.mark.parametrize("where", ["activation", "recurrent_activation", "output_activation"])
def test_activation_is_used_where_it_says(where: str) -> None:
    d, _ = layer_problem()

    def change(zx: Tensor, zh: Tensor, b: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, g, o = (zx + zh + b).chunk(4, 1)
        gate = F.softsign if where == "recurrent_activation" else torch.sigmoid
        candidate = F.softsign if where == "activation" else torch.tanh
        # None for the output is the same as for the candidate.
        shown = torch.tanh if where == "recurrent_activation" else F.softsign
        c_t = gate(f) * c + gate(i) * candidate(g)
        return gate(o) * shown(c_t), c_t

    close(lstm_layer(d.x, d.weights, *d.hx, cell=Cell(**{where: "softsign"}))[0], steps(d, change))


def test_zoneout_at_evaluation_is_the_expectation() -> None:
    d, _ = layer_problem()

    def change(zx: Tensor, zh: Tensor, b: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, g, o = (zx + zh + b).chunk(4, 1)
        c_t = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h_t = o.sigmoid() * c_t.tanh()
        return 0.3 * h + 0.7 * h_t, 0.1 * c + 0.9 * c_t

    close(lstm_layer(d.x, d.weights, *d.hx, cell=Cell(zoneout=(0.3, 0.1)))[0], steps(d, change))


def test_zoneout_in_training_keeps_about_that_share() -> None:
    d, _ = layer_problem(T=40, B=50)
    cell = Cell(zoneout=(0.25, 0.0))
    y, _, _, _ = lstm_layer(d.x, d.weights, *d.hx, cell=cell, training=True)
    before = torch.cat([d.hx[0], y[:-1]])
    assert abs((y == before).double().mean().item() - 0.25) < 0.03


def test_recurrent_dropout_has_one_mask_a_sequence() -> None:
    d, _ = layer_problem()
    torch.manual_seed(3)
    y, _, _, _ = lstm_layer(d.x, d.weights, *d.hx, cell=Cell(recurrent_dropout=0.5), training=True)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones(3, 4, dtype=torch.float64), 0.5)
    assert 0 < (mask == 0).sum() < mask.numel()
    w_hh = d.weights[0][1]

    def change(zx: Tensor, zh: Tensor, b: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, g, o = (zx + F.linear(h * mask, w_hh) + b).chunk(4, 1)
        c_t = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c_t.tanh(), c_t

    close(y, steps(d, change))


def test_weight_dropout_masks_w_hh() -> None:
    d, _ = layer_problem()
    torch.manual_seed(3)
    y, _, _, _ = lstm_layer(d.x, d.weights, *d.hx, cell=Cell(weight_dropout=0.5), training=True)
    torch.manual_seed(3)
    w_ih, w_hh, *bias = d.weights[0]
    masked = F.dropout(w_hh, 0.5)
    assert 0 < (masked == 0).sum() < masked.numel()
    close(y, lstm_layer(d.x, [[w_ih, masked, *bias]], *d.hx)[0])


def test_random_options_are_off_outside_training() -> None:
    d, _ = layer_problem()
    cell = Cell(recurrent_dropout=0.5, weight_dropout=0.5)
    close(
        lstm_layer(d.x, d.weights, *d.hx, cell=cell)[0], lstm_layer(d.x, d.weights, *d.hx)[0], 0.0
    )


OPTIONS = {
    "plain": Cell(),
    "forget_gate": Cell(forget_gate=False),
    "coupled": Cell(coupled=True),
    "activations": Cell(activation="softsign", recurrent_activation="tanh"),
    "dropouts": Cell(recurrent_dropout=0.4, weight_dropout=0.4),
    "zoneout": Cell(zoneout=(0.3, 0.2)),
    "cell_clip": Cell(cell_clip=0.7),
}


@pytest.mark.parametrize("option", [*OPTIONS, "peephole", "layer_norm"])
def test_gradcheck(option: str) -> None:
    p = Problem(3, 2, 2, 3, bidirectional=True, P=2, lengths=True, reset=True)
    d = make(p)
    extra: list[list[Tensor]] = []
    if option == "peephole":
        extra = [[torch.randn(3, dtype=torch.float64) for _ in range(3)] for _ in range(2)]
    if option == "layer_norm":
        extra = [[torch.randn(n, dtype=torch.float64) for n in (12, 12, 3, 3)] for _ in range(2)]
    rows = [*d.weights, *extra]
    flat = [w.requires_grad_() for row in rows for w in row]
    sizes = [len(row) for row in rows]

    def f(x: Tensor, h0: Tensor, c0: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)  # the same masks in each evaluation
        rows = [list(part) for part in _split(flat, sizes)]
        return lstm_layer(
            x, rows[:2], h0, c0, d.lengths, d.reset, 2, OPTIONS.get(option, Cell()),
            rows[2:] if option == "peephole" else None,
            rows[2:] if option == "layer_norm" else None,
            training=True,
        )  # fmt: skip

    inputs = [t.requires_grad_() for t in (d.x, *d.hx)]
    assert torch.autograd.gradcheck(f, [*inputs, *flat], fast_mode=True)


def _split(flat: tuple[Tensor, ...], sizes: list[int]) -> list[tuple[Tensor, ...]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(flat[start : start + size])
        start += size
    return parts


def test_sixteen_bits_compute_in_float32() -> None:
    d, _ = layer_problem()
    low = d.to(torch.bfloat16)
    y, h_n, _, cells = lstm_layer(low.x, low.weights, *low.hx)
    assert (y.dtype, h_n.dtype, cells.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    high = low.to(torch.float32)
    expected = lstm_layer(high.x, high.weights, *high.hx)
    close(cells, expected[3], 0.0)
    close(y, expected[0].bfloat16(), 0.0)
