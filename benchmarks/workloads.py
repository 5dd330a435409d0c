"""What is measured: nets, shapes and ways to call them, grouped."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
GROUPS = {
    "users": "real nets at the sizes they are trained or served with",
    "square": "input size = hidden size, 28 shapes from overhead-bound to large",
    "last": "training with a gradient at the last step only (classification)",
    "half": "float16 and bfloat16",
    "lengths": "lengths uniform in [T/2, T]: `lengths=` against pack, nn.LSTM, pad",
    "reset": "2 % of the steps begin a new episode: `reset=` against a loop over time",
    "stream": "one call per step with carried state, as in live audio (time of all T calls)",
    "penalty": "training on a gradient penalty (WGAN-GP), which cuDNN cannot do",
    "options": "options of the cell against the loops that people write for them",
    "option cost": "what options of the cell cost over FusedLSTM without them",
    "cost": "what `lengths=` and `reset=` cost over the same FusedLSTM call without them",
}


@dataclass(frozen=True)
class Workload:
    """One net at one size, and how it is used.

    Attributes:
        name: unique; also what `--workloads` selects.
        group: a key of GROUPS.
        variant: a key of `variants.VARIANTS`.
        modes: "inference" and "training" (forward and backward), or one of them.
        last_step_only: the loss sees only the last step's output.
        gradient_penalty: the loss is `variants.gradient_penalty`.
        dtype: overrides the `--dtype` of the run.
        quick: part of a `--quick` run.
        proj_size: size of the output if it is projected, else 0.
        options: of the cell, arguments of FusedLSTM that nn.LSTM does not have.
    """

    name: str
    group: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    variant: str = "dense"
    modes: tuple[str, ...] = ("inference", "training")
    last_step_only: bool = False
    gradient_penalty: bool = False
    dtype: str | None = None
    quick: bool = False
    proj_size: int = 0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def shape(self) -> str:
        """For example "T15 B1 96→32 bi"."""
        layers = f" L{self.num_layers}" if self.num_layers > 1 else ""
        direction = " bi" if self.bidirectional else ""
        sizes = f"{self.input_size}→{self.hidden_size}"
        sizes += f"→{self.proj_size}" if self.proj_size else ""
        return f"T{self.steps} B{self.batch} {sizes}{layers}{direction}"

    @property
    def module_arguments(self) -> dict[str, Any]:
        """Arguments of the module's constructor."""
        return {
            "input_size": self.input_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "proj_size": self.proj_size,
        }


def _users() -> list[Workload]:
    bi2: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    infer: dict[str, Any] = {"modes": ("inference",)}
    train: dict[str, Any] = {"modes": ("training",)}
    return [
        Workload("SIL Silero VAD", "users", 1, 1, 128, 128, quick=True),
        Workload("TSF darts", "users", 96, 64, 10, 25, quick=True),
        Workload("ODN oneDNN #837", "users", 15, 1, 96, 32, bidirectional=True, quick=True),
        Workload("PYA pyannote", "users", 589, 32, 60, 128, **bi2),
        Workload("HYD NeuralHydrology", "users", 365, 256, 32, 128),
        Workload("DAR DeepAR predict", "users", 1, 3200, 40, 40, num_layers=2, **infer),
        Workload("DAR DeepAR train", "users", 96, 32, 40, 40, num_layers=2, quick=True, **train),
        Workload("RL1 CleanRL PPO", "users", 128, 8, 512, 128, quick=True),
        Workload("ENC EnCodec 1 s", "users", 75, 1, 512, 512, num_layers=2, quick=True),
        Workload("ENC EnCodec 1 step", "users", 1, 1, 512, 512, num_layers=2, quick=True),
    ]


def _square() -> list[Workload]:
    # (B, H, T, layers, bidirectional, quick)
    rows = [
        (1, 32, 32, 1, False, True),
        (1, 64, 64, 1, False, False),
        (1, 128, 1, 1, False, True),
        (1, 128, 128, 1, False, True),
        (1, 256, 128, 1, False, False),
        (1, 512, 64, 1, False, False),
        (1, 1024, 16, 1, False, False),
        (8, 32, 128, 1, False, True),
        (8, 64, 128, 1, False, False),
        (8, 128, 128, 1, False, True),
        (8, 256, 128, 1, False, False),
        (8, 512, 64, 1, False, False),
        (8, 1024, 16, 1, False, False),
        (32, 64, 128, 1, False, True),
        (32, 128, 128, 1, False, False),
        (32, 256, 64, 1, False, True),
        (32, 512, 32, 1, False, False),
        (128, 64, 64, 1, False, False),
        (128, 128, 64, 1, False, False),
        (128, 256, 32, 1, False, False),
        (128, 512, 16, 1, False, False),
        (8, 128, 128, 2, False, False),
        (8, 256, 64, 2, False, False),
        (1, 128, 128, 1, True, False),
        (8, 128, 64, 1, True, True),
        (1, 32, 32, 2, True, False),
        (8, 128, 64, 2, True, False),
        (32, 256, 16, 2, True, False),
    ]
    return [
        Workload(
            f"B{batch}-H{hidden}-T{steps}" + ("-L2" if layers == 2 else "") + ("-bi" if bi else ""),
            "square",
            steps,
            batch,
            hidden,
            hidden,
            num_layers=layers,
            bidirectional=bi,
            quick=quick,
        )
        for batch, hidden, steps, layers, bi, quick in rows
    ]


