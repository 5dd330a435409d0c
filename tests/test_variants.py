"""Options of the cell in the fused ops, on each device, against the reference."""

from typing import Any

import pytest
import torch
import torch._dynamo
from helpers import assert_equal, close
from torch import Tensor, nn

from lstm_cuda import FusedLSTM, ops, variant

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
    features: int, H: int, device: str = "cpu", training: bool = True, **options: Any
) -> tuple[FusedLSTM, FusedLSTM]:
    """The same module on the fused ops and on the reference, in float64."""
    common = {"dtype": torch.float64, "device": device, **options}
    fused = FusedLSTM(features, H, **common)
    reference = FusedLSTM(features, H, backend="torch", **common)
    reference.load_state_dict(fused.state_dict())
    return fused.train(training), reference.train(training)


def run(module: nn.Module, x: Tensor, hx: Any, **call: Any) -> list[Tensor]:
    """Outputs, states and cells, then the gradients of all inputs and parameters."""
    torch.manual_seed(5)
    leaves = [x.clone().requires_grad_(), *(t.clone().requires_grad_() for t in hx or ())]
    y, state, cells = module(leaves[0], tuple(leaves[1:]) or None, return_cells=True, **call)
    outputs = [y, *state, cells]
    torch.manual_seed(6)
    given = [torch.randn(t.shape, dtype=torch.float64).to(t) for t in outputs]
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
    device: str, H: int, B: int, options: dict[str, Any], structure: dict[str, Any], training: bool
) -> None:
    T = 7
    fused, reference = pair(6, H, device, training, **options, **structure)
    states = structure.get("num_layers", 1) * (2 if "bidirectional" in structure else 1)
    x, *hx = (
        torch.randn(size, dtype=torch.float64, device=device)
        for size in ((T, B, 6), (states, B, structure.get("proj_size", H)), (states, B, H))
    )
    call = {
        "lengths": torch.randint(0, T + 1, (B,), device=device),
        "reset": torch.rand(T, B, device=device) < 0.2,
    }
    for a, b in zip(run(fused, x, hx, **call), run(reference, x, hx, **call), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "sizes", [(0, 3, 4, 5), (5, 0, 4, 5), (1, 1, 1, 1), (40, 2, 3, 5)], ids=str
)
@pytest.mark.parametrize("options", [PAIRS[2], PAIRS[3], PAIRS[5]], ids=name)
def test_sizes(device: str, options: dict[str, Any], sizes: tuple[int, int, int, int]) -> None:
    T, B, features, H = sizes
    fused, reference = pair(features, H, device, **options)
    x = torch.randn(T, B, features, dtype=torch.float64, device=device)
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
def test_float32(device: str, options: dict[str, Any]) -> None:
    """No further from float64 than a few times what the reference is: norms amplify roundings."""
    fused, reference = pair(16, 40, device, training=False, **options)
    x = torch.randn(12, 8, 16, device=device)
    truth = run(reference, x.double(), None)
    own = run(reference.float(), x, None)
    for a, b, c in zip(run(fused.float(), x, None), own, truth, strict=True):
        assert a.dtype == torch.float32
        allowed = 4 * (b - c).norm() + 4 * torch.finfo(torch.float32).eps * c.norm()
        assert (a - c).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", SINGLE + PAIRS, ids=name)
def test_16_bit(device: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """A few roundings from the reference in float32 (in float64, torch would draw other masks)."""
    fused = FusedLSTM(16, 40, dtype=dtype, device=device, **options)
    reference = FusedLSTM(16, 40, backend="torch", device=device, **options)
    reference.load_state_dict({k: v.float() for k, v in fused.state_dict().items()})
    x = torch.randn(9, 4, 16).to(device, dtype)
    for k, (a, b) in enumerate(
        zip(run(fused, x, None), run(reference, x.float(), None), strict=True)
    ):
        assert a.dtype == dtype
        assert (a.float() - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm(), k


@pytest.mark.parametrize("options", SINGLE + PAIRS, ids=name)
def test_one_parameter_or_the_input_alone(device: str, options: dict[str, Any]) -> None:
    fused, reference = pair(3, 4, device, bidirectional=True, **options)
    inputs = torch.randn(5, 2, 3, dtype=torch.float64, device=device)
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


SEGMENTS: list[dict[str, Any]] = [
    {"checkpoint": 3},
    {"truncate": 4},
    {"checkpoint": 2, "truncate": 4},
    {"checkpoint": 20},
]


@pytest.mark.parametrize("modes", SEGMENTS, ids=name)
@pytest.mark.parametrize("structure", STRUCTURES, ids=name)
@pytest.mark.parametrize(
    ("options", "training"),
    [(SINGLE[5], False), *((options, True) for options in (SINGLE[5], *PAIRS[2:4], PAIRS[5]))],
    ids=str,
)
def test_in_segments(
    device: str,
    options: dict[str, Any],
    structure: dict[str, Any],
    modes: dict[str, int],
    training: bool,
) -> None:
    """Masks are those of the whole sequence, and so are gradients, up to where they are to end."""
    T, B, H = 9, 4, 7
    fused, reference = pair(3, H, device, training, **options, **structure)
    fused.checkpoint, fused.truncate = modes.get("checkpoint"), modes.get("truncate")
    reference.truncate = fused.truncate
    states = structure.get("num_layers", 1) * (2 if "bidirectional" in structure else 1)
    x, *hx = (
        torch.randn(size, dtype=torch.float64, device=device)
        for size in ((T, B, 3), (states, B, structure.get("proj_size", H)), (states, B, H))
    )
    call = {
        "lengths": torch.tensor([T, 0, 4, 6], device=device),
        "reset": torch.rand(T, B, device=device) < 0.2,
    }
    for more in ({}, call):
        for state in (hx, None):
            for a, b in zip(
                run(fused, x, state, **more), run(reference, x, state, **more), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("modes", SEGMENTS[:3], ids=name)
def test_segments_keep_less_and_transform(modes: dict[str, int]) -> None:
    """Of a checkpointed sequence no gates are kept; compiled, and differentiated twice."""
    options = {**PAIRS[5], "dtype": torch.float64}
    fused = FusedLSTM(3, 4, **options, **modes)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(torch.randn(12, 2, 3, dtype=torch.float64))
    assert any(t.shape[-1:] == (16,) and t.dim() == 4 for t in kept) == ("checkpoint" not in modes)

    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (fused, compiled):
        torch.manual_seed(4)
        y = module(x)[0]
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *fused.parameters()])])
    for a, b in zip(*results, strict=True):
        close(a, b)

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        y: Tensor = fused(x)[0]
        return y

    if "truncate" not in modes:  # whose gradients are none of the outputs
        assert torch.autograd.gradcheck(call, x)
        assert torch.autograd.gradgradcheck(call, x, fast_mode=True)


