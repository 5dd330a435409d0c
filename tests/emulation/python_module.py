"""Builds and loads the extension that runs the CUDA path on CPU tensors (extension.cpp)."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

from . import build

NAME = "lstm_cuda_emulated"


def sources(root: Path = build.ROOT) -> list[Path]:
    """All that the product compiles for CUDA, with the emulated device in the real one's place."""
    csrc = root / "csrc"
    found = [csrc / "ops_cuda.cpp", csrc / "ops_inputs.cpp", *sorted(csrc.glob("cuda/*.cpp"))]
    found += [path for path in sorted(csrc.glob("cuda/*.cu")) if path.name != "device.cu"]
    return [*found, root / "tests" / "emulation" / "extension.cpp"]


def compile_module(root: Path = build.ROOT, folder: Path = build.FOLDER) -> Path:
    """The extension's file, up to date with the sources under root."""
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    target = f"{NAME}.{torch.__version__}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return build.compile(
        sources(root),
        "plain",
        folder / target,
        shared=True,
        root=root,
        flags=[
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            *(f"-isystem{path}" for path in includes),
        ],
        libraries=[
            *(f"-L{path}" for path in cpp_extension.library_paths()),
            "-ltorch_cpu",
            "-lc10",
        ],
    )


def load(path: Path) -> ModuleType:
    """The compiled module; it registers torch.ops.lstm_cuda_emulated, so once a process."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
