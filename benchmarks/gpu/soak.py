"""Long repetition: the same bits again and again, alone, beside other work, and replayed.

    python -m benchmarks.gpu.soak --out FOLDER --budget-s 60

Faults of synchronisation show once in many steps. Every result is compared on the device with the
first of its kind, bit by bit, and only the count of differences is read, at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lstm_cuda import FusedLSTM

from ..results import ResultsFile
from ..workloads import DTYPES
from .measure import describe, forced
from .records import FAMILIES, REFUSAL, Record, soak_passed

# T, B, I, H: for one block, for several tiles of the batch, for wide layers.
SIZES = ((500, 16, 32, 64), (500, 37, 48, 100), (200, 64, 256, 512), (200, 40, 128, 1000))


@dataclass
class Work:
    """One training call with fixed weights and data: results are the same each time."""

    lstm: FusedLSTM
    x: Tensor
    dy: Tensor

    @classmethod
    def make(cls, sizes: tuple[int, int, int, int], dtype: str, device: torch.device) -> Work:
        T, B, features, H = sizes
        generator = torch.Generator(device).manual_seed(T + B + H)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            return values.to(DTYPES[dtype])

        lstm = FusedLSTM(features, H, device=device, dtype=DTYPES[dtype])
        return cls(lstm, draw(T, B, features).requires_grad_(), draw(T, B, H))

    def __call__(self) -> list[Tensor]:
        """Outputs and gradients, all of them new."""
        y, (h_n, c_n) = self.lstm(self.x)
        wanted = [self.x, *self.lstm.parameters()]
        return [y.detach(), h_n.detach(), c_n.detach(), *torch.autograd.grad(y, wanted, self.dy)]


def differences(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """How many tensors differ in any bit, as a number that stays on the device."""
    differing = [
        (f.view(torch.uint8) != e.view(torch.uint8)).any()
        for f, e in zip(map(_plain, found), map(_plain, expected), strict=True)
    ]
    return torch.stack(differing).sum()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def repeat(work: Callable[[], list[Tensor]], steps: int, calls: int, end: float) -> Record:
    """Makes the same call many times."""
    expected = work()
    bad = differences(work(), expected)
    done = 2
    while done < calls and time.perf_counter() < end:
        bad += differences(work(), expected)
        done += 1
        if done % 16 == 0:
            bad.item()  # so that the host does not run ahead of its time
    finite = all(bool(tensor.isfinite().all()) for tensor in expected)
    return {"calls": done, "steps": done * steps, "differences": int(bad), "finite": finite}


def two_streams(first: Work, second: Work, calls: int, end: float) -> Record:
    """Two layers at once, each on a stream of its own."""
    works = (first, second)
    expected = [work() for work in works]
    streams = [torch.cuda.Stream() for _ in works]
    torch.cuda.synchronize()
    bad = [torch.zeros((), dtype=torch.int64, device=work.x.device) for work in works]
    torch.cuda.synchronize()
    done = 0
    while done < calls and time.perf_counter() < end:
        for which, (work, stream) in enumerate(zip(works, streams, strict=True)):
            with torch.cuda.stream(stream):
                bad[which] += differences(work(), expected[which])
        done += 1
        if done % 16 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    steps = done * (len(first.x) + len(second.x))
    return {"calls": done, "steps": steps, "differences": sum(int(count) for count in bad)}


def replayed(work: Work, calls: int, end: float) -> Record:
    """A captured graph against the eager call."""
    expected = work()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    bad = torch.zeros((), dtype=torch.int64, device=work.x.device)
    done = 0
    while done < calls and time.perf_counter() < end:
        for tensor in found:
            tensor.fill_(float("nan"))  # what a replay does not write must not look right
        graph.replay()
        bad += differences(found, expected)
        done += 1
        if done % 16 == 0:
            bad.item()
    return {"calls": done, "steps": done * len(work.x), "differences": int(bad)}


def soaks(
    device: torch.device, total_steps: int, budget_s: float, families: Sequence[str]
) -> Iterator[Record]:
    """All of them in turn, each with a share of the time that is left."""
    jobs: list[tuple[str, Record, Callable[[float], Record]]] = []
    for family in families:
        for sizes in SIZES:
            calls = max(2, total_steps // sizes[0])
            for dtype in ("float16", "float32", "bfloat16", "float64"):
                head: Record = {"family": family, "sizes": sizes, "dtype": dtype}

                def again(
                    end: float, sizes: Any = sizes, dtype: str = dtype, n: int = calls
                ) -> Record:
                    return repeat(Work.make(sizes, dtype, device), sizes[0], n, end)

                def graph(
                    end: float, sizes: Any = sizes, dtype: str = dtype, n: int = calls
                ) -> Record:
                    return replayed(Work.make(sizes, dtype, device), n // 10, end)

                def beside(
                    end: float, sizes: Any = sizes, dtype: str = dtype, n: int = calls
                ) -> Record:
                    other = Work.make(SIZES[1], dtype, device)
                    return two_streams(Work.make(sizes, dtype, device), other, n // 10, end)

                jobs.append((family, {**head, "what": "repeated"}, again))
                if device.type == "cuda":
                    jobs.append((family, {**head, "what": "replayed"}, graph))
                    jobs.append((family, {**head, "what": "beside another"}, beside))
    stop = time.perf_counter() + budget_s
    for position, (family, head, job) in enumerate(jobs):
        now = time.perf_counter()
        if now >= stop:
            return
        end = now + (stop - now) / (len(jobs) - position)
        row: Record = {"kind": "soak", **head, "error": None}
        try:
            with forced(family):
                row |= job(end)
        except RuntimeError as error:
            if REFUSAL in str(error):
                continue
            row["error"] = describe(error)
        yield row


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if anything differed or failed, or nothing ran; 2 without a device."""
    parser = argparse.ArgumentParser(description="Repeats work and compares every bit.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--budget-s", type=float, default=120.0)
    parser.add_argument("--steps", type=int, default=10**6, help="of each kind; default 1000000")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no CUDA device", file=sys.stderr)
        return 2
    from ..environment import CudaEnvironment

    file = ResultsFile(options.out / "soak.jsonl", CudaEnvironment.current())
    rows = []
    device = torch.device("cuda")
    for row in soaks(device, options.steps, options.budget_s, options.families):
        file.add(row)
        rows.append(row)
        print(("" if soak_passed(row) else "FAILED: ") + json.dumps(row), flush=True)
    bad = sum(not soak_passed(row) for row in rows)
    steps = sum(row.get("steps", 0) for row in rows)
    print(f"{len(rows)} soaks, {steps} steps, {bad} failed")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
