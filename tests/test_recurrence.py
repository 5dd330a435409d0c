"""The recurrence kernels under emulation, in programs with sanitizers.

Results are compared with plain loops in float64. AddressSanitizer sees accesses out of bounds to an
element. ThreadSanitizer sees two accesses that no barrier of the kernel orders, whatever the order
of threads; but it remembers few accesses of a place, so there are two orders.

Families rec_cluster and rec_group run in small shapes, for what depends on the order of threads,
and in the shapes that the product has, for what depends on those.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulation import build
from emulation.drivers import (
    RECURRENCE,
    RESIDENT,
    SMALL,
    SMALL_VARIANT_CLUSTER,
    VARIANT_CLUSTER,
    VARIANT_CTA,
    VARIANTS,
    sources,
)

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
    drivers = (RECURRENCE, VARIANTS, VARIANT_CTA, SMALL_VARIANT_CLUSTER, *SMALL.values())
    wanted = [(d, v) for d in drivers for v in RUNS]
    wanted += [(RESIDENT, "plain"), (VARIANT_CLUSTER, "plain"), (VARIANT_CLUSTER, "asan")]
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(program, *w) for w in wanted if not build.unavailable(w[1])]
        for job in jobs:
            job.exception()


def assert_right(
    driver: str, variant: str, orders: list[tuple[str, str]], *arguments: str, parts: int = 1
) -> None:
    """In every order. Cases are in so many parts, each a run, as many at once as processors."""
    path = program(driver, variant)
    runs = [(*arguments, *o, f"{part}/{parts}") for o in orders for part in range(parts)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda r: build.run(path, *r, variant=variant), runs)
        for run, result in zip(runs, done, strict=True):
            assert result.returncode == 0, f"{run}: {result.stdout}{result.stderr}"
            assert result.stdout == ""


@pytest.mark.parametrize("variant", RUNS)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("family", ["rec_cta", "rec_step"])
def test_right_and_clean(family: str, arithmetic: str, variant: str) -> None:
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    assert_right(RECURRENCE, variant, RUNS[variant], family, arithmetic)


# Programs of other cells run each case oldest thread first, and then in the order that is given.
OTHER_ORDERS = {v: [order for order in RUNS[v] if order != ("forward", "0")] for v in RUNS}


# Arithmetics differ in their products alone, which the test above has all of.
OF_OTHER_CELLS = pytest.mark.parametrize(
    "arithmetic, variant",
    [(a, v) for a in ARITHMETICS for v in RUNS if v == "plain" or a in ("float64", "bfloat16")],
)


@OF_OTHER_CELLS
def test_other_cells_in_every_order(arithmetic: str, variant: str) -> None:
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    assert_right(VARIANTS, variant, OTHER_ORDERS[variant], arithmetic)


@OF_OTHER_CELLS
def test_other_cells_in_one_block(arithmetic: str, variant: str) -> None:
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    parts = 1 if variant == "plain" else 5  # together they take up to half a minute
    assert_right(VARIANT_CTA, variant, OTHER_ORDERS[variant], arithmetic, parts=parts)


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
    parts = 4 if variant == "tsan" else 1  # together they take up to a minute
    assert_right(SMALL[family], variant, RUNS[variant], arithmetic, parts=parts)


@pytest.mark.parametrize("arithmetic", RESIDENT_ARITHMETICS)
@pytest.mark.parametrize("family", ["rec_cluster", "rec_group"])
def test_clusters_and_groups(family: str, arithmetic: str) -> None:
    # Seconds for each order; that of a group's threads is small_group's to vary.
    orders = RUNS["plain"][:3] if family == "rec_cluster" else [RANDOM[0]]
    assert_right(RESIDENT, "plain", orders, family, arithmetic)


# What the arithmetics share out among threads, plain cells have shown: ThreadSanitizer sees one.
@pytest.mark.parametrize(
    "arithmetic, variant",
    [
        (arithmetic, variant)
        for arithmetic in RESIDENT_ARITHMETICS
        for variant in RUNS
        if variant != "tsan" or arithmetic == "bfloat16"
    ],
)
def test_small_clusters_of_other_cells(arithmetic: str, variant: str) -> None:
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    parts = 2 if variant == "tsan" else 1
    assert_right(SMALL_VARIANT_CLUSTER, variant, OTHER_ORDERS[variant], arithmetic, parts=parts)


@pytest.mark.parametrize("variant", ["plain", "asan"])
@pytest.mark.parametrize("arithmetic", RESIDENT_ARITHMETICS)
def test_clusters_of_other_cells(arithmetic: str, variant: str) -> None:
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    assert_right(VARIANT_CLUSTER, variant, OTHER_ORDERS[variant][:2], arithmetic)
