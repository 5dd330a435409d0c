"""Options of the cell against the papers' formulas, step by step, and against chance."""

from collections.abc import Callable

import pytest
import torch
from helpers import assert_equal, close
from torch import Tensor

from lstm_cuda import FusedLSTM
from lstm_cuda.masks import zoneout_choices


def by_hand(
    fused: FusedLSTM, x: Tensor, step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Outputs of a layer whose step makes h, c from the input, h and c."""
    h = c = x.new_zeros(x.shape[1], fused.hidden_size)
    outputs = []
    for x_t in x:
        h, c = step(x_t, h, c)
        outputs.append(h)
    return torch.stack(outputs)


def blocks(fused: FusedLSTM, stem: str) -> dict[str, Tensor]:
    return dict(zip("ifgo", getattr(fused, f"{stem}_l0").chunk(4), strict=True))


def sums(fused: FusedLSTM, x: Tensor, h: Tensor) -> dict[str, Tensor]:
    w, u = blocks(fused, "weight_ih"), blocks(fused, "weight_hh")
    b, v = blocks(fused, "bias_ih"), blocks(fused, "bias_hh")
    return {k: x @ w[k].T + b[k] + h @ u[k].T + v[k] for k in "ifgo"}


def test_gers_and_schmidhuber_2000() -> None:
    fused = FusedLSTM(3, 4, peephole=True, dtype=torch.float64)

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        net = sums(fused, x, h)
        y_in = torch.sigmoid(net["i"] + c * fused.weight_ci_l0)
        y_phi = torch.sigmoid(net["f"] + c * fused.weight_cf_l0)
        s = y_phi * c + y_in * net["g"].tanh()
        y_out = torch.sigmoid(net["o"] + s * fused.weight_co_l0)
        return y_out * s.tanh(), s

    x = torch.randn(6, 2, 3, dtype=torch.float64)
    close(fused(x)[0], by_hand(fused, x, step))


def test_hochreiter_and_schmidhuber_1997() -> None:
    fused = FusedLSTM(3, 4, forget_gate=False, dtype=torch.float64)

    def step(x: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        net = sums(fused, x, h)
        s = s + torch.sigmoid(net["i"]) * net["g"].tanh()  # the constant error carousel
        return torch.sigmoid(net["o"]) * s.tanh(), s

    x = torch.randn(6, 2, 3, dtype=torch.float64)
    close(fused(x)[0], by_hand(fused, x, step))


def test_greff_2017_coupled_gates() -> None:
    fused = FusedLSTM(3, 4, coupled=True, dtype=torch.float64)

    def step(x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        net = sums(fused, x, y)
        i = torch.sigmoid(net["i"])
        c = net["g"].tanh() * i + c * (1 - i)
        return c.tanh() * torch.sigmoid(net["o"]), c

    x = torch.randn(6, 2, 3, dtype=torch.float64)
    close(fused(x)[0], by_hand(fused, x, step))


def test_ba_2016_layer_norm() -> None:
    fused = FusedLSTM(3, 4, layer_norm=True, dtype=torch.float64)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.uniform_(-1, 1)

    def norm(z: Tensor, gain: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        mu = z.mean(-1, keepdim=True)
        sigma = ((z - mu) ** 2).mean(-1, keepdim=True).add(1e-5).sqrt()
        return gain * (z - mu) / sigma + shift

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        z = norm(h @ fused.weight_hh_l0.T, fused.weight_ln_hh_l0)
        z = z + norm(x @ fused.weight_ih_l0.T, fused.weight_ln_ih_l0)
        i, f, g, o = (z + fused.bias_ih_l0 + fused.bias_hh_l0).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * norm(c, fused.weight_ln_c_l0, fused.bias_ln_c_l0).tanh(), c

    x = torch.randn(6, 2, 3, dtype=torch.float64)
    close(fused(x)[0], by_hand(fused, x, step))


def test_krueger_2017_zoneout_at_evaluation() -> None:
    fused = FusedLSTM(3, 4, zoneout=(0.1, 0.4), dtype=torch.float64).eval()

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        net = sums(fused, x, h)
        new = net["f"].sigmoid() * c + net["i"].sigmoid() * net["g"].tanh()
        return 0.1 * h + 0.9 * net["o"].sigmoid() * new.tanh(), 0.4 * c + 0.6 * new

    x = torch.randn(6, 2, 3, dtype=torch.float64)
    close(fused(x)[0], by_hand(fused, x, step))


def test_gal_and_ghahramani_2016_one_mask_a_sequence() -> None:
    fused = FusedLSTM(3, 4, recurrent_dropout=0.5, dtype=torch.float64)
    torch.manual_seed(9)
    mask = torch.nn.functional.dropout(torch.ones(1, 2, 4, dtype=torch.float64), 0.5)[0]

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        net = sums(fused, x, h * mask)
        c = net["f"].sigmoid() * c + net["i"].sigmoid() * net["g"].tanh()
        return net["o"].sigmoid() * c.tanh(), c

    x = torch.randn(6, 2, 3, dtype=torch.float64)
    torch.manual_seed(9)
    close(fused(x)[0], by_hand(fused, x, step))


# ---- what is drawn ----


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_choices_are_independent_and_of_their_rate(probability: float) -> None:
    shape = (50, 8, 2, 130)
    seed = torch.tensor([0x123456789ABCDEF, 0x123456789ABCDF0])
    h, c = (zoneout_choices(seed, which, shape, probability).double() for which in (0, 1))
    count = h.numel()
    sigma = (probability * (1 - probability)) ** 0.5
    for kept in (h, c):
        assert abs(float(kept.mean()) - probability) < 5 * sigma / count**0.5
        for d, size in enumerate(shape):  # no place is drawn less or more often
            of_place = kept.mean(tuple(k for k in range(4) if k != d))
            assert (of_place - probability).abs().max() < 6 * sigma / (count / size) ** 0.5
        for d, step in ((0, 1), (1, 1), (2, 1), (3, 1), (3, 16), (3, 64)):
            a, b = kept.narrow(d, 0, shape[d] - step), kept.narrow(d, step, shape[d] - step)
            covariance = float(((a - probability) * (b - probability)).mean())
            assert abs(covariance) < 5 * sigma**2 / a.numel() ** 0.5
    assert abs(float(((h - probability) * (c - probability)).mean())) < 5 * sigma**2 / count**0.5
    other = zoneout_choices(seed + 1, 0, shape, probability).double()
    assert abs(float(((h - probability) * (other - probability)).mean())) < 5 * sigma**2 / (
        count**0.5
    )


def test_kernels_draw_the_choices_of_their_place() -> None:
    """With c kept or zero, cells tell the choices: c_0 is 1 and nothing is added to it."""
    T, B, H = 9, 3, 150
    fused = FusedLSTM(2, H, zoneout=(0.0, 0.7), dtype=torch.float64)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
        fused.bias_ih_l0[H : 2 * H] = -1e9  # f = 0: what is not kept is forgotten
    torch.manual_seed(7)
    seed = torch.randint(2**63 - 1, (1,))
    torch.manual_seed(7)
    c_0 = torch.ones(1, B, H, dtype=torch.float64)
    *_, cells = fused(
        torch.zeros(T, B, 2, dtype=torch.float64), (torch.zeros_like(c_0), c_0), return_cells=True
    )
    kept = zoneout_choices(seed, 1, (T, B, 1, H), 0.7)[:, :, 0]
    assert_equal(cells > 0.5, kept.long().cumprod(0).bool())
