"""FusedLSTM's options beyond torch.nn.LSTM: parameters, effect, modes, warnings."""

from typing import Any

import pytest
import torch
from helpers import assert_equal, close

from lstm_cuda import FusedLSTM, reference


def test_extra_repr_shows_options_that_are_set() -> None:
    fused = FusedLSTM(
        3, 4, reverse=True, peephole=True, zoneout=0.1, cell_clip=2.0, forget_bias=1.0,
        layer_norm=True, backend="torch",
    )  # fmt: skip
    text = fused.extra_repr()
    for part in (
        "3, 4, ", "reverse=True", "peephole=True", "zoneout=(0.1, 0.1)", "cell_clip=2.0",
        "forget_bias=1.0", "layer_norm=True", "backend='torch'",
    ):  # fmt: skip
        assert part in text
    assert "coupled" not in text


def test_reverse_runs_backwards_in_time(device: str) -> None:
    fused = FusedLSTM(4, 6, 2, reverse=True, device=device, dtype=torch.float64)
    forwards = FusedLSTM(4, 6, 2, device=device, dtype=torch.float64)
    forwards.load_state_dict(fused.state_dict(), strict=True)
    x = torch.randn(5, 3, 4, device=device, dtype=torch.float64)
    y, state = fused(x)
    expected, expected_state = forwards(x.flip(0))
    close(y, expected.flip(0))
    close(state[0], expected_state[0])


def test_forget_bias_is_the_total(device: str) -> None:
    fused = FusedLSTM(4, 6, 2, bidirectional=True, forget_bias=1.5, device=device)

    def check() -> None:
        for _, _, b_ih, b_hh in fused.all_weights:
            assert ((b_ih + b_hh)[6:12] == 1.5).all()
            assert (b_ih[:6].abs() > 0).all() and (b_hh[12:].abs() > 0).all()

    check()
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    fused.reset_parameters()
    check()


def test_option_parameters() -> None:
    fused = FusedLSTM(3, 4, 2, bidirectional=True, peephole=True, layer_norm=True, backend="torch")
    shapes = {name: tuple(p.shape) for name, p in fused.named_parameters()}
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        for name in ("weight_ci", "weight_cf", "weight_co"):
            assert shapes[f"{name}_{suffix}"] == (4,)
            assert getattr(fused, f"{name}_{suffix}").abs().max() <= 0.5
        assert shapes[f"weight_ln_ih_{suffix}"] == shapes[f"weight_ln_hh_{suffix}"] == (16,)
        assert shapes[f"weight_ln_c_{suffix}"] == shapes[f"bias_ln_c_{suffix}"] == (4,)
        assert (getattr(fused, f"weight_ln_c_{suffix}") == 1).all()
        assert (getattr(fused, f"bias_ln_c_{suffix}") == 0).all()
    assert all(p.abs().sum() > 0 for name, p in fused.named_parameters() if "weight" in name)


# Numbers after pt are of the issues at github.com/pytorch/pytorch that ask for an option.
ISSUES = {
    "peephole": "pt630",
    "zoneout": "pt561",
    "layer_norm": "pt9572",
    "recurrent_dropout": "pt9572",
}


def with_issue(option: str) -> str:
    return f"{option}-{ISSUES[option]}" if option in ISSUES else option


@pytest.mark.parametrize(
    "options",
    [
        {"peephole": True},
        {"layer_norm": True},
        {"forget_gate": False},
        {"coupled": True},
        {"activation": "relu"},
        {"recurrent_activation": "hard_sigmoid_keras"},
        {"output_activation": "identity"},
        {"zoneout": 0.2},
        {"cell_clip": 0.1},
    ],
    ids=lambda o: with_issue(next(iter(o))),
)
def test_options_change_the_result_and_train(options: dict[str, Any], device: str) -> None:
    plain = FusedLSTM(3, 4, 2, device=device, backend="torch")
    fused = FusedLSTM(3, 4, 2, device=device, **options)
    fused.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(5, 2, 3, device=device)
    y, _ = fused.eval()(x)
    assert not torch.allclose(y, plain(x)[0], atol=1e-4)
    fused.train()(x)[0].sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout", "weight_dropout"], ids=with_issue)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_random_options_follow_the_mode_and_the_seed(name: str, backend: str, device: str) -> None:
    fused = FusedLSTM(3, 8, device=device, backend=backend, **{name: 0.5})
    x = torch.randn(5, 2, 3, device=device)
    torch.manual_seed(1)
    first = fused(x)[0]
    assert not torch.equal(fused(x)[0], first)
    torch.manual_seed(1)
    assert_equal(fused(x)[0], first)
    fused.eval()
    assert_equal(fused(x)[0], fused(x)[0])


@pytest.mark.parametrize("modes", [{}, {"truncate": 2}, {"checkpoint": 2}], ids=str)
def test_no_option_runs_on_the_reference(
    modes: dict[str, int], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(reference, "lstm_layer", None)
    FusedLSTM(3, 4, cell_clip=0.5, zoneout=0.1, layer_norm=True, **modes)(torch.randn(5, 2, 3))
    assert len(recwarn) == 0
