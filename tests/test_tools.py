"""torch's tools around modules do to a FusedLSTM what they do to an nn.LSTM.

Numbers after pt are of issues at github.com/pytorch/pytorch: what went or goes wrong with nn.LSTM.
"""

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from helpers import assert_equal, close, pair
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lstm_cuda import FusedLSTM

Use = Callable[[Any, Tensor], list[Tensor]]
W = "weight_hh_l0"


class LowRank(nn.Module):
    """w + a b, of which a and b are trained."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(len(w), 2, generator=g, dtype=w.dtype).to(w.device))
        self.b = nn.Parameter(torch.randn(2, w.shape[1], generator=g, dtype=w.dtype).to(w.device))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.a @ self.b


class Scaled(nn.Module):
    calls = 0

    def forward(self, w: Tensor) -> Tensor:
        Scaled.calls += 1
        return 1.5 * w


def grads(m: nn.Module) -> list[Tensor]:
    return [p.grad for p in m.parameters() if p.grad is not None]


def backward(m: Any, x: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    y, (h_n, c_n) = m(x)
    (y.sin().sum() + h_n.sum() + c_n.square().sum()).backward()
    return [y, *grads(m)]


def train(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Use:
    def use(m: Any, x: Tensor) -> list[Tensor]:
        o = optimizer([p for p in m.parameters() if p.requires_grad], lr=0.05, **options)
        for _ in range(3):
            o.zero_grad()
            backward(m, x)
            o.step()
        return [*m.parameters(), m(x)[0]]

    return use


def then(change: Callable[[Any], Any], use: Use = backward) -> Use:
    """A change of the module, or another in its place, before it is used."""

    def changed(m: Any, x: Tensor) -> list[Tensor]:
        result = change(m)
        return use(result if isinstance(result, nn.RNNBase) else m, x)

    return changed


def lora(m: Any) -> None:
    m.requires_grad_(False)
    for name in (W, "weight_ih_l1_reverse"):
        parametrize.register_parametrization(m, name, LowRank(getattr(m, name)))


def weight_dropped(m: Any, x: Tensor) -> list[Tensor]:
    """At each call another tensor in the parameter's place, as the wrappers of AWD-LSTM do it."""
    raw = nn.Parameter(m._parameters.pop(W).detach())
    m.register_parameter(f"{W}_raw", raw)
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        setattr(m, W, nn.functional.dropout(raw, 0.5))
        found += backward(m, x)
    return found


def cached(m: Any, x: Tensor) -> list[Tensor]:
    parametrize.register_parametrization(m, W, Scaled())
    with parametrize.cached():
        return [m(x)[0], m(x)[0]]


def remove_parametrization(m: Any) -> None:
    parametrize.register_parametrization(m, W, Scaled())
    parametrize.remove_parametrizations(m, W)


def pruned(m: Any) -> None:
    prune.l1_unstructured(m, W, 0.5)
    prune.ln_structured(m, "weight_ih_l1", 0.3, n=2, dim=0)


def pruned_for_good(m: Any) -> None:
    prune.l1_unstructured(m, W, 0.5)
    prune.remove(m, W)


def averaged(m: Any, x: Tensor) -> list[Tensor]:
    average = AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    o = torch.optim.SGD(m.parameters(), lr=0.1)
    for _ in range(3):
        o.zero_grad()
        backward(m, x)
        o.step()
        average.update_parameters(m)
    return [*average.parameters(), average(x)[0]]


def called_with_others(m: Any, x: Tensor) -> list[Tensor]:
    weights = {k: (1.1 * p.detach()).requires_grad_() for k, p in m.named_parameters()}
    y = torch.func.functional_call(m, weights, (x,))[0]
    return [y, m(x)[0], *torch.autograd.grad(y.sum(), list(weights.values()))]


def stacked(m: Any, x: Tensor) -> list[Tensor]:
    weights, buffers = torch.func.stack_module_state([m, copy.deepcopy(m)])
    assert not buffers
    return [*weights.values()]


def copied_after_use(m: Any, x: Tensor) -> list[Tensor]:
    """The copy has the gradients, and what is done to the original does not reach it."""
    backward(m, x)
    other = copy.deepcopy(m)
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
    return [*grads(other), *backward(other, x)]


def tied(m: Any) -> None:
    m.weight_hh_l0_reverse = m.weight_hh_l0


