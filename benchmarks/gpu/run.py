"""`python -m benchmarks --device cuda`: the grid, in a time given, with nothing lost at its end."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..environment import CudaEnvironment
from ..results import ResultsFile
from .device import Cuda, NoDevice
from .grid import GROUPS, PRECISIONS, Point, all_points, select
from .measure import Settings, describe, head, key, measure
from .records import DEVICE_LOST, Record, read_records
from .summary import write_summary

MODES = ("inference", "training")


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        measured: points that were started.
        left: points for which no time was left.
        wrong: records of wrong results.
        lost: whether the device failed so that this process can do no more.
    """

    measured: int = 0
    left: int = 0
    wrong: int = 0
    lost: bool = False


def run_points(
    work: Sequence[tuple[Point, str]],
    measure_point: Callable[[Point, str], Iterable[Record]],
    add: Callable[[Record], None],
    end: float,
    now: Callable[[], float] = time.perf_counter,
    lost: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Measures point after point, in order, until the time is over.

    Args:
        work: points, each with the kernel to force.
        measure_point: gives the records of a point as they are done.
        add: keeps a record.
        end: no point is started at or after this time of `now`.
        lost: asked after an error.
    """
    outcome = Outcome()
    for position, (point, kernel) in enumerate(work):
        if now() >= end:
            outcome.left = len(work) - position
            break
        outcome.measured += 1
        waiting = list(point.workload.modes)
        try:
            for record in measure_point(point, kernel):
                add(record)
                waiting.remove(record["mode"])
                outcome.wrong += record["error"] is not None and "wrong" in record["error"]
        except Exception as error:  # one point must not end the run
            for mode in waiting:
                add({**head(point, mode, kernel), "error": describe(error)})
            if lost():
                outcome.lost = True
                outcome.left = len(work) - position - 1
                break
    return outcome


def remaining(points: Iterable[Point], kernels: Sequence[str], done: set[tuple[str, ...]]) -> list:
    """Points and kernels of which a record is missing, all kernels of a point in a row."""
    return [
        (point, kernel)
        for point in points
        for kernel in kernels
        if any(key(head(point, mode, kernel)) not in done for mode in point.workload.modes)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a result was wrong, 2 without a device, DEVICE_LOST."""
    options = _parse(arguments)
    points = select(all_points(), options.workloads, options.precisions, options.modes)
    if options.list:
        for point in points:
            workload = point.workload
            print(f"{workload.group:9}{point.precision.name:5} {workload.name}  ({workload.shape})")
        return 0
    end = time.perf_counter() + options.budget_s
    try:
        device = Cuda()
    except NoDevice as error:
        print(f"error: {error}. These benchmarks run on an NVIDIA GPU.", file=sys.stderr)
        return 2
    environment = CudaEnvironment.current()
    print(environment, flush=True)
    path = options.out / "gpu.jsonl"
    # What failed is tried again only by a new run: a fault that repeats must not stop the rest.
    done = {key(record) for record in read_records(path)} if options.resume else set()
    file = ResultsFile(path, environment, append=options.resume)
    device.warm_up()

    def measure_point(point: Point, kernel: str) -> Iterable[Record]:
        settings = Settings(kernel, options.pair_s, not options.no_graphs)
        return measure(point, device, settings)

    def add(record: Record) -> None:
        file.add(record)
        print(_line(record), flush=True)

    work = remaining(points, options.kernel, done)
    try:
        outcome = run_points(work, measure_point, add, end, lost=device.lost)
    finally:
        write_summary(options.out)
    print(f"{outcome.measured} points measured, {outcome.left} left; {path}")
    if outcome.lost:
        print("the device failed: go on with --resume", file=sys.stderr)
        return DEVICE_LOST
    return 1 if outcome.wrong else 0


def _line(record: Record) -> str:
    name = f"{record['name']} {record['precision']} {record['mode']} {record['kernel']}"
    if record["comparison"] is None:
        return f"{name}: {record['error']}"
    steps, ratio = record["us_per_step"], record["comparison"]["ratio"]
    return (
        f"{name}: {steps['baseline']:.2f} -> {steps['fused']:.2f} us a step, "
        f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks --device cuda",
        description="Compares lstm_cuda with torch.nn.LSTM on a GPU: checks, then measures.",
    )
    add = parser.add_argument
    add("--workloads", nargs="+", default=[], metavar="NAME", help="names or groups; see --list")
    add("--list", action="store_true", help="name all that would be measured, in order, and stop")
    add("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add(
        "--kernel",
        nargs="+",
        default=["auto"],
        metavar="FAMILY",
        help='kernel families to force in turn, as rec_cluster rec_group; default "auto"',
    )
    add("--budget-s", type=float, default=480.0, help="start nothing after this; default 480")
    add("--pair-s", type=float, default=0.25, help="time for one comparison; default 0.25")
    add("--no-graphs", action="store_true", help="leave captured graphs out")
    add("--resume", action="store_true", help="keep what is in --out, and measure only the rest")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for gpu.jsonl, gpu.md")
    options = parser.parse_args(arguments)
    known = {*GROUPS, *(point.workload.name for point in all_points())}
    if unknown := [name for name in options.workloads if name not in known]:
        parser.error(f"--workloads: nothing is called {unknown}; see --list")
    return options


if __name__ == "__main__":
    sys.exit(main())
