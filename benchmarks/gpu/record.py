"""Runs the small kernels of the emulation's tests on this GPU, and keeps what they write.

    python -m benchmarks.gpu.record --out FOLDER

The same kernels run under emulation in the tests, which compare with such a file in
tests/emulation/recorded/: without that, the emulation would be an opinion about the hardware.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .toolkit import ROOT, compiled

EMULATION = ROOT / "tests" / "emulation"
RECORDER = EMULATION / "record.cu"


def compile_command(nvcc: str, capability: tuple[int, int], program: Path) -> list[str]:
    """For this device alone; newer instructions need the suffix."""
    major, minor = capability
    name = f"{major}{minor}" + ("a" if major >= 9 else "")
    target = f"-gencode=arch=compute_{name},code=sm_{name}"
    folders = [f"-I{ROOT / 'csrc'}", f"-I{EMULATION}"]
    return [nvcc, "-std=c++20", "-O3", target, *folders, str(RECORDER), "-o", str(program)]


def file_name(device: str) -> str:
    """For example nvidia-h200.json."""
    return re.sub(r"\W+", "-", device).strip("-").lower() + ".json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns what the recorder does: 1 if hardware and emulation disagree; 2 without a device."""
    parser = argparse.ArgumentParser(description="Records small kernels on a GPU.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    program = compiled("record", compile_command)
    if program is None:
        return 2
    name = file_name(torch.cuda.get_device_name())
    file = options.out / "recorded" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    status = subprocess.run([str(program), str(file)]).returncode
    if file.exists():
        (EMULATION / "recorded").mkdir(exist_ok=True)
        shutil.copy(file, EMULATION / "recorded" / name)
        print(f"{file}: also in {EMULATION / 'recorded'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
