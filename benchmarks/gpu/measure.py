"""One point of the grid: checked, then timed eagerly, by host, by memory and in a graph."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import lstm_cuda

from ..cases import BUFFERS, Case
from ..check import Check, check
from ..timing import MIN_PAIRS, Call, Comparison, Spread, compare
from ..variants import VARIANTS
from ..workloads import DTYPES, Workload
from .device import Device, allowed
from .grid import Point, flops, for_check

SIDES = ("baseline", "fused")
CACHE_BYTES = 64 * 2**20  # larger inputs do not stay in any device's cache: two are enough in turn


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        kernel: the family to force, or "auto".
        pair_s: time for the pairs of one comparison, beyond the least number of them.
        graphs: whether to measure captured graphs, too.
    """

    kernel: str = "auto"
    pair_s: float = 0.25
    graphs: bool = True


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Makes FusedLSTM take one kernel family, or raise where that cannot run the problem."""
    if kernel == "auto":
        yield
        return
    with lstm_cuda.force_kernel(kernel):
        yield


def measure(point: Point, device: Device, settings: Settings) -> Iterator[dict[str, Any]]:
    """A record for each mode, as it is done. What goes wrong with the device is raised."""
    with allowed(point.precision), forced(settings.kernel):
        start = time.perf_counter()
        checked = _check(point, device)
        case = None
        if not checked.failures:
            case = Case.build(
                point.workload,
                point.precision.dtype,
                device.torch_device,
                _buffers(point.workload, point.precision.dtype),
            )
        for mode in point.workload.modes:
            record = head(point, mode, settings.kernel)
            record["check"] = dataclasses.asdict(checked)
            if case is None:
                record["error"] = "wrong result"
            else:
                record |= _measure_mode(case, point, mode, device, settings)
            record["seconds"] = round(time.perf_counter() - start, 2)
            yield record
            start = time.perf_counter()
    del case
    device.clean()


def head(point: Point, mode: str, kernel: str) -> dict[str, Any]:
    """What a record says of the problem; the rest of it is nothing yet."""
    return {
        "kind": "gpu timing",
        **dataclasses.asdict(point.workload),
        "mode": mode,
        "precision": point.precision.name,
        "kernel": kernel,
        "baseline": VARIANTS[point.workload.variant].baseline,
        "comparison": None,
        "error": None,
    }


def key(record: dict[str, Any]) -> tuple[str, ...]:
    """Tells records of one file apart."""
    return tuple(str(record[name]) for name in ("name", "precision", "mode", "kernel"))


def _check(point: Point, device: Device) -> Check:
    """Against float64, with fewer steps where those would take too long."""
    case = Case.build(
        for_check(point.workload), point.precision.dtype, device.torch_device, buffers=1
    )
    checked = check(case, point.precision.bounds)
    del case
    device.clean()
    return checked


def _buffers(workload: Workload, dtype: str) -> int:
    elements = workload.steps * workload.batch * (workload.input_size + workload.hidden_size)
    return BUFFERS if elements * DTYPES[dtype].itemsize < CACHE_BYTES else 2


def _measure_mode(
    case: Case, point: Point, mode: str, device: Device, settings: Settings
) -> dict[str, Any]:
    workload, calls = point.workload, case.calls(mode)
    with torch.set_grad_enabled(mode == "training"):
        plan = lstm_cuda.explain(case.fused_lstm, case.inputs[0])
    comparison = compare(*calls, device.clock, settings.pair_s)
    medians = (comparison.baseline_ms.median, comparison.fused_ms.median)
    operations = flops(workload, mode == "training")
    record = {
        "plan": plan,
        "comparison": as_record(comparison),
        "us_per_step": _by_side([ms * 1e3 / workload.steps for ms in medians]),
        "tflops": _by_side([operations / ms / 1e9 for ms in medians]),
        "host_ms": _by_side([host_ms(call, device) for call in calls]),
        "peak_mib": _by_side([_peak_mib(case, call, device) for call in calls]),
        "graph": None,
    }
    if point.graph and settings.graphs:
        record["graph"] = _measure_graph(case, calls, device, settings)
    return record


def _by_side(values: list[float]) -> dict[str, float]:
    return {side: round(value, 6) for side, value in zip(SIDES, values, strict=True)}


def as_record(comparison: Comparison) -> dict[str, Any]:
    return {**dataclasses.asdict(comparison), "verdict": comparison.verdict}


def host_ms(call: Call, device: Device, calls: int = 9, limit_s: float = 0.1) -> float:
    """Median time after which a call returns, its work on the device perhaps not done.

    Where a call fills the queue to the device, this includes waiting for it.
    """
    times: list[float] = []
    end = time.perf_counter() + limit_s
    while len(times) < calls and (len(times) < 3 or time.perf_counter() < end):
        device.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    device.synchronize()
    return statistics.median(times)


def _peak_mib(case: Case, call: Call, device: Device) -> float:
    """With the gradients that the call leaves, but not those that it finds and drops."""
    for x in case.inputs:
        x.grad = None
    for lstm in (case.torch_lstm, case.fused_lstm):
        lstm.zero_grad(set_to_none=True)
    return device.peak_mib(call)


def _measure_graph(
    case: Case, calls: tuple[Call, Call], device: Device, settings: Settings
) -> dict[str, Any]:
    """Both sides as graphs, each of one call for each of the inputs.

    Returns:
        "comparison" if both could, "<side>_ms" if only one could, "<side>_error" for the others.
    """
    times = len(case.inputs)
    record: dict[str, Any] = {}
    graphs: dict[str, Call] = {}
    for side, call in zip(SIDES, calls, strict=True):
        try:
            graphs[side] = device.capture(call, times)
        except Exception as error:
            record[f"{side}_error"] = describe(error)
            if device.lost():
                raise
    if len(graphs) == len(SIDES):
        both = compare(graphs["baseline"], graphs["fused"], device.clock, settings.pair_s)
        record["comparison"] = as_record(_divided(both, times))
    else:
        for side, replay in graphs.items():
            device.clock.mean_ms(replay, 2)
            samples = [device.clock.mean_ms(replay, 2) / times for _ in range(MIN_PAIRS)]
            record[f"{side}_ms"] = dataclasses.asdict(Spread.of(samples))
    return record


def describe(error: BaseException) -> str:
    """Kind and first line, as much as a table holds."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _divided(comparison: Comparison, by: int) -> Comparison:
    """Times of one call, from those of `by` calls."""

    def one(spread: Spread) -> Spread:
        return Spread(spread.low / by, spread.median / by, spread.high / by)

    return dataclasses.replace(
        comparison, baseline_ms=one(comparison.baseline_ms), fused_ms=one(comparison.fused_ms)
    )