def test_no_step_by_step_on_a_cpu(recwarn: pytest.WarningsRecorder) -> None:
    """The fused op runs: no warning, and one node of autograd for all steps."""
    y, _ = FusedLSTM(3, 4, peephole=True, zoneout=0.1)(torch.randn(50, 2, 3))
    assert len(recwarn) == 0
    assert type(y.grad_fn).__name__ == "_LayerBackward"


@pytest.mark.parametrize(
    ("options", "of_a_step"),
    [({"peephole": True, "zoneout": 0.1}, [""]), ({"layer_norm": True}, ["", "_row"])],
    ids=["one-launch", "rows-apart"],
)
def test_launches_of_a_step(emulated_ops: Any, options: dict[str, Any], of_a_step: Any) -> None:
    """Of rec_step, which runs what other families do not."""
    fused = FusedLSTM(3, 4, proj_size=2, **options)
    emulated_ops.take_launches()
    y, _ = fused(torch.randn(2, 2, 3))
    forward = [name for name in emulated_ops.take_launches() if "variant" in name]
    assert forward == 2 * [f"variant_forward{part}" for part in of_a_step]
    y.sum().backward()
    backward = [name for name in emulated_ops.take_launches() if "variant" in name]
    assert backward == 2 * [f"variant_backward{part}" for part in of_a_step]


# A device with few multiprocessors is given larger tiles.
@pytest.mark.parametrize("B, tile", [(20, "medium"), (40, "large")])
@pytest.mark.parametrize(
    ("options", "tf32"), [(PAIRS[0], True), (PAIRS[3], True), (PAIRS[5], False)]
)
def test_larger_tiles(
    emulated_ops: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    tf32: bool,
    B: int,
    tile: str,
) -> None:
    """In TF32, too, which rounds to ten bits; what that makes of a norm is no measure."""
    monkeypatch.setattr(variant, "tf32_allowed", lambda *_: tf32)
    device = ops.CudaDevice(90, 1, 232448)
    plan = ops.plan_cuda(3, B, 1, 5, 40, 5, torch.float32, False, tf32, device, "options")
    assert plan["tile"] == tile
    emulated_ops.set_device(90, 1, 232448)
    try:
        fused, reference = (m.float() for m in pair(5, 40, proj_size=5, **options))
        x = torch.randn(3, B, 5)
        for a, b in zip(run(fused, x, None), run(reference, x, None), strict=True):
            assert (a - b).norm() <= (5e-3 if tf32 else 5e-5) * b.norm()
    finally:
        emulated_ops.set_device(90, 132, 232448)


def test_zoneout_keeps_nothing_or_all(device: str) -> None:
    kind: Any = {"dtype": torch.float64, "device": device}
    x, h, c = (torch.randn(*n, **kind) for n in ((6, 3, 4), (1, 3, 5), (1, 3, 5)))
    plain = FusedLSTM(4, 5, **kind)
    for training in (True, False):
        for probabilities in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
            fused = FusedLSTM(4, 5, zoneout=probabilities, **kind).train(training)
            y, (h_n, c_n) = fused(x, (h, c))
            if probabilities[0] == 1:
                assert_equal(h_n, h)
                assert_equal(y, h.expand(6, -1, -1))
            if probabilities[1] == 1:
                assert_equal(c_n, c)
        fused = FusedLSTM(4, 5, zoneout=1e-14, **kind).train(training)
        fused.load_state_dict(plain.state_dict())
        close(fused(x, (h, c))[0], plain(x, (h, c))[0])


def test_recurrent_dropout_near_one_leaves_the_input(device: str) -> None:
    kind: Any = {"dtype": torch.float64, "device": device}
    fused = FusedLSTM(4, 5, recurrent_dropout=1.0, **kind)
    alone = FusedLSTM(4, 5, **kind)
    alone.load_state_dict(fused.state_dict())
    with torch.no_grad():
        alone.weight_hh_l0.zero_()
    x = torch.randn(6, 3, 4, **kind)
    close(fused(x)[0], alone(x)[0])
