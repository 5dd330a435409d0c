"""The recurrence kernels under emulation, in programs with sanitizers (emulation/recurrence.cpp).

Results are compared with plain loops in float64. AddressSanitizer sees accesses out of bounds to an
element. ThreadSanitizer sees every two accesses that no barrier of the kernel orders, whatever the
order of threads, so it runs one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from emulation import build
from test_mutants import RECURRENCE, sources

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

RUNS = {
    "plain": [("forward", "0"), ("reverse", "0"), *(("random", str(k)) for k in range(1, 9))],
    "asan": [("random", "1")],
    "tsan": [("forward", "0")],
}


@pytest.fixture(scope="module", params=RUNS)
def program(request: pytest.FixtureRequest) -> tuple[Path, str]:
    variant = str(request.param)
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    path = build.FOLDER / f"recurrence-{variant}"
    return build.compile(sources(build.ROOT, RECURRENCE), variant, path), variant


@pytest.mark.parametrize("arithmetic", ["float64", "float32", "tf32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["rec_cta", "rec_step"])
def test_right_and_clean(family: str, arithmetic: str, program: tuple[Path, str]) -> None:
    path, variant = program
    for order in RUNS[variant]:
        done = build.run(path, family, arithmetic, *order, variant=variant)
        assert done.returncode == 0, f"{order}: {done.stdout}{done.stderr}"
        assert done.stdout == ""
