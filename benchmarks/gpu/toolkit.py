"""Where the programs of the CUDA toolkit are, and programs compiled by them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def find_tool(name: str) -> str | None:
    """A program of CUDA_HOME, of /usr/local/cuda, of an nvidia package, or else of PATH."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes if home]
    folders += Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")
    found = (shutil.which(name, path=str(folder)) for folder in folders)
    return next((path for path in found if path), None) or shutil.which(name)


def compiled(name: str, command: Callable[[str, tuple[int, int], Path], list[str]]) -> Path | None:
    """A program for this device, by the command for nvcc, the device's capability and its place.

    None, once the reason is said, without a device or a compiler.
    """
    import torch

    if not torch.cuda.is_available():
        print("error: no CUDA device", file=sys.stderr)
        return None
    nvcc = find_tool("nvcc")
    if nvcc is None:
        print("error: no nvcc; install a CUDA toolkit, or set CUDA_HOME to it", file=sys.stderr)
        return None
    program = ROOT / "build" / name
    program.parent.mkdir(exist_ok=True)
    subprocess.run(command(nvcc, torch.cuda.get_device_capability(), program), check=True)
    return program
