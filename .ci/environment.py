"""Runs a command of this project in an environment that has what it needs.

    environment.py [--own] EXTRA ARGUMENTS...

EXTRA names a list of dependencies in pyproject.toml: bench, test or dev. ARGUMENTS go to the
environment's Python. Without --own the environment is .venv, made and completed here; with it, the
interpreter that runs this file. What is already there is kept: a torch that is new enough, packages
that satisfy pyproject.toml, a build whose sources have not changed. Only the standard library and,
inside an environment, its pip are imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
# Says "ready" in a .venv that this file made and that no interrupted step has left half done.
STATE = VENV / "state-of-make"
TORCH = "torch==2.13.0"  # what is installed where there is no torch
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 11)
# With the sources, what decides how the extension is compiled.
BUILD_VARIABLES = ("CXX", "CFLAGS", "CUDA_HOME", "LSTM_CUDA_BUILD", "TORCH_CUDA_ARCH_LIST")


def fail(message: str) -> NoReturn:
    sys.exit(f"\nerror: {message}")


def say(message: str) -> None:
    print(f"==> {message}", flush=True)


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Lets one process at a time set up; a second one waits, and then finds the work done."""
    import fcntl

    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "environment.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another make is setting up the environment; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Choosing an interpreter: any Python 3 may run this part.


def base_python() -> str:
    """The interpreter that .venv is made from: this one, or a newer one if it is too old."""
    if sys.version_info >= OLDEST_PYTHON:
        return sys.executable
    others = [shutil.which(f"python3.{minor}") for minor in (13, 12, 11, 10)]
    if any(others):
        return next(other for other in others if other)
    fail(
        f"lstm_cuda needs Python 3.10 or newer; python3 is {sys.version.split()[0]}.\n"
        "Install a newer Python, or name one: make test PYTHON=/path/to/python"
    )


def is_new_enough(torch_version: str) -> bool:
    return tuple(int(part) for part in re.findall(r"\d+", torch_version)[:2]) >= OLDEST_TORCH


def folder_of_torch(python: str) -> str | None:
    """The site-packages folder of a usable torch in this interpreter, or None."""
    code = "import torch; print(torch.__version__, torch.__path__[0], sep='\\n')"
    found = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if found.returncode != 0:
        return None
    version, path = found.stdout.decode().splitlines()[-2:]
    return str(Path(path).parent) if is_new_enough(version) else None


def works(python: Path) -> bool:
    command = [str(python), "-c", "import pip"]
    return python.exists() and subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def virtual_environment() -> str:
    """The Python of .venv, made anew if .venv is missing, half made, or lost its interpreter."""
    if VENV.exists() and not STATE.exists() and any(VENV.iterdir()):
        if not works(VENV_PYTHON):  # not made here, so not removed here
            fail(f"{VENV} is there, but without a Python that has pip. Repair or remove it.")
        return str(VENV_PYTHON)
    if STATE.exists() and STATE.read_text() == "ready" and works(VENV_PYTHON):
        return str(VENV_PYTHON)

    base = base_python()
    torch_folder = folder_of_torch(base)
    say(f"Making .venv with {base}" + (f" and its torch ({torch_folder})" if torch_folder else ""))
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    STATE.write_text("half made")
    command = [base, "-m", "venv", str(VENV)]
    if torch_folder:
        command.append("--system-site-packages")
    if subprocess.run(command).returncode != 0:
        shutil.rmtree(VENV)
        fail(
            f"{base} could not make a virtual environment.\n"
            "On Debian and Ubuntu the module for it is a package of its own:\n"
            "    apt-get install python3-venv\n"
            "Or use an environment of your own: make test PYTHON=/path/to/its/python"
        )
    if torch_folder:
        # A base that is itself a virtual environment is not seen by the line above.
        (packages,) = VENV.glob("lib/python3.*/site-packages")
        (packages / "torch-of-base.pth").write_text(torch_folder + "\n")
    STATE.write_text("ready")
    return str(VENV_PYTHON)