def non_strict(m: Any, x: Tensor) -> list[Tensor]:
    state = {k: 2 * v for k, v in m.state_dict().items() if k != W}
    keys = m.load_state_dict({**state, "extra": x}, strict=False)
    assert keys.missing_keys == [W] and keys.unexpected_keys == ["extra"]
    return backward(m, x)


def assigned(m: Any) -> None:
    state = {k: 2 * v for k, v in m.state_dict().items()}
    m.load_state_dict(state, assign=True)
    assert m.weight_hh_l0.data_ptr() == state[W].data_ptr()


def weights_only(m: Any) -> None:
    file = io.BytesIO()
    torch.save({k: 2 * v for k, v in m.state_dict().items()}, file)
    file.seek(0)
    m.load_state_dict(torch.load(file, weights_only=True))


def hooked(m: Any, x: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    state = tuple(torch.ones(4, 3, 5, dtype=x.dtype, device=x.device) for _ in range(2))
    m.register_forward_pre_hook(lambda m, a, k: ((2 * a[0],), {"hx": state}), with_kwargs=True)
    m.register_forward_hook(lambda m, a, k, out: seen.append(k["hx"][0]), with_kwargs=True)
    m.register_forward_hook(lambda m, a, out: (3 * out[0], out[1]))
    return [*backward(m, x), *seen]


def backward_hooked(m: Any, x: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []

    def note(m: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        seen.extend([*grad_input, *grad_output])
        return tuple(2 * g for g in grad_input)

    m.register_full_backward_pre_hook(lambda m, out: seen.extend(g for g in out if g is not None))
    m.register_full_backward_hook(note)
    x = x.clone().requires_grad_()
    m(x)[0].sin().sum().backward()
    assert x.grad is not None
    return [*(g for g in seen if g is not None), x.grad, *grads(m)]


def stepped_in_backward(m: Any, x: Tensor) -> list[Tensor]:
    def step(p: Tensor) -> None:
        p.data.sub_(0.1 * p.grad)  # type: ignore[operator]
        p.grad = None

    for p in m.parameters():
        p.register_post_accumulate_grad_hook(step)
    backward(m, x)
    return backward(m, x)


def clipped(m: Any, x: Tensor) -> list[Tensor]:
    backward(m, x)
    norm = clip_grad_norm_(m.parameters(), 0.5, foreach=True)
    clip_grad_value_(m.parameters(), 0.01)
    return [norm, *grads(m)]


def as_a_vector(m: Any) -> None:
    vector = nn.utils.parameters_to_vector(m.parameters())
    nn.utils.vector_to_parameters(vector * 0.5, m.parameters())


def converted(m: Any, x: Tensor) -> list[Tensor]:
    """float() and double() that put other tensors in the place of the parameters."""
    future = torch.__future__
    found = []
    for switch in (
        future.set_swap_module_params_on_conversion,
        future.set_overwrite_module_params_on_conversion,
    ):
        switch(True)
        try:
            found += backward(m.float().double(), x)
        finally:
            switch(False)
        m.zero_grad()
    return found


def emptied(m: Any) -> Any:
    device = m.weight_hh_l0.device
    m = type(m)(3, 5, 2, bidirectional=True, dtype=torch.float64, device="meta")
    m.to_empty(device=device)
    torch.manual_seed(2)
    m.reset_parameters()
    return m


@torch.no_grad()
def initialise(m: Any) -> None:
    torch.manual_seed(2)
    m.apply(lambda m: [nn.init.normal_(p) for p in m.parameters()])


def normalised(norm: Callable[[Any, str], Any]) -> Callable[[Any], None]:
    def change(m: Any) -> None:
        torch.manual_seed(1)
        norm(m, W)
        m.eval()  # spectral_norm changes its estimate at every look in training

    return change


USES: dict[str, Use] = {
    "weight_norm-pt86457": then(normalised(nn.utils.weight_norm)),
    "spectral_norm-pt86457": then(normalised(nn.utils.spectral_norm)),
    "parametrized-weight_norm": then(normalised(parametrizations.weight_norm)),
    "parametrized-spectral_norm": then(normalised(parametrizations.spectral_norm)),
    "parametrized-orthogonal": then(normalised(parametrizations.orthogonal)),
    "lora-pt65688": then(lora, train(torch.optim.SGD)),
    "weight-drop-pt32346": weight_dropped,
    "parametrized-cached": cached,
    "parametrization-removed": then(remove_parametrization, train(torch.optim.SGD)),
    "pruned": then(pruned, train(torch.optim.SGD)),
    "pruned-for-good": then(pruned_for_good, train(torch.optim.SGD)),
    "averaged": averaged,
    "functional_call-pt90500": called_with_others,
    "stack_module_state": stacked,
    "deepcopy-after-use": copied_after_use,
    "tied": then(tied),
    "load-non-strict": non_strict,
    "load-assign": then(assigned),
    "load-weights_only": then(weights_only),
    "forward-hooks": hooked,
    "backward-hooks": backward_hooked,
    "optimizer-in-backward": stepped_in_backward,
    "clipped": clipped,
    "as-a-vector": then(as_a_vector),
    "converted": converted,
    "to_empty": then(emptied),
    "initialised": then(initialise),
    "SGD-foreach": train(torch.optim.SGD, momentum=0.9, foreach=True),
    "SGD-fused": train(torch.optim.SGD, momentum=0.9, fused=True),
    "Adam-foreach": train(torch.optim.Adam, foreach=True),
    "Adam-fused": train(torch.optim.Adam, fused=True),
    "AdamW-fused": train(torch.optim.AdamW, fused=True),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated", "ignore:RNN module weights")
@pytest.mark.parametrize("use", USES)
def test_as_with_torch(use: str, device: str) -> None:
    x = torch.randn(6, 3, 3, dtype=torch.float64, device=device)
    found = [
        USES[use](m, x)
        for m in pair(3, 5, 2, bidirectional=True, dtype=torch.float64, device=device)
    ]
    assert len(found[0]) > 0 and found[0][-1].abs().sum() > 0
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-11)  # steps of Adam are the same for gradients of any size


def test_a_weight_is_computed_once_a_call_pt65688() -> None:
    fused = FusedLSTM(3, 5, 2)
    parametrize.register_parametrization(fused, W, Scaled())
    before = Scaled.calls
    fused(torch.randn(4, 2, 3))
    assert Scaled.calls == before + 1


@pytest.mark.parametrize("strict", [True, False])
def test_a_wrong_state_dict_says_so_as_torch_does(strict: bool) -> None:
    messages = []
    for m in pair(3, 5):
        state = m.state_dict()
        state["weight_ih_l0"] = torch.zeros(20, 4)
        if strict:
            del state[W]
        with pytest.raises(RuntimeError) as raised:
            m.load_state_dict(state, strict=strict)
        messages.append(str(raised.value).replace("FusedLSTM", "LSTM"))
    assert messages[0] == messages[1]


def test_skip_init() -> None:
    """Which turns nn.LSTM away: its constructor does not name `device`."""
    fused = nn.utils.skip_init(FusedLSTM, 3, 5)
    fused.load_state_dict(pair(3, 5)[0].state_dict())
    assert torch.isfinite(fused(torch.randn(4, 2, 3))[0]).all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_dropout_repeats_with_the_seed_pt18110_pt104697(deterministic: bool, device: str) -> None:
    """Outputs and gradients, to the bit, whether or not determinism is asked for."""
    torch.use_deterministic_algorithms(deterministic)
    fused = FusedLSTM(3, 40, 3, dropout=0.5, bidirectional=True, device=device)
    x = torch.randn(9, 7, 3, device=device)
    found = []
    for _ in range(3):
        torch.manual_seed(1)
        fused.zero_grad()
        found.append(backward(fused, x))
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


def test_each_issue_that_the_readme_names_has_a_test() -> None:
    folder = Path(__file__).parent
    readme = (folder.parent / "README.md").read_text()
    table = readme.split("## What works that did not")[1].split("\n## ")[0]
    named = set(re.findall(r"#(\d+)", table))
    tested = {n for f in folder.glob("*.py") for n in re.findall(r"pt(\d+)", f.read_text())}
    assert named and sorted(named - tested) == []


def take_a_step(m: nn.Module, x: Tensor) -> None:
    """What the other process does."""
    torch.set_num_threads(1)
    backward(m, x)
    with torch.no_grad():
        for p in m.parameters():
            p -= 0.1 * p.grad


def test_another_process_trains_shared_parameters() -> None:
    """A module is an argument of a spawned process; both see the same memory."""
    fused = FusedLSTM(3, 5, 2).share_memory()
    expected = copy.deepcopy(fused)
    x = torch.randn(6, 2, 3)
    process = torch.multiprocessing.get_context("spawn").Process(
        target=take_a_step, args=(fused, x)
    )
    process.start()
    process.join(170)
    process.kill()
    assert process.exitcode == 0
    take_a_step(expected, x)
    assert_equal(list(fused.parameters()), list(expected.parameters()))
