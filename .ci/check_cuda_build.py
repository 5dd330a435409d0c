"""Builds the extension with its CUDA kernels against a CUDA build of torch, and tries it.

    check_cuda_build.py [--python PATH] [--arch 9.0a] [--jobs N]

No GPU and no driver are needed, nor must they be: the import has to work without them. --python
names an interpreter with a CUDA build of torch; without it one is made in build/cuda-check (some
5 GB, from the package index). What else the build and the tests need goes into a folder of its own,
so that the named environment stays as it is. The sources are copied: the checkout's own build, for
another torch, stays too. CI does not run this: it has neither the space nor the time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cuda-check"
TOOLS = ("setuptools>=77.0.3", "pybind11>=2.13", "ninja", "pytest>=8", "hypothesis", "numpy")
NOT_SOURCES = shutil.ignore_patterns(
    ".*cache", ".git", ".hypothesis", ".venv", "*.egg-info", "*.so", "__pycache__", "build", "dist"
)
DESCRIBE_TORCH = """
import json, torch
print(json.dumps([torch.__version__, torch.version.cuda]))
"""
# What must hold wherever this build is imported, with or without a GPU.
TRY = """
import sys, torch, lstm_cuda
from torch._subclasses.fake_tensor import FakeTensorMode
assert lstm_cuda.__file__.startswith(sys.argv[1]), lstm_cuda.__file__
info = lstm_cuda.build_info()
assert info["cuda"] is True, info

x = torch.randn(5, 2, 3)
y, _ = lstm_cuda.FusedLSTM(3, 4)(x)  # the CPU kernels are in it, too
assert y.shape == (5, 2, 4) and bool(y.isfinite().all())

try:
    lstm_cuda.FusedLSTM(3, 4, backend="cuda")(x)
except (RuntimeError, ValueError) as error:
    assert "cuda" in str(error) and "cpu" in str(error), error
else:
    raise AssertionError("backend='cuda' ran with a tensor on the CPU")

with FakeTensorMode():  # shapes for CUDA tensors, as torch.compile asks for them
    y, (h_n, c_n) = lstm_cuda.FusedLSTM(3, 4, device="cuda")(torch.randn(5, 2, 3, device="cuda"))
    assert y.shape == (5, 2, 4) and y.device.type == h_n.device.type == c_n.device.type == "cuda"

if not torch.cuda.is_available():
    try:
        lstm_cuda.FusedLSTM(3, 4, device="cuda")
    except (AssertionError, RuntimeError) as error:
        print("without a device torch says:", str(error).splitlines()[0])
    else:
        raise AssertionError("a module was made on a device that is not there")
print("build_info:", info)
"""


def say(message: str) -> None:
    print(f"==> {message}", flush=True)


def make_environment(folder: Path) -> str:
    """The Python of an environment with the index's torch, which has CUDA on Linux."""
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.exists():
        say(f"Installing torch with CUDA in {folder} (some 5 GB)")
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "torch"], check=True)
        done.touch()
    return str(python)


def describe_torch(python: str) -> tuple[str, str]:
    """Versions of torch and of its CUDA."""
    done = subprocess.run([python, "-c", DESCRIBE_TORCH], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: {python} cannot import torch:\n{done.stderr.strip()}")
    version, cuda = json.loads(done.stdout.splitlines()[-1])
    if cuda is None:
        sys.exit(f"error: torch {version} of {python} has no CUDA; install a CUDA build of torch")
    return version, cuda


def install_tools(python: str, folder: Path) -> None:
    """What builds and tests, beside the environment and before it on the path."""
    made_for = f"{python} {' '.join(TOOLS)}"
    done = folder / "complete"
    if done.exists() and done.read_text() == made_for:
        return
    say("Installing " + ", ".join(TOOLS))
    shutil.rmtree(folder, ignore_errors=True)
    command = [python, "-m", "pip", "install", "-qq", "--target", str(folder), *TOOLS]
    subprocess.run(command, check=True)
    done.write_text(made_for)


def copy_sources(source: Path) -> None:
    """A clean copy; object files of an earlier copy stay and are used where nothing changed."""
    source.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name == "build":
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(ROOT, source, ignore=NOT_SOURCES, dirs_exist_ok=True)


def passed_tests(output: str) -> int:
    """How many tests pytest says have passed."""
    found = re.findall(r"(\d+) passed", output)
    return int(found[-1]) if found else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Builds with CUDA kernels and tries the result.")
    parser.add_argument("--python", help="an interpreter with a CUDA build of torch")
    parser.add_argument("--arch", default="9.0a", help="TORCH_CUDA_ARCH_LIST; default 9.0a")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)

    python = options.python or make_environment(FOLDER / "environment")
    version, cuda = describe_torch(python)
    tools, source = FOLDER / "tools", FOLDER / "source"
    install_tools(python, tools)
    copy_sources(source)
    environment = {
        **os.environ,
        "LSTM_CUDA_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": options.arch,
        "MAX_JOBS": str(options.jobs),
        "PYTHONPATH": f"{source}{os.pathsep}{tools}",
        "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, *command],
            cwd=source,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    say(f"Building for {options.arch} with torch {version} (CUDA {cuda}), {options.jobs} at once")
    start = time.perf_counter()
    done = run("setup.py", "build_ext", "--inplace")
    seconds = time.perf_counter() - start
    (FOLDER / "build.log").write_text(done.stdout)
    if done.returncode != 0:
        wrong = [line for line in done.stdout.splitlines() if re.search(r"\berror\b|FAILED", line)]
        print("\n".join(wrong[:30]))
        print(f"FAILED: the build, after {seconds:.0f} s; all of it is in {FOLDER / 'build.log'}")
        return 1
    (library,) = (source / "lstm_cuda").glob("_C*.so")
    print(f"built in {seconds:.0f} s: {library.name}, {library.stat().st_size / 2**20:.1f} MiB")

    steps = (
        ("import and first calls", ("-c", TRY, str(source))),
        ("tests of the ops", ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_ops.py")),
    )
    for name, command in steps:
        say(name)
        done = run(*command)
        print("\n".join(done.stdout.strip().splitlines()[-25:]))
        if done.returncode != 0 or ("pytest" in command and not passed_tests(done.stdout)):
            print(f"FAILED: {name}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
