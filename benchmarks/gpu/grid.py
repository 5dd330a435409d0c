"""What is measured on a GPU, the most important first: a run may be cut off anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..workloads import Workload

GROUPS = {
    "workload": "real nets at the sizes they are trained or served with",
    "square": "input size = hidden size, T = 512 (less where a call would take too long)",
    "lengths": "lengths uniform in [T/2, T]: `lengths=` against pack, nn.LSTM, pad",
    "reset": "2 % of the steps begin a new episode: `reset=` against a loop over time",
    "options": "options of the cell against the loops that people write for them",
    "option cost": "what options of the cell cost over FusedLSTM without them",
    "cost": "what `lengths=` and `reset=` cost over the same FusedLSTM call without them",
}
HIDDEN = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
BATCH = (16, 64, 1, 256, 8)  # in this order: a run that is cut off has whole columns
CORE_HIDDEN, CORE_BATCH = (64, 128, 256, 512, 1024), (16, 64)  # measured before the rest
STEPS = 512
LONGEST_MS = 60.0  # of a training call, roughly; longer ones get fewer steps


@dataclass(frozen=True)
class Precision:
    """What tensors and products are made of.

    Attributes:
        name: also in results.
        dtype: a key of `workloads.DTYPES`.
        tf32: whether torch may round float32 operands to TF32, for both sides alike.
        bounds: largest relative error, and what is granted beyond twice nn.LSTM's own; None for
            those of `check.BOUNDS`. TF32: products with 10 bits.
        rate: products a second of a large GPU, two operations each; only to choose T.
    """

    name: str
    dtype: str
    tf32: bool
    bounds: tuple[float, float] | None
    rate: float


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp16", "float16", False, None, 250e12),
        Precision("bf16", "bfloat16", False, None, 250e12),
        Precision("tf32", "float32", True, (2e-3, 1e-3), 120e12),
        Precision("fp32", "float32", False, None, 30e12),
    )
}


@dataclass(frozen=True)
class Point:
    """One workload in one precision.

    Attributes:
        rank: the smaller, the earlier.
        graph: also measure it captured in a CUDA graph.
    """

    workload: Workload
    precision: Precision
    rank: int
    graph: bool = False


def flops(workload: Workload, training: bool) -> float:
    """Operations in the products of one call; backward has twice those of forward."""
    directions = 2 if workload.bidirectional else 1
    hidden, output = workload.hidden_size, workload.proj_size or workload.hidden_size
    total, features = 0.0, workload.input_size
    for _ in range(workload.num_layers):
        weights = 4 * hidden * (features + output) + (hidden * output if workload.proj_size else 0)
        total += 2.0 * weights * directions * workload.batch * workload.steps
        features = directions * output
    return total * (3 if training else 1)


def shortened(workload: Workload, precision: Precision, longest_ms: float = LONGEST_MS) -> Workload:
    """The workload with as many steps as a training call of about this time allows, at least 16."""
    one_step = dataclasses.replace(workload, steps=1)
    launches_ms = 25e-3 * workload.num_layers  # what a step takes however small it is
    step_ms = launches_ms + flops(one_step, training=True) / precision.rate * 1e3
    steps = min(workload.steps, max(16, int(longest_ms / step_ms) // 16 * 16))
    return dataclasses.replace(workload, steps=steps)


def for_check(workload: Workload, most_flops: float = 2e11) -> Workload:
    """The workload with so few steps that float64 can follow, at least 8."""
    one_step = flops(dataclasses.replace(workload, steps=1), training=False)
    steps = min(workload.steps, max(8, int(most_flops / one_step)))
    return dataclasses.replace(workload, steps=steps)


def _workloads() -> list[tuple[Workload, tuple[str, ...]]]:
    """Real nets and their precisions, the one they are used with first."""
    bi: dict[str, Any] = {"bidirectional": True}
    infer: dict[str, Any] = {"modes": ("inference",)}
    train: dict[str, Any] = {"modes": ("training",)}
    usual, half, single = ("tf32", "fp16"), ("fp16", "bf16"), ("tf32",)

    def net(
        name: str, T: int, B: int, inputs: int, hidden: int, layers: int = 1, **options: Any
    ) -> Workload:
        return Workload(name, "workload", T, B, inputs, hidden, layers, **options)

    return [
        (net("BON bonito, one layer, serving", 1666, 96, 1024, 1024, **infer), half),
        (net("BON bonito, one layer, training", 1666, 64, 1024, 1024, **train), half),
        (net("RL4 rsl_rl", 24, 1024, 128, 256), usual),
        (net("RL1 CleanRL PPO", 128, 8, 512, 128), usual),
        (net("TAC Tacotron 2 encoder", 150, 64, 512, 256, **bi), usual),
        (net("PYA pyannote", 589, 32, 60, 128, 2, **bi), usual),
        (net("UMX open-unmix", 259, 16, 512, 256, 3, **bi), usual),
        (net("HYD NeuralHydrology", 365, 256, 32, 128), usual),
        (net("NMD NeMo decoder, B 1", 1, 1, 640, 640, **infer), ("bf16", "fp16", "tf32")),
        (net("NMD NeMo decoder, B 128", 1, 128, 640, 640, **infer), ("bf16", "fp16", "tf32")),
        (net("ENC EnCodec, 1 s, B 1", 75, 1, 512, 512, 2), usual),
        (net("ENC EnCodec, 1 s, B 64", 75, 64, 512, 512, 2), usual),
        (net("MLP RNN-T encoder, layers 1-2", 557, 128, 240, 1024, 2), half),
        (net("MLP RNN-T encoder, layers 3-5", 278, 128, 2048, 1024, 3), half),
        (net("AWD WT2, layer 1", 70, 80, 400, 1150), usual),
        (net("AWD WT2, layer 2", 70, 80, 1150, 1150), usual),
        (net("AWD WT2, layer 3", 70, 80, 1150, 400), usual),
        (net("DEM demucs, outer", 200, 320, 192, 192, 2, **bi), usual),
        (net("DEM demucs, inner", 200, 320, 384, 384, 2, **bi), usual),
        (net("FSN FullSubNet, serving", 193, 257, 32, 384, 2, **infer), usual),
        (net("FSN FullSubNet, training", 193, 4100, 32, 384, 2, **train), usual),
        (net("DAR DeepAR predict", 1, 3200, 40, 40, 2, **infer), usual),
        (net("DAR DeepAR train", 96, 32, 40, 40, 2, **train), usual),
        (net("ICE icefall LSTMP, 12 layers", 400, 32, 512, 1024, 12, proj_size=512), usual),
        (net("TSF darts", 96, 64, 10, 25), single),
        (net("NAM amp, training", 8192, 16, 1, 24, **train), single),
        (net("NAM amp, rendering", 65535, 1, 1, 24, **infer), single),  # nn.LSTM takes no more
        (net("SIL Silero VAD", 1, 1, 128, 128, **infer), single),
        (net("ODN oneDNN #837", 15, 1, 96, 32, **bi), single),
    ]


def _boundaries() -> list[tuple[Workload, tuple[str, ...]]]:
    bi: dict[str, Any] = {"bidirectional": True}
    tac, rl1 = (150, 64, 512, 256), (128, 8, 512, 128)

    def of(name: str, variant: str, sizes: tuple[int, int, int, int], **options: Any) -> Workload:
        group = "cost" if variant.endswith("cost") else variant
        return Workload(name, group, *sizes, variant=variant, **options)

    usual = ("tf32", "fp16")
    return [
        (of("TAC Tacotron 2, lengths", "lengths", tac, **bi), usual),
        (of("lengths-B64-H512-T512", "lengths", (512, 64, 512, 512)), ("fp16", "tf32")),
        (of("lengths-B16-H256-T512", "lengths", (512, 16, 256, 256)), usual),
        (of("lengths-B64-H64-T512", "lengths", (512, 64, 64, 64)), usual),
        (of("RL1 CleanRL PPO, reset", "reset", rl1), usual),
        (of("RL4 rsl_rl, reset", "reset", (24, 1024, 128, 256)), usual),
        (of("reset-B64-H64-T512", "reset", (512, 64, 64, 64)), usual),
        (of("TAC lengths cost", "lengths cost", tac, **bi), usual),
        (of("RL1 reset cost", "reset cost", rl1), usual),
        (of("RL4 reset cost", "reset cost", (24, 1024, 128, 256)), usual),
    ]


def _options() -> list[tuple[Workload, tuple[str, ...]]]:
    options: dict[str, dict[str, Any]] = {
        "peephole": {"peephole": True},
        "zoneout": {"zoneout": 0.1},
        "recurrent dropout": {"recurrent_dropout": 0.25},
        "layer norm": {"layer_norm": True},
    }
    return [
        (
            Workload(
                f"{name}{'' if variant == 'option' else ' cost'} B32-H{hidden}-T128",
                "options" if variant == "option" else variant,
                *(128, 32, hidden, hidden),
                variant=variant,
                options=each,
            ),
            ("tf32",),
        )
        for variant in ("option", "option cost")
        for hidden in (128, 512)
        for name, each in options.items()
    ]


def all_points() -> list[Point]:
    """The whole grid in order of importance.

    Real nets in the precision they are used with; boundaries; the core of the square sweep; then
    what completes each of these.
    """
    points = []
    for workload, names in (*_workloads(), *_boundaries(), *_options()):
        boundary = workload.group != "workload"
        for order, name in enumerate(names):
            rank = (1 if boundary else 0) if order == 0 else 4
            graph = workload.variant == "dense" and order == 0
            points.append(Point(workload, PRECISIONS[name], rank, graph))
    for batch in BATCH:
        for precision in PRECISIONS.values():
            for hidden in HIDDEN:
                core = hidden in CORE_HIDDEN and batch in CORE_BATCH
                workload = Workload(f"B{batch}-H{hidden}", "square", STEPS, batch, hidden, hidden)
                rank = 2 if core and precision.name != "fp32" else 3
                rank = 5 if precision.name == "fp32" and not core else rank
                points.append(
                    Point(shortened(workload, precision), precision, rank, graph=rank == 2)
                )
    return sorted(points, key=lambda point: point.rank)


def select(
    points: Iterable[Point], names: Sequence[str], precisions: Sequence[str], modes: Sequence[str]
) -> list[Point]:
    """Those of these groups or names, precisions and modes; an empty list of names means all."""
    chosen = []
    for point in points:
        workload = point.workload
        if names and workload.name not in names and workload.group not in names:
            continue
        wanted = tuple(mode for mode in workload.modes if mode in modes)
        if point.precision.name not in precisions or not wanted:
            continue
        narrowed = dataclasses.replace(workload, modes=wanted)
        chosen.append(dataclasses.replace(point, workload=narrowed))
    return chosen
