"""Times of one step of the kernels with resident weights: what plan_cuda's model estimates.

    python -m benchmarks.gpu.step_times --out FOLDER [--print]

Calls of two lengths are timed, each without its input product; a step is their difference. Every
compiled number of batch rows and turns is forced, and the batch is as large as the device runs at
once. Where weights are packed before the first step forward, that is timed alone, too. At the end,
or with --print from what is in FOLDER, come the rows for kMeasured in csrc/cuda/plan_model.h.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lstm_cuda import FusedLSTM, force_kernel, ops

from ..environment import CudaEnvironment
from ..results import ResultsFile
from ..timing import Call
from ..workloads import DTYPES
from .device import Cuda, Device, NoDevice, allowed
from .grid import PRECISIONS, Precision
from .measure import describe
from .records import STEP_TIMES, Record, read_records

HIDDEN = (32, 64, 128, 256, 384, 512, 768, 1024, 2048)  # one for each compiled size
COLUMNS_AND_TURNS = ((8, 1), (16, 1), (16, 2), (32, 1), (32, 2))
FAMILIES = ("rec_cta", "rec_cluster", "rec_group")
STEPS = (128, 640)
HEAD_START = 10**7  # cycles of the device that the host has to put calls into its queue
FEATURES = 8  # few: the input product is not what is measured


class QueuedClock:
    """Times calls that wait in the device's queue: what the host takes for them is not seen."""

    def mean_ms(self, call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats


@dataclass(frozen=True)
class Subject:
    """One kernel: a family, a compiled size, a number of columns and turns, a direction."""

    family: str
    precision: Precision
    hidden: int
    columns: int
    turns: int
    batch: int
    backward: bool
    arithmetic: str


def subjects(device: ops.CudaDevice) -> Iterator[Subject]:
    """Every kernel that this device can run."""
    for family, precision, hidden, (columns, turns), backward in itertools.product(
        FAMILIES, PRECISIONS.values(), HIDDEN, COLUMNS_AND_TURNS, (False, True)
    ):
        if family == "rec_cta" and (columns, turns) != (8, 1):
            continue
        sizes = (STEPS[1], columns, 1, FEATURES, hidden, hidden)
        dtype = DTYPES[precision.dtype]
        with forced_kernel(family, columns, turns):
            found: dict[str, Any] = ops.plan_cuda(*sizes, dtype, backward, precision.tf32, device)
        if not found["possible"] or found["padded_hidden"] != hidden:
            continue
        at_once = device.multiprocessors // found.get("blocks", 1)
        if family == "rec_cluster":  # processors come in groups that clusters do not fill
            at_once = max(1, at_once * 7 // 8)
        yield Subject(
            family, precision, hidden, columns, turns, columns * at_once, backward,
            found["arithmetic"],
        )  # fmt: skip


def forced_kernel(family: str, columns: int, turns: int) -> AbstractContextManager[None]:
    """rec_cta has 8 columns and one turn; others have to be told."""
    return force_kernel(family) if family == "rec_cta" else force_kernel(family, columns, turns)


def calls(subject: Subject, steps: int, device: torch.device) -> tuple[Call, Call]:
    """The whole pass, and the product of inputs that is a part of it."""
    dtype = DTYPES[subject.precision.dtype]
    lstm = FusedLSTM(FEATURES, subject.hidden, device=device, dtype=dtype)
    for parameter in lstm.parameters():  # gradients of weights are large products of their own
        parameter.requires_grad_(False)
    x = torch.randn(steps, subject.batch, FEATURES, device=device, dtype=dtype, requires_grad=True)
    rows, weights = x.detach().reshape(-1, FEATURES), dict(lstm.named_parameters())
    w_ih, bias = weights["weight_ih_l0"], weights["bias_ih_l0"]
    if not subject.backward:
        return lambda: lstm(x), lambda: linear(rows, w_ih, bias)
    y, _ = lstm(x)
    dy = torch.randn_like(y)
    gradients = linear(rows, w_ih)
    return (
        lambda: torch.autograd.grad(y, x, dy, retain_graph=True),
        lambda: torch.mm(gradients, w_ih),
    )


def step_us(subject: Subject, device: Device, samples: int = 7) -> list[float]:
    """Times of one step."""

    def times_ms(call: Call) -> list[float]:
        device.clock.mean_ms(call, 3)
        return [device.clock.mean_ms(call, 3) for _ in range(samples)]

    recurrence_ms = []
    for steps in STEPS:
        whole, product = calls(subject, steps, device.torch_device)
        pairs = zip(times_ms(whole), times_ms(product), strict=True)
        recurrence_ms.append([ms - product_ms for ms, product_ms in pairs])
        del whole, product
        device.clean()
    short, long = recurrence_ms
    between = STEPS[1] - STEPS[0]
    return [(b - a) * 1e3 / between for a, b in zip(short, long, strict=True)]


def packing_us(subject: Subject, device: Device, samples: int = 7) -> list[float]:
    """Times of packing the weights of a forward call alone; none where there is nothing to pack."""
    if subject.backward or subject.family == "rec_cta":
        return []
    options: dict[str, Any] = {
        "device": device.torch_device,
        "dtype": DTYPES[subject.precision.dtype],
    }
    H = subject.hidden
    x, w_hh = (torch.randn(n, **options) for n in ((1, subject.batch, FEATURES), (4 * H, H)))
    layout = ops.packed_layout(x, 1, H, H, subject.precision.tf32)

    def pack() -> Tensor:
        return ops.pack_weights([w_hh], [], layout)

    device.clock.mean_ms(pack, 3)
    return [device.clock.mean_ms(pack, 3) * 1e3 for _ in range(samples)]


def measure_all(
    found: Iterable[Subject], device: Device, architecture: int, lost: Callable[[], bool]
) -> Iterator[Record]:
    """A record for each subject."""
    for subject in found:
        record: Record = {
            "kind": "step time",
            "family": subject.family,
            "arithmetic": subject.arithmetic,
            "padded_hidden": subject.hidden,
            "columns": subject.columns,
            "turns": subject.turns,
            "batch": subject.batch,
            "backward": subject.backward,
            "architecture": architecture,
            "error": None,
        }
        try:
            with (
                allowed(subject.precision),
                forced_kernel(subject.family, subject.columns, subject.turns),
            ):
                times = sorted(step_us(subject, device))
                packing = packing_us(subject, device)
            record |= {"low": times[0], "median": times[len(times) // 2], "high": times[-1]}
            record["packing"] = median(packing) if packing else None
        except RuntimeError as error:
            record["error"] = describe(error)
            yield record
            if lost():
                return
            continue
        yield record


def rows(records: Iterable[Record]) -> list[str]:
    """Lines of kMeasured, in plan_model.h."""
    return [
        f"{{Family::{r['family']}, Arithmetic::{r['arithmetic']}, {r['padded_hidden']}, "
        f"{r['columns'] // 8}, {r['turns']}, {'true' if r['backward'] else 'false'}, "
        f"{r['architecture']}, {r['median']:.3f}}},"
        f"  // {r['environment']['device']}, {r['environment']['date'][:10]}"
        for r in records
        if r["error"] is None and r["median"] > 0
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a kernel failed, 2 without a device."""
    parser = argparse.ArgumentParser(description="Measures steps of kernels.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--print", action="store_true", help="only the rows, of what is in --out")
    options = parser.parse_args(arguments)
    path = options.out / STEP_TIMES
    if options.print:
        print("\n".join(rows(read_records(path))))
        return 0
    try:
        device = Cuda()
    except NoDevice as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    properties = ops.CudaDevice.of(device.torch_device)
    file = ResultsFile(path, CudaEnvironment.current())
    device.warm_up()
    device.clock = QueuedClock()
    failed = 0
    for record in measure_all(subjects(properties), device, properties.architecture, device.lost):
        file.add(record)
        failed += record["error"] is not None
        print({name: value for name, value in record.items() if name != "kind"}, flush=True)
    lines = rows(read_records(path))
    print("\n".join(lines))
    print(f"{len(lines)} kernels measured, {failed} failed")
    return 1 if failed or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
