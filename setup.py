"""What is compiled, with which flags, CUDA or not. Everything else is in pyproject.toml."""

import os
import re
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

try:
    import pybind11
except ModuleNotFoundError:  # torch ships the headers too
    pybind11 = None

ROOT = Path(__file__).resolve().parent
CUDA_OPS = "csrc/ops_cuda.cpp"
TORCH_TARGET_VERSION = "0x020b000000000000"  # torch 2.11: the oldest that the binary loads on

version_line = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
assert version_line is not None, "pyproject.toml has no version"
VERSION = version_line[1]


def sources(*patterns: str) -> list[str]:
    """The files under csrc/ that match, relative to the root, in a fixed order."""
    paths = {path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)}
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def toolkit() -> Path | None:
    """The CUDA toolkit: torch's guess, which takes any nvcc on PATH for a part of one, if it is."""
    guesses = [cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    paths = [Path(guess) for guess in guesses if guess]
    return next((p for p in paths if (p / "include" / "cuda_runtime.h").is_file()), None)


def wants_cuda() -> bool:
    """Whether to compile CUDA kernels: as LSTM_CUDA_BUILD says, else if there is what it takes."""
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} has no CUDA; install a CUDA build of torch")
    if toolkit() is None:
        missing.append("no CUDA toolkit was found; install one, or set CUDA_HOME to it")
    if not sources("cuda/*.cu"):
        missing.append("this source tree has no CUDA kernels (csrc/cuda/*.cu)")

    choice = os.environ.get("LSTM_CUDA_BUILD", "")
    if choice not in ("", "cpu", "cuda"):
        raise SystemExit(f"LSTM_CUDA_BUILD must be cpu, cuda or unset; got {choice!r}")
    if choice == "cuda" and missing:
        raise SystemExit("LSTM_CUDA_BUILD=cuda, but " + "; ".join(missing))
    return choice != "cpu" and not missing


def cuda_architectures() -> str:
    """The architectures of the GPUs in this machine, or those of a build for any machine."""
    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if seen:
        names = [f"{major}.{minor}" for major, minor in sorted(seen)]
        return ";".join("9.0a" if name == "9.0" else name for name in names)
    cuda_version = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])
    return "8.0;9.0a;10.0+PTX" if cuda_version >= (12, 8) else "8.0;9.0a;9.0+PTX"


def extension(with_cuda: bool) -> Extension:
    """The extension module lstm_cuda._C."""
    defines = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        ("LSTM_CUDA_VERSION", f'"{VERSION}"'),
        ("LSTM_CUDA_TORCH_VERSION", f'"{torch.__version__}"'),
    ]
    # torch's headers as system headers: warnings are about this project's code.
    system = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    # -g0 undoes Python's own -g: debug information makes the binary ten times as large.
    flags = {"cxx": ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden"]}
    flags["cxx"] += ["-Wall", "-Wextra", *system]
    # Plans for CUDA devices are made in every build; ops_cuda.cpp and .cu files need a toolkit.
    files = [name for name in sources("*.cpp", "cpu/*.cpp", "cuda/*.cpp") if name != CUDA_OPS]
    if with_cuda:
        cpp_extension.CUDA_HOME = str(toolkit())
        # USE_CUDA: torch's headers show the current CUDA stream only then.
        defines += [("LSTM_CUDA_WITH_CUDA", "1"), ("USE_CUDA", "1")]
        threads = os.environ.get("NVCC_THREADS", "1")
        flags["nvcc"] = ["-std=c++20", "-O3", f"--threads={threads}"]
        files += [CUDA_OPS, *sources("cuda/*.cu")]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_architectures())
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return make(
        "lstm_cuda._C",
        files,
        include_dirs=[pybind11.get_include()] if pybind11 else [],
        define_macros=defines,
        extra_compile_args=flags,
    )


with_cuda = wants_cuda()
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
os.environ.setdefault("MAX_JOBS", str(cores))


class BuildExtension(cpp_extension.BuildExtension):
    """Keeps object files in one place: an editable install too then compiles only what changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        kind = "cuda" if with_cuda else "cpu"
        # abiflags tells a free-threaded Python from another of its version.
        self.build_temp = f"build/{sys.implementation.cache_tag}{sys.abiflags}-{kind}"


setup(ext_modules=[extension(with_cuda)], cmdclass={"build_ext": BuildExtension})
