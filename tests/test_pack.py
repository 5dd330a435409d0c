"""Weights packed for kernels that keep them, under emulation (emulation/pack.cpp).

Every packed value and scale is compared with the one that csrc/cuda/resident.h puts there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from emulation import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

# The shapes that kernels are compiled for take seconds; sanitizers and orders of threads see enough
# in small ones.
RUNS = {
    "plain": [
        ("compiled", "forward", "0"),
        ("small", "reverse", "0"),
        *(("small", "random", str(seed)) for seed in range(1, 5)),
    ],
    "asan": [("small", "random", "1")],
    "tsan": [("small", "forward", "0")],
}


@pytest.fixture(scope="module", params=RUNS)
def program(request: pytest.FixtureRequest) -> tuple[Path, str]:
    variant = str(request.param)
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    sources = [build.ROOT / "tests/emulation/pack.cpp", build.ROOT / "csrc/cuda/pack.cu"]
    return build.compile(sources, variant, build.FOLDER / f"pack-{variant}"), variant


@pytest.mark.parametrize("arithmetic", ["float32", "tf32", "float16", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_weight_is_where_it_belongs(
    direction: str, arithmetic: str, program: tuple[Path, str]
) -> None:
    path, variant = program
    for run in RUNS[variant]:
        done = build.run(path, arithmetic, direction, *run, variant=variant)
        assert done.returncode == 0, f"{run}: {done.stdout}{done.stderr}"
        assert done.stdout == ""
