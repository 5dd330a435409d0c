"""Rates and delays of a GPU that torch alone can measure, to read results against.

python -m benchmarks.gpu.micro --out FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..environment import CudaEnvironment
from ..results import ResultsFile
from ..timing import Call, Spread
from ..workloads import DTYPES
from .device import Cuda, NoDevice, allowed
from .grid import PRECISIONS, Precision
from .records import Record

LAUNCHES = 1000


def samples_ms(device: Cuda, call: Call, repeats: int, samples: int = 9) -> list[float]:
    """Times of one call, after a warm-up."""
    device.clock.mean_ms(call, repeats)
    return [device.clock.mean_ms(call, repeats) for _ in range(samples)]


def row(name: str, unit: str, values: Sequence[float], meaning: str) -> Record:
    """A record of repeated measurements of one quantity."""
    spread = dataclasses.asdict(Spread.of(values))
    return {"kind": "micro", "name": name, "unit": unit, **spread, "meaning": meaning}


def launches(device: Cuda) -> Iterator[Record]:
    """What starting kernels one after the other costs."""
    one = torch.zeros(1, device=device.torch_device)

    def tiny() -> None:
        for _ in range(LAUNCHES):
            one.add_(1.0)

    stream_us = [ms * 1e3 / LAUNCHES for ms in samples_ms(device, tiny, 1)]
    yield row("launch, stream", "us", stream_us, "from one tiny kernel to the next, eager torch")
    replay = device.capture(tiny, 1)
    graph_us = [ms * 1e3 / LAUNCHES for ms in samples_ms(device, replay, 1)]
    yield row("launch, graph", "us", graph_us, "from one dependent tiny kernel to the next")

    wide = torch.zeros(torch.cuda.get_device_properties(0).multi_processor_count * 1024)
    wide = wide.to(device.torch_device)

    def full() -> None:
        for _ in range(LAUNCHES):
            wide.add_(1.0)

    replay = device.capture(full, 1)
    full_us = [ms * 1e3 / LAUNCHES for ms in samples_ms(device, replay, 1)]
    yield row("launch, graph, all processors", "us", full_us, "the same with a block on each")

    one_node = device.capture(lambda: one.add_(1.0), 1)
    graph_us = [ms * 1e3 for ms in samples_ms(device, one_node, 200)]
    yield row("replay of a graph with one kernel", "us", graph_us, "graphs back to back")

    host_us = []
    for _ in range(9):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(200):  # fewer than the queue to the device holds
            one.add_(1.0)
        host_us.append((time.perf_counter() - start) * 1e6 / 200)
    device.synchronize()
    yield row("launch, host", "us", host_us, "time of the host for one torch call of one kernel")


def products(device: Cuda, n: int = 8192) -> Iterator[Record]:
    """Rates of large square matrix products."""
    for precision in (*PRECISIONS.values(), Precision("fp64", "float64", False, None, 1e12)):
        size = n if precision.dtype != "float64" else n // 4
        dtype = DTYPES[precision.dtype]
        a, b = (
            torch.randn(size, size, device=device.torch_device, dtype=torch.float32).to(dtype)
            for _ in range(2)
        )
        out = torch.empty_like(a)
        with allowed(precision):
            times = samples_ms(device, _product(a, b, out), 3, 5)
        rates = [2 * size**3 / ms / 1e9 for ms in times]
        yield row(f"product {precision.name}", "TFLOP/s", rates, f"{size} x {size} x {size}")


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.mm(a, b, out=out)


def copies(device: Cuda) -> Iterator[Record]:
    """Bytes read and written a second."""
    for name, mib, repeats in (("memory", 1024, 5), ("cache", 8, 200), ("cache", 1, 500)):
        source = torch.ones(mib * 2**18, device=device.torch_device)
        target = torch.empty_like(source)
        call = _copy(source, target)
        rates = [2 * mib / 1024 / ms * 1e3 for ms in samples_ms(device, call, repeats)]
        yield row(f"copy, {name}, {mib} MiB", "GiB/s", rates, "read and written, both counted")


def _copy(source: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
    return lambda: target.copy_(source)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures rates and delays of a GPU.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    try:
        device = Cuda()
    except NoDevice as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = ResultsFile(options.out / "micro.jsonl", CudaEnvironment.current())
    device.warm_up()
    for part in (launches, products, copies):
        for found in part(device):
            file.add(found)
            print(f"{found['name']}: {found['median']:.3g} {found['unit']}", flush=True)
        device.clean()
    return 0


if __name__ == "__main__":
    sys.exit(main())
