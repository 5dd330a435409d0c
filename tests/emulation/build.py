"""Compiles programs that run CUDA kernels under emulation, and broken copies of them.

By hand: python tests/emulation/build.py VARIANT OUT SOURCE...      (variants: plain, asan, tsan)
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulation"

FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
VARIANTS = {
    "plain": ["-O1"],
    "asan": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-fsanitize=thread", "-fno-omit-frame-pointer"],
}
# Not under test and never instrumented, so that one build serves all programs and mutants. (The
# runtime's sanitizer hooks are weak.)
RUNTIME = sorted((ROOT / "tests/emulation/runtime").glob("*.cpp"))
PROBLEM = ROOT / "tests/emulation/recurrence_problem.cpp"
# g++'s ThreadSanitizer takes a third of a millisecond to start a thread, or a tenth of that with
# runtime/tsan_threads.cpp, clang's 7 microseconds.
COMPILERS = {
    "plain": ["g++", "clang++"],
    "asan": ["g++", "clang++"],
    "tsan": ["clang++", *(f"clang++-{n}" for n in range(22, 13, -1)), "g++"],
}

# What to link programs with, best first.
RUNTIMES: dict[str, list[tuple[str, ...]]] = {
    "plain": [()],
    "asan": [()],
    "tsan": [("-static-libtsan",), ()],
}
# Functions of a runtime that is linked statically; runtime/tsan_threads.cpp has others for them.
WRAPPED = {
    "tsan": [
        "_ZN11__sanitizer13internal_mmapEPvmiiiy",
        "_ZN11__sanitizer15internal_memsetEPvim",
    ]
}

BY_ARITHMETIC = "csrc/cuda/element.cuh"  # where a kernel's arithmetic is chosen
OTHER_ARITHMETIC = 77  # an exit status

_slots = threading.Semaphore(os.cpu_count() or 1)  # compilers at once
_making: dict[Path, threading.Lock] = {}  # files that programs share are made once


class CompileError(RuntimeError):
    pass


def compiler(command: Sequence[str | Path]) -> None:
    """Runs a compiler; no more of them at once than there are processors."""
    with _slots:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _toolkits() -> list[Path]:
    found = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path).resolve().parents[1])
    return [*found, Path("/usr/local/cuda")]


def nvcc() -> Path | None:
    return next((t / "bin/nvcc" for t in _toolkits() if (t / "bin/nvcc").is_file()), None)


def cuda_include() -> Path | None:
    """The folder of cuda_bf16.h: a toolkit's, or that of an nvidia-cuda-runtime wheel."""
    wheels = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/include"))
    candidates = [*(t / "include" for t in _toolkits()), *wheels]
    return next((c for c in candidates if (c / "cuda_bf16.h").is_file()), None)


@functools.cache
def toolchain(variant: str) -> tuple[str, tuple[str, ...], tuple[str, ...]] | None:
    """The first compiler whose programs of that variant link and run, what to put before them, and
    what to link them with.

    ThreadSanitizer may need a fixed address layout (setarch -R) on kernels that randomise widely.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text("#include <vector>\nint main() { return std::vector<int>(3).at(2); }\n")
        for cxx, runtime in itertools.product(COMPILERS[variant], RUNTIMES[variant]):
            if not shutil.which(cxx):
                continue
            command = [cxx, *FLAGS, *VARIANTS[variant], *runtime, str(source), "-o", str(program)]
            if subprocess.run(command, capture_output=True).returncode:
                continue
            for before in ((), ("setarch", "-R")):
                if before and not shutil.which(before[0]):
                    continue
                if subprocess.run([*before, program], capture_output=True).returncode == 0:
                    return cxx, before, runtime
    return None


def unavailable(*variants: str) -> str | None:
    """Why programs cannot be built here, or None."""
    if not cuda_include():
        return "needs the CUDA headers (cuda_bf16.h): set CUDA_HOME"
    missing = [v for v in variants or ("plain",) if not toolchain(v)]
    return f"no C++20 compiler here builds and runs: {', '.join(missing)}" if missing else None


def _dependencies(target: Path) -> list[str]:
    """The files that an object was compiled from, as the compiler's -MMD file names them."""
    listing = target.with_suffix(".d").read_text()
    return [
        os.path.normpath(name) for name in listing.replace("\\\n", " ").split(":", 1)[1].split()
    ]


def _newest(target: Path) -> float:
    """The time of the newest file that an object was compiled from; inf where one is gone."""
    try:
        return max(os.stat(name).st_mtime for name in _dependencies(target))
    except FileNotFoundError:
        return float("inf")


def _object(source: Path, cxx: str, flags: Sequence[str], folder: Path) -> Path:
    """The up-to-date object of a source."""
    key = hashlib.sha256("\n".join([cxx, *flags, str(source)]).encode()).hexdigest()[:12]
    target = folder / f"{source.stem}-{key}.o"
    dependencies = target.with_suffix(".d")
    folder.mkdir(parents=True, exist_ok=True)
    with _making.setdefault(target, threading.Lock()):
        if target.exists() and dependencies.exists() and _newest(target) < target.stat().st_mtime:
            return target
        # Another process may build at the same time.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, "made.o")
            language = ["-x", "c++"] if source.suffix in (".cu", ".cuh") else []
            listing = ["-MMD", "-MF", made.with_suffix(".d")]
            compiler([cxx, *flags, *listing, "-c", *language, source, "-o", made])
            os.replace(made.with_suffix(".d"), dependencies)
            os.replace(made, target)
    return target


