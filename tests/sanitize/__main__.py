"""Runs the CPU kernels under the compiler's sanitizers: addresses and undefined behaviour, threads.

    python tests/sanitize [--isa generic avx2 ...] [--variants asan tsan]

Without --isa: the plain kernels and the widest that this processor runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from emulation import build  # noqa: E402

FOLDER = ROOT / "build" / "sanitize"
VARIANTS = ("asan", "tsan")  # as in emulation/build.py; asan is with undefined behaviour
ISAS = ("generic", "avx2", "avx512", "avx512_bf16")


def compile_program(isa: str, variant: str) -> Path:
    """The program for an instruction set and a sanitizer, up to date with its sources."""
    found = build.toolchain(variant)
    if found is None:
        raise build.CompileError(build.unavailable(variant))
    csrc = ROOT / "csrc"
    flags = [*build.FLAGS, *build.VARIANTS[variant], "-fno-math-errno", f"-DLSTM_ISA={isa}"]
    flags += ["-fno-sanitize-recover=all", f"-I{csrc}", f"-I{ROOT / 'tests'}"]
    sources = [
        ROOT / "tests/sanitize/layer.cpp",
        csrc / "plan.cpp",
        csrc / f"cpu/kernels_{isa}.cpp",
    ]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(lambda s: build._object(s, found[0], flags, FOLDER), sources))
    program = FOLDER / f"layer-{isa}-{variant}"
    build.compiler([found[0], *build.VARIANTS[variant], *objects, "-pthread", "-o", program])
    return program


def run(program: Path, variant: str) -> subprocess.CompletedProcess[str]:
    """Runs it up to the first finding; its last line tells how many layers were right."""
    found = build.toolchain(variant)
    options = {"UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [*(found[1] if found else ()), program], capture_output=True, text=True, timeout=500,
        env={**os.environ, **options},
    )  # fmt: skip


def widest() -> str:
    """The widest instruction set that the built extension uses here."""
    sys.path.insert(0, str(ROOT))
    import lstm_cuda

    return str(lstm_cuda.build_info()["cpu_capability"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", nargs="+", choices=ISAS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    options = parser.parse_args(arguments)
    failed = 0
    for isa in options.isa or dict.fromkeys(["generic", widest()]):
        for variant in options.variants:
            start = time.perf_counter()
            done = run(compile_program(isa, variant), variant)
            failed += done.returncode != 0
            said = done.stdout.strip().splitlines()[-1:] or ["nothing said"]
            print(f"{isa}, {variant}: {said[0]} ({time.perf_counter() - start:.0f} s)", flush=True)
            if done.returncode != 0:
                print(done.stdout + done.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
