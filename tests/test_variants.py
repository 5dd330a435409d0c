"""Options of the cell in the fused ops: against the reference, the papers' formulas, and chance."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_equal, close
from torch import Tensor, nn
from torch.autograd import forward_ad

from lstm_cuda import FusedLSTM
from lstm_cuda.masks import zoneout_choices

SINGLE: list[dict[str, Any]] = [
    {"peephole": True},
    {"forget_gate": False},
    {"coupled": True},
    {"cell_clip": 0.3},
    {"recurrent_dropout": 0.4},
    {"zoneout": (0.3, 0.2)},
    {"zoneout": (0.3, 0.0)},
    {"zoneout": (0.0, 0.6)},
    {"weight_dropout": 0.3},
    {"layer_norm": True},
]
PAIRS: list[dict[str, Any]] = [
    {"peephole": True, "coupled": True},
    {"peephole": True, "forget_gate": False, "cell_clip": 0.4},
    {"peephole": True, "layer_norm": True},
    {"zoneout": (0.2, 0.3), "recurrent_dropout": 0.3},
    {"zoneout": (0.2, 0.3), "cell_clip": 0.2},
    {"layer_norm": True, "zoneout": 0.25, "recurrent_dropout": 0.2, "weight_dropout": 0.2},
    {"layer_norm": True, "coupled": True, "activation": "softsign"},
]
ACTIVATIONS: list[dict[str, Any]] = [
    {"activation": "relu"},
    {"activation": "softsign", "recurrent_activation": "hard_sigmoid_keras"},
    {"activation": "hard_tanh", "recurrent_activation": "hard_sigmoid_onnx"},
    {"output_activation": "identity", "activation": "sigmoid"},
]
STRUCTURES: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "num_layers": 2},
    {"bidirectional": True, "proj_size": 5},
    {"reverse": True, "bias": False},
]


def name(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items()) or "one"


def pair(
    features: int, H: int, training: bool = True, **options: Any
) -> tuple[FusedLSTM, FusedLSTM]:
    """The same module on the fused ops and on the reference, in float64."""
    fused = FusedLSTM(features, H, dtype=torch.float64, **options)
    reference = FusedLSTM(features, H, dtype=torch.float64, backend="torch", **options)
    reference.load_state_dict(fused.state_dict())
    return fused.train(training), reference.train(training)


def run(module: nn.Module, x: Tensor, hx: Any, **call: Any) -> list[Tensor]:
    """Outputs, states and cells, then the gradients of all inputs and parameters."""
    torch.manual_seed(5)
    leaves = [x.clone().requires_grad_(), *(t.clone().requires_grad_() for t in hx or ())]
    y, state, cells = module(leaves[0], tuple(leaves[1:]) or None, return_cells=True, **call)
    outputs = [y, *state, cells]
    torch.manual_seed(6)
    given = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in outputs]
    leaves += module.parameters()
    there = [k for k, t in enumerate(outputs) if t.requires_grad]  # without steps, not all
    grads = torch.autograd.grad(
        [outputs[k] for k in there], leaves, [given[k] for k in there], allow_unused=True
    )
    # A parameter that a cell does not use has no gradient or a zero one.
    return [
        *outputs,
        *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)),
    ]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=name)
@pytest.mark.parametrize("options", SINGLE + PAIRS + ACTIVATIONS, ids=name)
@pytest.mark.parametrize(("H", "B"), [(17, 3), (70, 9)])
def test_reference(
    H: int, B: int, options: dict[str, Any], structure: dict[str, Any], training: bool
) -> None:
    T = 7
    fused, reference = pair(6, H, training, **options, **structure)
    states = structure.get("num_layers", 1) * (2 if "bidirectional" in structure else 1)
    hx = (
        torch.randn(states, B, structure.get("proj_size", H), dtype=torch.float64),
        torch.randn(states, B, H, dtype=torch.float64),
    )
    x = torch.randn(T, B, 6, dtype=torch.float64)
    call = {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.2}
    for a, b in zip(run(fused, x, hx, **call), run(reference, x, hx, **call), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "sizes", [(0, 3, 4, 5), (5, 0, 4, 5), (1, 1, 1, 1), (40, 2, 3, 5)], ids=str
)
@pytest.mark.parametrize("options", [PAIRS[2], PAIRS[3], PAIRS[5]], ids=name)
def test_sizes(options: dict[str, Any], sizes: tuple[int, int, int, int]) -> None:
    T, B, features, H = sizes
    fused, reference = pair(features, H, **options)
    x = torch.randn(T, B, features, dtype=torch.float64)
    for a, b in zip(run(fused, x, None), run(reference, x, None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", SINGLE + PAIRS, ids=name)
@pytest.mark.parametrize("threads", [1, 2])
def test_in_parts_and_in_step(options: dict[str, Any], threads: int) -> None:
    """Wide layers share the steps among threads, narrow ones the batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for H, B in ((40, 8), (256, 1)):
            fused, reference = pair(16, H, **options)
            x = torch.randn(12, B, 16, dtype=torch.float64)
            for a, b in zip(run(fused, x, None), run(reference, x, None), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", SINGLE + PAIRS + ACTIVATIONS, ids=name)
def test_float32(options: dict[str, Any]) -> None:
    """No further from float64 than a few times what the reference is: norms amplify roundings."""
    fused, reference = pair(16, 40, training=False, **options)
    x = torch.randn(12, 8, 16)
    truth = run(reference, x.double(), None)
    own = run(reference.float(), x, None)
    for a, b, c in zip(run(fused.float(), x, None), own, truth, strict=True):
        assert a.dtype == torch.float32
        allowed = 4 * (b - c).norm() + 4 * torch.finfo(torch.float32).eps * c.norm()
        assert (a - c).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", SINGLE + PAIRS, ids=name)
def test_16_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    """A few roundings from the reference in float32 (in float64, torch would draw other masks)."""
    fused = FusedLSTM(16, 40, dtype=dtype, **options)
    reference = FusedLSTM(16, 40, backend="torch", **options)
    reference.load_state_dict({k: v.float() for k, v in fused.state_dict().items()})
    x = torch.randn(9, 4, 16).to(dtype)
    for k, (a, b) in enumerate(
        zip(run(fused, x, None), run(reference, x.float(), None), strict=True)
    ):
        assert a.dtype == dtype
        assert (a.float() - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm(), k


@pytest.mark.parametrize("options", SINGLE + PAIRS + ACTIVATIONS[1:], ids=name)
def test_first_and_second_derivatives(options: dict[str, Any]) -> None:
    fused = FusedLSTM(2, 3, dtype=torch.float64, **options)

    def call(x: Tensor, *weights: Tensor) -> Any:
        torch.manual_seed(3)
        named = dict(zip(dict(fused.named_parameters()), weights, strict=True))
        y, (h, c) = torch.func.functional_call(fused, named, (x,))
        return y, h, c

    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(p.detach().clone().requires_grad_() for p in fused.parameters()))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("options", [SINGLE[0], SINGLE[5], SINGLE[9]], ids=name)
def test_inputs_that_depend_on_each_other(options: dict[str, Any]) -> None:
    """A gradient with a graph counts no path from one input to another: autograd follows those."""
    fused, _ = pair(3, 4, **options)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    h = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        _, state = fused(x, (h, 2 * h))
        y, _ = fused(x, state)
        return torch.autograd.grad(
            y.sin().sum(), [h, *fused.parameters()], create_graph=create_graph
        )

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", SINGLE + PAIRS, ids=name)
def test_one_parameter_or_the_input_alone(options: dict[str, Any]) -> None:
    fused, reference = pair(3, 4, bidirectional=True, **options)
    inputs = torch.randn(5, 2, 3, dtype=torch.float64)
    for wanted in ("x", *dict(fused.named_parameters())):
        grads = []
        for module in (fused, reference):
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(key == wanted)
            x = inputs.clone().requires_grad_(wanted == "x")
            torch.manual_seed(3)
            leaf = {"x": x, **dict(module.named_parameters())}[wanted]
            y = module(x)[0].sin().sum()
            # The reference leaves out what its cell does not use.
            (grad,) = (
                torch.autograd.grad(y, leaf, allow_unused=True) if y.requires_grad else (None,)
            )
            grads.append(torch.zeros_like(leaf) if grad is None else grad)
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [SINGLE[5], PAIRS[2], PAIRS[5]], ids=name)
def test_transforms_take_the_reference(options: dict[str, Any]) -> None:
    fused, reference = pair(3, 4, **options)
    x, change = torch.randn(2, 5, 2, 3, dtype=torch.float64)

    def of(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            torch.manual_seed(2)
            y: Tensor = module(x)[0]
            return y

        return f

    for a, b in zip(
        torch.func.jvp(of(fused), (x,), (change,)),
        torch.func.jvp(of(reference), (x,), (change,)),
        strict=True,
    ):
        close(a, b)
    close(
        torch.func.grad(lambda x: of(fused)(x).sin().sum())(x),
        torch.func.grad(lambda x: of(reference)(x).sin().sum())(x),
    )


@pytest.mark.parametrize("options", [SINGLE[0], SINGLE[9], PAIRS[2]], ids=name)
def test_forward_mode_by_one_parameter(options: dict[str, Any]) -> None:
    """Whichever it is, and though no other input has a tangent."""
    fused, reference = (m.requires_grad_(False) for m in pair(3, 4, **options))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for key, w in fused.named_parameters():
        tangents = []
        for module in (fused, reference):
            with forward_ad.dual_level():
                dual = {key: forward_ad.make_dual(w.detach(), torch.ones_like(w))}
                y = torch.func.functional_call(module, dual, (x,))[0]
                tangents.append(forward_ad.unpack_dual(y).tangent)
        assert tangents[0] is not None, key
        close(tangents[0], tangents[1])


@pytest.mark.parametrize("options", [SINGLE[0], SINGLE[5], SINGLE[9], PAIRS[5]], ids=name)
def test_compiles_without_a_break(options: dict[str, Any]) -> None:
    fused = FusedLSTM(3, 4, 2, **options)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3, requires_grad=True)
    results = []
    for module in (fused, compiled):
        torch.manual_seed(4)
        y = module(x)[0]
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *fused.parameters()])])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_no_step_by_step_on_a_cpu(recwarn: pytest.WarningsRecorder) -> None:
    """The fused op runs: no warning, and one node of autograd for all steps."""
    y, _ = FusedLSTM(3, 4, peephole=True, zoneout=0.1)(torch.randn(50, 2, 3))
    assert len(recwarn) == 0
    assert type(y.grad_fn).__name__ == "_LayerBackward"