def compile(
    sources: Iterable[Path | str],
    variant: str,
    out: Path | str,
    defines: Sequence[str] = (),
    shared: bool = False,
    root: Path = ROOT,
    changed: str = "",
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
) -> Path:
    """Builds a program (or with `shared` a library) from sources and the emulation's runtime.

    Only what changed is compiled again. `root`: a tree made by `mutate`, from which comes all that
    includes `changed`, the file that it mutated.
    The define LSTM_EMULATE_UCONTEXT makes the runtime switch as on processors other than x86-64.
    `flags` are for compiling what includes torch, which csrc/cuda does not: its objects are those
    of other programs. `libraries` are for the linker.
    """
    headers = cuda_include()
    found = toolchain(variant)
    if not headers or not found:
        raise CompileError(unavailable(variant))
    cxx, out = found[0], Path(out)
    plain = toolchain("plain")

    def job(tree: Path, source: Path) -> tuple[Path, str, list[str]]:
        if source in (*RUNTIME, PROBLEM):
            return source, plain[0] if plain else cxx, [*FLAGS, "-O2", *(f"-D{d}" for d in defines)]
        include = [f"-I{tree / p}" for p in ("csrc", "tests/emulation")]
        options = ["-DLSTM_EMULATE", *(f"-D{d}" for d in defines), "-isystem", str(headers)]
        own = () if source.parent == tree / "csrc/cuda" else flags
        return source, cxx, [*FLAGS, *options, *include, *own, *VARIANTS[variant]]

    def mutated(source: Path) -> tuple[Path, str, list[str]]:
        """The job of a mutant's source, or the original's where the mutation does not reach."""
        original = job(ROOT, ROOT / source.relative_to(root))
        if str(ROOT / changed) not in _dependencies(_object(*original, FOLDER / "objects")):
            return original
        *broken, options = job(root, source)
        # What a mutation leaves unused is no matter. Compiling takes longer than running.
        return *broken, [*options, "-w", "-O0", "-g0"]

    paths = [Path(s).resolve() for s in sources]
    if root == ROOT:
        wanted = [job(root, path) for path in paths]
    else:
        with ThreadPoolExecutor() as pool:
            wanted = list(pool.map(mutated, paths))
    wanted += [job(ROOT, path) for path in RUNTIME]
    with ThreadPoolExecutor(max_workers=len(wanted)) as pool:
        objects = list(pool.map(lambda w: _object(*w, FOLDER / "objects"), wanted))
    stamp = max(o.stat().st_mtime for o in objects)
    listed = out.with_name(out.name + ".objects")
    names = "\n".join(map(str, objects))
    with _making.setdefault(out, threading.Lock()):
        if (
            out.exists()
            and out.stat().st_mtime > stamp
            and listed.exists()
            and listed.read_text() == names
        ):
            return out
        out.parent.mkdir(parents=True, exist_ok=True)
        link = [*found[2], *(f"-Wl,--wrap={name}" for name in WRAPPED.get(variant, []))]
        link += ["-shared"] if shared else []
        compiler([cxx, *VARIANTS[variant], *link, *objects, *libraries, "-o", out])
        listed.write_text(names)
    return out


def run(
    program: Path, *arguments: str, variant: str = "plain", timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs a program of `compile`; what subprocess.run returns."""
    found = toolchain(variant)
    options = {
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": "halt_on_error=1:history_size=4:exitcode=66:atexit_sleep_ms=0",
    }
    return subprocess.run(
        [*(found[1] if found else ()), program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **options},
    )


def _replaced(file: str, old: str, new: str, count: int = 1) -> str:
    """The text of a file in which `old`, which must occur exactly `count` times, is `new`."""
    text = (ROOT / file).read_text()
    if text.count(old) != count:
        raise ValueError(f"{file} has {text.count(old)} of {old!r}, not {count}")
    return text.replace(old, new)


def mutate(
    name: str, file: str, old: str, new: str, count: int = 1, arithmetic: str | None = None
) -> Path:
    """A copy of the kernels and of the emulation's tests in which `old` is `new` in one file.

    Args:
        name: of the copy, a folder's name.
        file: relative to the root, under csrc/ or tests/emulation/.
        old: must occur exactly `count` times; all are replaced.
        arithmetic: the only one that the copy has kernels for, which takes a quarter of the time
            to compile; a program that is asked for another exits with OTHER_ARITHMETIC.

    Returns:
        The copy's root, for `compile(..., root=..., changed=file)`.
    """
    changed = {}
    if arithmetic:
        kind = f"Arithmetic::{arithmetic}"
        only = f"""if (arithmetic != {kind}) ::_Exit({OTHER_ARITHMETIC});
  if constexpr (true) return start.template operator()<{kind}>();
  else switch (arithmetic) {{"""
        changed[BY_ARITHMETIC] = _replaced(BY_ARITHMETIC, "switch (arithmetic) {", only)
    changed[file] = _replaced(file, old, new, count)
    target = FOLDER / "mutants" / name
    copies = [p for folder in ("csrc", "tests/emulation") for p in (ROOT / folder).rglob("*")]
    for path in copies:
        if not path.is_file() or path.suffix not in (".h", ".hpp", ".cuh", ".cu", ".cpp"):
            continue
        relative = path.relative_to(ROOT)
        content = changed.get(relative.as_posix()) or path.read_text()
        copy = target / relative
        # An unchanged file keeps its time, and with it its objects.
        if not copy.exists() or copy.read_text() != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(content)
    return target


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in VARIANTS:
        sys.exit(__doc__)
    try:
        compile(sys.argv[3:], sys.argv[1], sys.argv[2])
    except CompileError as error:
        sys.exit(str(error))
