"""What a device and its driver let kernels with resident weights do: see probe.cu.

    python -m benchmarks.gpu.probe --out FOLDER

How many clusters run at once stands in csrc/cuda/plan_model.h as published; this says what it is
here. A cooperative launch that a graph cannot hold would keep rec_group out of graphs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..environment import CudaEnvironment
from ..results import ResultsFile
from .records import Record
from .toolkit import ROOT, compiled

SOURCE = ROOT / "benchmarks" / "gpu" / "probe.cu"


def compile_command(nvcc: str, capability: tuple[int, int], program: Path) -> list[str]:
    """For this device alone."""
    name = f"{capability[0]}{capability[1]}"
    target = f"-gencode=arch=compute_{name},code=sm_{name}"
    return [nvcc, "-std=c++20", "-O3", target, str(SOURCE), "-o", str(program)]


def read_answers(output: str) -> list[Record]:
    """The lines of probe.cu, as records of micro.jsonl."""
    answers = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [
        {
            "kind": "micro",
            "name": answer["name"],
            "unit": answer["error"] or "times",
            "median": answer["value"],
            "error": answer["error"],
        }
        for answer in answers
    ]


def missing(records: Iterable[Record]) -> list[str]:
    """What a device that has it all would have answered otherwise."""
    wanted = {"cooperative launch": 1, "cooperative launch, replays in a graph of 3": 3}
    values = {r["name"]: r["median"] for r in records if r["error"] is None}
    return [name for name, value in wanted.items() if values.get(name) != value]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if cooperative launches do not work here, 2 without a device or compiler."""
    parser = argparse.ArgumentParser(description="Asks a GPU what it can launch.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    program = compiled("probe", compile_command)
    if program is None:
        return 2
    done = subprocess.run([str(program)], stdout=subprocess.PIPE, text=True, timeout=60)
    found = read_answers(done.stdout)
    file = ResultsFile(options.out / "probe.jsonl", CudaEnvironment.current())
    for record in found:
        file.add(record)
        print(f"{record['name']}: {record['median']} {record['unit']}", flush=True)
    absent = missing(found)
    print(f"{len(found)} answers; missing: {', '.join(absent) or 'nothing'}")
    return 1 if absent or done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
