"""Where the programs of the CUDA toolkit are."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def find_tool(name: str) -> str | None:
    """A program of CUDA_HOME, of /usr/local/cuda, of an nvidia package, or else of PATH."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes if home]
    folders += Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")
    found = (shutil.which(name, path=str(folder)) for folder in folders)
    return next((path for path in found if path), None) or shutil.which(name)
