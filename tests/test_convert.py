"""from_torch, to_torch and convert."""

import pytest
import torch
from helpers import assert_equal
from torch import nn

from lstm_cuda import FusedLSTM, convert


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.lstm = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.ModuleDict({"rnn": nn.LSTM(12, 5), "again": nn.Linear(5, 2)})
        self.same = self.lstm

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(self.embed(tokens))
        return self.head["again"](self.head["rnn"](y)[0])


def test_convert_replaces_in_place() -> None:
    model = Tagger().eval()
    tokens = torch.randint(0, 10, (3, 7))
    expected, keys = model(tokens), list(model.state_dict())
    parameters = list(model.parameters())
    replaced = convert(model)
    assert replaced == ["lstm", "head.rnn", "same"]
    assert isinstance(model.lstm, FusedLSTM) and model.same is model.lstm
    assert not any(isinstance(m, nn.LSTM) for m in model.modules())
    assert not model.lstm.training and model.lstm.dropout == 0.1
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(tokens), expected)
    assert convert(model) == []


def test_convert_leaves_what_it_cannot_replace() -> None:
    class Own(nn.LSTM):
        pass

    model = nn.ModuleDict({"own": Own(3, 4), "normed": nn.LSTM(3, 4), "hooked": nn.LSTM(3, 4)})
    nn.utils.parametrizations.weight_norm(model["normed"], "weight_hh_l0")
    model["hooked"].register_forward_hook(lambda *_: None)
    before = dict(model.items())
    with pytest.warns(UserWarning) as caught:
        assert convert(model) == []
    assert {str(w.message).split()[2] for w in caught} == {"own", "normed", "hooked"}
    assert all(model[name] is module for name, module in before.items())


def test_convert_wants_a_model_around_the_lstm() -> None:
    with pytest.raises(TypeError, match="from_torch"):
        convert(nn.LSTM(3, 4))


@pytest.mark.parametrize("copy", [False, True], ids=["share", "copy"])
def test_from_torch_and_back(copy: bool) -> None:
    lstm = nn.LSTM(3, 4, 2, bias=False, proj_size=2, dtype=torch.float64).eval()
    lstm.weight_hh_l1.requires_grad_(False)
    fused = FusedLSTM.from_torch(lstm, copy=copy)
    back = fused.to_torch(copy=copy)
    assert type(back) is nn.LSTM and not fused.training and not back.training
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(fused(x)[0], lstm(x)[0])
    assert_equal(back(x)[0], lstm(x)[0])
    for module in (fused, back):
        for (name, p), q in zip(module.named_parameters(), lstm.parameters(), strict=True):
            assert_equal(p, q)
            assert (p is q) != copy and p.requires_grad == q.requires_grad, name
            assert (p.data_ptr() == q.data_ptr()) != copy


def test_from_torch_takes_options() -> None:
    fused = FusedLSTM.from_torch(nn.LSTM(3, 4), reverse=True, backend="torch")
    assert fused.reverse and fused.backend == "torch"
    # A forget bias is an initial value: parameters that are taken over keep theirs.
    lstm = nn.LSTM(3, 4)
    fused = FusedLSTM.from_torch(lstm, forget_bias=3.0)
    assert fused.bias_ih_l0 is lstm.bias_ih_l0 and fused.bias_ih_l0.abs().max() < 1
    # Parameters of an option that nn.LSTM does not have start as in a new module.
    fused = FusedLSTM.from_torch(lstm, peephole=True, layer_norm=True, backend="torch")
    assert not any(p.is_meta for p in fused.parameters())
    assert (fused.weight_ln_c_l0 == 1).all()
    y, _ = fused(torch.randn(5, 2, 3))
    assert torch.isfinite(y).all()


def test_from_torch_wants_an_lstm_with_parameters() -> None:
    with pytest.raises(TypeError, match=r"lstm must be a torch\.nn\.LSTM; got GRU"):
        FusedLSTM.from_torch(nn.GRU(3, 4))
    lstm = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0 is computed"):
        FusedLSTM.from_torch(lstm)


@pytest.mark.parametrize(
    "options",
    [{"reverse": True}, {"peephole": True}, {"coupled": True}],
    ids=lambda o: next(iter(o)),
)
def test_to_torch_refuses_what_torch_has_not(options: dict[str, bool]) -> None:
    fused = FusedLSTM(3, 4, backend="torch", **options)
    with pytest.raises(ValueError, match=f"no {next(iter(options))}"):
        fused.to_torch()