def test_zoneout_keeps_nothing_or_all() -> None:
    x, h, c = (torch.randn(*n, dtype=torch.float64) for n in ((6, 3, 4), (1, 3, 5), (1, 3, 5)))
    plain = FusedLSTM(4, 5, dtype=torch.float64)
    for training in (True, False):
        for probabilities in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
            fused = FusedLSTM(4, 5, dtype=torch.float64, zoneout=probabilities).train(training)
            y, (h_n, c_n) = fused(x, (h, c))
            if probabilities[0] == 1:
                assert_equal(h_n, h)
                assert_equal(y, h.expand(6, -1, -1))
            if probabilities[1] == 1:
                assert_equal(c_n, c)
        fused = FusedLSTM(4, 5, dtype=torch.float64, zoneout=1e-14).train(training)
        fused.load_state_dict(plain.state_dict())
        close(fused(x, (h, c))[0], plain(x, (h, c))[0])


def test_recurrent_dropout_near_one_leaves_the_input() -> None:
    fused = FusedLSTM(4, 5, dtype=torch.float64, recurrent_dropout=1.0)
    alone = FusedLSTM(4, 5, dtype=torch.float64)
    alone.load_state_dict(fused.state_dict())
    with torch.no_grad():
        alone.weight_hh_l0.zero_()
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    close(fused(x)[0], alone(x)[0])


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_choices_are_independent_and_of_their_rate(probability: float) -> None:
    shape = (50, 8, 2, 130)
    seed = torch.tensor([0x123456789ABCDEF])
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


# ---- the papers' formulas, written out one unit of time at a time -------------------------------


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