def _last() -> list[Workload]:
    # At T >= 256 the backward gradients decay below the smallest normal float32.
    rows = [(8, 32, 512, True), (8, 128, 256, False), (8, 128, 512, False), (1, 64, 512, True)]
    return [
        Workload(
            f"last-B{batch}-H{hidden}-T{steps}",
            "last",
            steps,
            batch,
            hidden,
            hidden,
            modes=("training",),
            last_step_only=True,
            quick=quick,
        )
        for batch, hidden, steps, quick in rows
    ]


def _half() -> list[Workload]:
    rows = [(8, 128, 64, True), (1, 512, 32, False), (32, 256, 32, False)]
    return [
        Workload(
            f"{dtype}-B{batch}-H{hidden}-T{steps}",
            "half",
            steps,
            batch,
            hidden,
            hidden,
            dtype=dtype,
            quick=quick,
        )
        for dtype in ("float16", "bfloat16")
        for batch, hidden, steps, quick in rows
    ]


def _penalty() -> list[Workload]:
    rows = [(16, 32, 64, True), (4, 64, 128, False), (16, 128, 128, False), (8, 256, 64, False)]
    return [
        Workload(
            f"penalty-B{batch}-H{hidden}-T{steps}",
            "penalty",
            steps,
            batch,
            hidden,
            hidden,
            variant="penalty",
            modes=("training",),
            gradient_penalty=True,
            quick=quick,
        )
        for batch, hidden, steps, quick in rows
    ]


def _variants() -> list[Workload]:
    bi: dict[str, Any] = {"bidirectional": True}
    infer: dict[str, Any] = {"modes": ("inference",)}
    tac, rl1 = (150, 64, 512, 256), (128, 8, 512, 128)
    return [
        Workload("TAC Tacotron 2, lengths", "lengths", *tac, variant="lengths", **bi),
        Workload("lengths-B16-H128-T400", "lengths", 400, 16, 128, 128, variant="lengths"),
        Workload(
            "lengths-B32-H64-T128-bi",
            "lengths",
            128,
            32,
            64,
            64,
            variant="lengths",
            quick=True,
            **bi,
        ),
        Workload("RL1 CleanRL PPO, reset", "reset", *rl1, variant="reset", quick=True),
        Workload("reset-B64-H64-T128", "reset", 128, 64, 64, 64, variant="reset"),
        Workload("SIL stream", "stream", 32, 1, 128, 128, variant="stream", quick=True, **infer),
        Workload("ENC stream", "stream", 8, 1, 512, 512, 2, variant="stream", **infer),
        Workload("NMD stream", "stream", 8, 1, 640, 640, variant="stream", **infer),
        Workload("TAC lengths cost", "cost", *tac, variant="lengths cost", **bi),
        Workload(
            "lengths cost B32-H64-T128", "cost", 128, 32, 64, 64, variant="lengths cost", quick=True
        ),
        Workload("RL1 reset cost", "cost", *rl1, variant="reset cost", quick=True),
    ]


def _options() -> list[Workload]:
    options: list[dict[str, Any]] = [
        {"peephole": True},
        {"coupled": True},
        {"cell_clip": 0.5},
        {"activation": "softsign"},
        {"recurrent_activation": "hard_sigmoid_onnx"},
        {"recurrent_dropout": 0.25},
        {"zoneout": 0.1},
        {"weight_dropout": 0.5},
        {"layer_norm": True},
    ]
    # (B, H, T): about Stanza's tagger and icefall's decoder; then where calls cost most.
    rows = [(32, 200, 40), (16, 512, 64), (8, 128, 128), (1, 64, 100)]
    return [
        Workload(
            f"{name}{'' if group == 'options' else ' cost'} B{batch}-H{hidden}-T{steps}",
            group,
            steps,
            batch,
            hidden,
            hidden,
            variant="option" if group == "options" else group,
            options=each,
            quick=hidden == 128 and name in ("peephole", "layer_norm"),
        )
        for group in ("options", "option cost")
        for batch, hidden, steps in rows
        for each in options
        for name in each
    ]


WORKLOADS = (*_users(), *_square(), *_last(), *_half(), *_penalty(), *_options(), *_variants())


def select(names: Iterable[str], quick: bool) -> list[Workload]:
    """The workloads with one of these names, or in one of these groups.

    A quick run takes only some of a group; a workload called by its own name is always taken.
    """
    wanted = set(names)
    return [
        workload
        for workload in WORKLOADS
        if workload.name in wanted or (workload.group in wanted and (workload.quick or not quick))
    ]
