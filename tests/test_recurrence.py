"""The recurrence kernels under emulation, in programs with sanitizers.

Results are compared with plain loops in float64. AddressSanitizer sees accesses out of bounds to an
element. ThreadSanitizer sees two accesses that no barrier of the kernel orders, whatever the order
of threads; but it remembers few accesses of a place, so there are two orders.

Families rec_cluster and rec_group run in small shapes, for what depends on the order of threads,
and in the shapes that the product has, for what depends on those.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulation import build
from test_mutants import RECURRENCE, RESIDENT, SMALL, VARIANTS, sources

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

RANDOM = [("random", str(seed)) for seed in range(1, 9)]
RUNS = {
    "plain": [("forward", "0"), ("reverse", "0"), *RANDOM],
    "asan": [("random", "1")],
    "tsan": [("forward", "0"), ("random", "1")],
}
ARITHMETICS = ["float64", "float32", "tf32", "float16", "bfloat16"]
RESIDENT_ARITHMETICS = [a for a in ARITHMETICS if a != "float64"]


def program(driver: str, variant: str) -> Path:
    out = build.FOLDER / f"{Path(driver).stem}-{variant}"
    return build.compile(sources(build.ROOT, driver), variant, out)


@pytest.fixture(scope="module", autouse=True)
def _build_at_once() -> None:
    """All programs in parallel; those that a test cannot build fail there."""
    wanted = [(d, v) for d in (RECURRENCE, VARIANTS, *SMALL.values()) for v in RUNS]
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(program, *w) for w in wanted if not build.unavailable(w[1])]
        for job in [*jobs, pool.submit(program, RESIDENT, "plain")]:
            job.exception()


def assert_right(driver: str, variant: str, order: tuple[str, str], *arguments: str) -> None:
    done = build.run(program(driver, variant), *arguments, *order, variant=variant)
    assert done.returncode == 0, f"{order}: {done.stdout}{done.stderr}"
    assert done.stdout == ""


@pytest.mark.parametrize("variant", RUNS)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("family", ["rec_cta", "rec_step"])
def test_right_and_clean(family: str, arithmetic: str, variant: str) -> None:
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    for order in RUNS[variant]:
        assert_right(RECURRENCE, variant, order, family, arithmetic)


# Arithmetics differ in their products alone, which the test above has all of.
@pytest.mark.parametrize(
    "arithmetic, variant",
    [(a, v) for a in ARITHMETICS for v in RUNS if v == "plain" or a in ("float64", "bfloat16")],
)
def test_other_cells_in_every_order(arithmetic: str, variant: str) -> None:
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    for order in RUNS[variant]:
        assert_right(VARIANTS, variant, order, arithmetic)


# ThreadSanitizer takes ten seconds, and these two differ in all that can race: parts of operands,
# and what is sent.
@pytest.mark.parametrize(
    "arithmetic, variant",
    [
        (arithmetic, variant)
        for arithmetic in RESIDENT_ARITHMETICS
        for variant in RUNS
        if variant != "tsan" or arithmetic in ("float32", "bfloat16")
    ],
)
@pytest.mark.parametrize("family", SMALL)
def test_small_clusters_and_groups(family: str, arithmetic: str, variant: str) -> None:
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    for order in RUNS[variant]:
        assert_right(SMALL[family], variant, order, arithmetic)


@pytest.mark.parametrize("arithmetic", RESIDENT_ARITHMETICS)
@pytest.mark.parametrize("family", ["rec_cluster", "rec_group"])
def test_clusters_and_groups(family: str, arithmetic: str) -> None:
    # Seconds for each order; that of a group's threads is small_group's to vary.
    orders = RUNS["plain"][:3] if family == "rec_cluster" else [RANDOM[0]]
    for order in orders:
        assert_right(RESIDENT, "plain", order, family, arithmetic)