# Installing: runs inside the environment, by its own Python.


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Marks .venv as half made while packages are being installed in it."""
    ours = STATE.exists() and Path(sys.prefix) == VENV
    if ours:
        STATE.write_text("half made")
    yield
    if ours:
        STATE.write_text("ready")


def pip_install(*arguments: str) -> bool:
    """Runs pip install; True if it succeeded."""
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if sys.prefix == sys.base_prefix and marker.exists():
        fail(
            f"{sys.executable} belongs to the operating system; packages must not be added to it.\n"
            "Leave PYTHON out (make then makes .venv), or name a virtual environment's Python."
        )
    scripts = sysconfig.get_path("scripts")  # ninja is there
    environment = dict(os.environ, PATH=scripts + os.pathsep + os.environ.get("PATH", ""))
    environment.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_ROOT_USER_ACTION="ignore")
    command = [sys.executable, "-m", "pip", "install", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def requirements(extra: str) -> list[str]:
    """What pyproject.toml asks for: to build, to run, and for one extra."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = settings["project"]["optional-dependencies"]

    def expand(names: list[str]) -> list[str]:
        found = []
        for name in names:
            own = re.fullmatch(r"lstm_cuda\[(.+)\]", name)
            if own:
                found += expand([n for e in own[1].split(",") for n in extras[e]])
            else:
                found.append(name)
        return found

    return settings["build-system"]["requires"] + expand(
        settings["project"]["dependencies"] + extras[extra]
    )


def installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_missing(requirement: str) -> bool:
    from pip._vendor.packaging.requirements import Requirement

    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return False
    version = installed(wanted.name)
    return version is None or not wanted.specifier.contains(version, prereleases=True)


def install_packages(extra: str, own: bool) -> None:
    """Installs what is missing; never replaces a torch in an interpreter that is not ours."""
    missing = [requirement for requirement in requirements(extra) if is_missing(requirement)]
    if any(requirement.startswith("torch>") for requirement in missing):
        if own and installed("torch") is not None:
            fail(
                f"{sys.executable} has torch {installed('torch')}; lstm_cuda needs 2.11 or newer.\n"
                "Upgrade it there, or leave PYTHON out: make then makes an environment of its own."
            )
        missing = [requirement for requirement in missing if not requirement.startswith("torch>")]
        missing.insert(0, TORCH)
    if not missing:
        return
    missing = list(dict.fromkeys(missing))
    say(f"Installing {', '.join(missing)}")
    with interruptible():
        succeeded = pip_install(*missing)
    if not succeeded:
        fail("pip could not install the packages above; its own words say why.")


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        fail(
            f"no C++ compiler: {compiler} is not on PATH. Install one "
            "(Debian and Ubuntu: apt-get install g++), or set CXX."
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        fail(
            f"the headers of Python {version} are missing ({header}).\n"
            f"Install them (Debian and Ubuntu: apt-get install python{version}-dev; "
            f"Fedora: dnf install python{version}-devel)."
        )


def build_key() -> str:
    """Changes when the extension must be compiled again."""
    digest = hashlib.sha256()
    inputs = [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted((ROOT / "csrc").rglob("*"))]
    for path in inputs:
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    variables = [os.environ.get(name) for name in BUILD_VARIABLES]
    digest.update(repr([sys.executable, installed("torch"), variables]).encode())
    return digest.hexdigest()


def is_installed_from_here() -> bool:
    try:
        origin = importlib.metadata.distribution("lstm_cuda").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    return origin is not None and json.loads(origin).get("url") == ROOT.as_uri()


def build() -> None:
    """Compiles the extension and installs this folder, editable, unless that has been done."""
    key = build_key()
    stamp = ROOT / "build" / f"{sys.implementation.cache_tag}.stamp"
    library = ROOT / "lstm_cuda" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    built = stamp.exists() and stamp.read_text() == key and library.exists()
    if built and is_installed_from_here():
        return
    check_compiler()
    say("Building lstm_cuda: some minutes the first time, less when little has changed")
    stamp.unlink(missing_ok=True)
    if not pip_install("--quiet", "--no-deps", "--no-build-isolation", "--editable", "."):
        fail("the build failed; what the compiler said is above. See Troubleshooting in README.md.")
    stamp.write_text(key)


def install(extra: str, own: bool) -> None:
    if sys.version_info < OLDEST_PYTHON:
        fail(f"lstm_cuda needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}")
    if importlib.util.find_spec("pip") is None:
        fail(f"{sys.executable} has no pip. Try: {sys.executable} -m ensurepip")
    install_packages(extra, own)
    if extra != "dev":  # linters read the sources
        build()


def main() -> None:
    arguments = sys.argv[1:]
    installing = arguments[:1] == ["--install"]
    arguments = arguments[installing:]
    own = arguments[:1] == ["--own"]
    extra, *command = arguments[own:]
    if installing:
        return install(extra, own)
    with exclusive():
        python = sys.executable if own else virtual_environment()
        step = [python, __file__, "--install", *(["--own"] if own else []), extra]
        status = subprocess.run(step).returncode
    if status != 0:
        sys.exit(status)
    os.chdir(ROOT)
    os.execv(python, [python, *command])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
