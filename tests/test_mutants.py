"""Kernels broken on purpose, each of which some test under emulation must notice.

A mutant is a copy of the sources in which one piece of text is another. One that survives says that
a test is missing, or that what it took away was not needed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from emulation import build
from emulation.drivers import sources
from mutants import MUTANTS
from mutants.mutant import BUSY, MICRO_KERNELS, Mutant, cluster, step

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


def noticed(mutant: Mutant) -> str | None:
    """What the mutant's driver said about it; None if it found nothing to complain about."""
    if reason := build.unavailable(mutant.variant):
        pytest.skip(reason)
    root = build.mutate(
        mutant.name, mutant.file, mutant.old, mutant.new, mutant.count, mutant.arithmetic
    )
    program = root / f"driver-{mutant.variant}"
    files = sources(root, mutant.driver)
    build.compile(files, mutant.variant, program, root=root, changed=mutant.file)
    done = build.run(program, *mutant.arguments, variant=mutant.variant)
    assert done.returncode != build.OTHER_ARITHMETIC, f"the driver asked for another: {mutant}"
    return done.stdout + done.stderr if done.returncode else None


Program = tuple[str, tuple[str, ...], str]  # a driver, its arguments, the build


def unbroken(program: Program) -> str | None:
    """The same of the driver itself."""
    driver, arguments, variant = program
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    name = "-".join([*driver.removesuffix(".cpp").split("/"), variant])
    path = build.FOLDER / "mutants" / name
    build.compile(sources(build.ROOT, driver), variant, path)
    done = build.run(path, *arguments, variant=variant)
    return done.stdout + done.stderr if done.returncode else None


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> Iterator[dict[object, Future[str | None]]]:
    """What all that is to be tested had to say, by mutant or program; at work on all processors."""
    jobs = {"mutant": noticed, "program": unbroken}
    ours = [item for item in request.session.items if item.getparent(pytest.Module) is request.node]
    parameters = [spec.params for item in ours if (spec := getattr(item, "callspec", None))]
    wanted = [(jobs[kind], each[kind]) for each in parameters for kind in jobs if kind in each]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {tested: pool.submit(job, tested) for job, tested in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_is_noticed(mutant: Mutant, verdicts: dict[object, Future[str | None]]) -> None:
    assert verdicts[mutant].result()


@pytest.mark.parametrize(
    "program", sorted({(m.driver, m.arguments, m.variant) for m in MUTANTS}), ids=str
)
def test_what_notices_them_passes_without(
    program: Program, verdicts: dict[object, Future[str | None]]
) -> None:
    assert verdicts[program].result() is None


SAME = ("#pragma once", "#pragma once", "plain", "float32")


@pytest.mark.parametrize(
    "copy",
    [step("unbroken", "step_product.cuh", *SAME), cluster("unbroken", "resident.cuh", *SAME, BUSY)],
    ids=lambda m: m.name,
)
def test_a_copy_that_is_not_broken_passes(copy: Mutant) -> None:
    """So that a mutant is noticed for its mutation, not for how and for what it is compiled."""
    assert noticed(copy) is None
    others = tuple("tf32" if each == "float32" else each for each in copy.arguments)
    with pytest.raises(AssertionError, match="asked for another"):
        noticed(dataclasses.replace(copy, arguments=others))


def test_a_mutation_that_no_longer_applies_is_an_error() -> None:
    with pytest.raises(ValueError, match="has 0 of 'no such text', not 1"):
        build.mutate("none", MICRO_KERNELS, "no such text", "")
    with pytest.raises(ValueError, match="not 1"):
        build.mutate("many", MICRO_KERNELS, "ptx::block_sync();", "")
