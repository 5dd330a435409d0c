"""All that a machine with a GPU can tell, in one command and in parts that fit ten minutes each.

    python -m benchmarks.gpu_check [--part tests|sanitize|micro|soak|bench|all] [--out FOLDER]

Needs Python, torch with CUDA, a toolkit and a compiler; pytest for the tests; no network. Each step
is a process of its own with a limit of time, so that neither a hang nor a fault of the device ends
the others. What it leaves in FOLDER is data (check.json and *.jsonl), logs, and check.md for
reading. Parts run one by one, or again, add to what is there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .gpu import steps
from .gpu.check_report import write_report
from .gpu.steps import PARTS, Step, StepResult, run_step

SPARE_S = 10.0  # of the whole time, for the report


def describe_device() -> dict[str, object] | None:
    """What torch says of the first GPU, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": (properties.major, properties.minor),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def limits(todo: Sequence[Step], left_s: float) -> float:
    """The time for the first of these steps, so that the others get their shares of the rest."""
    first = todo[0]
    if first.command is None:
        return 0.0
    share = left_s * first.weight / sum(step.weight for step in todo if step.command)
    return max(1.0, min(left_s, share if first.limit_s is None else max(share, first.limit_s)))


def run_all(todo: Sequence[Step], end: float, out: Path) -> list[StepResult]:
    """Runs the steps in order, each within its share; what a failed build leaves undone is left."""
    results: list[StepResult] = []
    for position, step in enumerate(todo):
        left_s = end - time.perf_counter()
        if results and results[-1].part == "build" and results[-1].status != "passed":
            results += [StepResult.left(later, "the build failed") for later in todo[position:]]
            break
        if left_s < 5:
            results += [StepResult.left(later, "no time was left") for later in todo[position:]]
            break
        limit_s = limits(todo[position:], left_s)
        print(f"==> {step.part}: {step.name}, at most {limit_s:.0f} s", flush=True)
        result = run_step(step, limit_s, out)
        print(f"    {result.status} after {result.seconds:.0f} s; {result.detail}", flush=True)
        results.append(result)
    return results


def keep(path: Path, results: Sequence[StepResult], device: object) -> list[StepResult]:
    """Writes results, with those of other steps that are there, and gives all of them back."""
    kept: dict[tuple[str, str], StepResult] = {}
    if path.exists():
        for record in json.loads(path.read_text())["steps"]:
            kept[record["part"], record["name"]] = StepResult(**record)
    for result in results:
        kept[result.part, result.name] = result
    records = [vars(result) for result in kept.values()]
    path.write_text(json.dumps({"device": device, "steps": records}, indent=1) + "\n")
    return list(kept.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if all that ran passed, 1 if not, 2 without a device."""
    options = _parse(arguments)
    end = time.perf_counter() + options.total_s - SPARE_S
    device = describe_device()
    parts = PARTS if options.part == "all" else (options.part,)
    name = "no-device" if device is None else re.sub(r"\W+", "-", str(device["name"])).lower()
    out = (options.out or steps.ROOT / "benchmarks" / "results" / name).absolute()
    capability = (9, 0) if device is None else device["capability"]
    todo = steps.build(out, capability) if not options.no_build else []  # type: ignore[arg-type]
    for part in parts:
        todo += steps.of_part(part, out, resume=options.resume)

    if device is None or options.dry_run:
        print(f"What would run, in this order, within {options.total_s:.0f} s, into {out}:")
        left_s = options.total_s - SPARE_S
        for position, step in enumerate(todo):
            limit_s = limits(todo[position:], left_s) if left_s > 0 else 0.0
            left_s -= limit_s
            print(f"  {step.part}: {step.name}, {limit_s:.0f} s and what others leave over")
            can = step.command is not None
            print(f"      {step.shown(limit_s)}" if can else f"      cannot run: {step.missing}")
    if device is None:
        print("error: no CUDA device: nothing was run", file=sys.stderr)
        return 2
    if options.dry_run:
        return 0

    print(json.dumps(device), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    results = run_all(todo, end, out)
    everything = keep(out / "check.json", results, device)
    write_report(out, device, everything)
    print((out / "check.md").read_text())
    return 0 if all(result.status == "passed" for result in results) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Builds, tests, sanitizes and measures on a machine with a GPU.",
    )
    add = parser.add_argument
    add("--part", choices=(*PARTS, "all"), default="all", help="default all")
    add("--out", type=Path, help="default benchmarks/results/<device>")
    add("--total-s", type=float, default=560.0, help="for everything; default 560")
    add("--no-build", action="store_true", help="use the extension that is there")
    add("--resume", action="store_true", help="bench: measure only what --out does not hold yet")
    add("--dry-run", action="store_true", help="say what would run, and stop")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
