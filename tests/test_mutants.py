"""Kernels broken on purpose, each of which some test under emulation must notice.

A mutant is a copy of the sources in which one piece of text is another. One that survives says that
a test is missing, or that what it took away was not needed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulation import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

MICRO_KERNELS = "tests/emulation/micro_kernels.cuh"
RECURRENCE = "tests/emulation/recurrence.cpp"


@dataclass(frozen=True)
class Mutant:
    name: str  # what is wrong with it
    file: str
    old: str
    new: str
    variant: str  # of the build that notices
    driver: str = "tests/emulation/test_micro.cpp"  # a program that fails when something is noticed
    arguments: tuple[str, ...] = ()
    count: int = 1  # how often `old` occurs


def of_family(
    family: str, name: str, file: str, old: str, new: str, variant: str, arithmetic: str,
    count: int = 1,
) -> Mutant:  # fmt: skip
    """A mutant of one kernel family, in csrc/cuda."""
    arguments = (family, arithmetic, "forward", "0")
    path = f"csrc/cuda/{file}"
    return Mutant(f"{family}_{name}", path, old, new, variant, RECURRENCE, arguments, count)


cta = functools.partial(of_family, "rec_cta")
step = functools.partial(of_family, "rec_step")


MUTANTS = [
    Mutant(
        "block_sync_missing_before_a_read",
        MICRO_KERNELS,
        "  ptx::block_sync();  // before others read aligned\n",
        "",
        "tsan",
    ),
    Mutant(
        "stage_read_before_it_landed",
        MICRO_KERNELS,
        "ptx::cp_async_wait<1>();",
        "ptx::cp_async_wait<2>();",
        "plain",
    ),
    Mutant(
        "word_tag_of_every_step",
        MICRO_KERNELS,
        "const std::uint32_t tag = 1 - step / 2 % 2;",
        "const std::uint32_t tag = 1 - step % 2;",
        "plain",
    ),
    Mutant(
        "rows_of_a_fragment_swapped",
        MICRO_KERNELS,
        "ptx::ldmatrix_x4(ra, a + lane % 16 * 12 + lane / 16 * 4);",
        "ptx::ldmatrix_x4(ra, a + lane / 2 * 12 + lane % 2 * 4);",
        "plain",
    ),
    step(
        "stage_filled_while_it_is_read",
        "step_product.cuh",
        """\
      // The chunk has landed for all threads, and none reads the stage that is filled next.
      ptx::block_sync();
""",
        "",
        "tsan",
        "bfloat16",
    ),
    step(
        "partial_sums_over_stages_that_are_read",
        "step_product.cuh",
        "ptx::block_sync();  // the stages are read no more; partial sums take their place",
        "",
        "tsan",
        "float32",
    ),
    step(
        "partial_sums_read_too_early",
        "step_product.cuh",
        "ptx::block_sync();  // all partial sums are there",
        "",
        "tsan",
        "float32",
    ),
    step(
        "chunk_read_before_it_landed",
        "step_product.cuh",
        "ptx::cp_async_wait<Tile::kStages - 2>();",
        "ptx::cp_async_wait<Tile::kStages - 1>();",
        "plain",
        "bfloat16",
    ),
    step(
        "state_read_without_waiting_for_the_launch_before",
        "step_product.cuh",
        "    ptx::dependency_wait();\n",
        "",
        "plain",
        "bfloat16",
    ),
    step(
        "gates_swapped",
        "step_product.cuh",
        "sum(2 * octet, n, 2 + j),",
        "sum(2 * octet + 1, n, j),",
        "plain",
        "bfloat16",
    ),
    step(
        "weights_past_the_last_unit",
        "step_product.cuh",
        "const bool exists = unit < o_.rows;",
        "const bool exists = unit < o_.rows + 8;",
        "asan",
        "float32",
    ),
    step(
        "rows_past_the_batch",
        "step_product.cuh",
        "if (b >= o_.B) continue;",
        "if (b > o_.B) continue;",
        "asan",
        "bfloat16",
    ),
    step(
        "state_of_a_frozen_row_lost",
        "rec_step.cuh",
        "        *T::at(p.out, out_at) = *T::at(p.kept, out_at);\n",
        "",
        "plain",
        "float64",
    ),
    step(
        "gradient_over_a_reset",
        "rec_step.cuh",
        "!schedule.fresh(schedule.time(p.step + 1), b)",
        "true",
        "plain",
        "float64",
        count=2,
    ),
    step(
        "state_over_a_reset",
        "rec_step.cuh",
        "fresh ? Compute(0) : *c_state",
        "*c_state",
        "plain",
        "float64",
    ),
    step(
        "one_slot_for_two_steps",
        "rec_step.cu",
        "std::byte* const next = ring + (step + 1) % 2 * slot_bytes;",
        "std::byte* const next = ring + step % 2 * slot_bytes;",
        "tsan",
        "float32",
    ),
    step(
        "initial_state_not_filled_in",
        "rec_step.cu",
        "jobs.fill(p.h0, s.P, ring,",
        "jobs.fill(nullptr, s.P, ring,",
        "plain",
        "float64",
    ),
    step(
        "padding_of_the_depth_not_zeroed",
        "prepare.cu",
        "if (row0 + k >= job.padded_rows || column0 + lane >= job.padded_columns) continue;",
        "if (row0 + k >= job.padded_rows || column0 + lane >= job.columns) continue;",
        "plain",
        "bfloat16",
    ),
    step(
        "tile_written_while_others_read_it",
        "prepare.cu",
        "ptx::block_sync();  // the whole tile is there: rows are read by others than wrote them",
        "",
        "tsan",
        "float64",
    ),
    cta(
        "no_barrier_in_a_step",
        "rec_cta_forward.cu",
        "    ptx::block_sync();  // the four hazards",
        "    // the four hazards",
        "tsan",
        "bfloat16",
    ),
    cta(
        "one_h_for_two_steps",
        "rec_cta_forward.cu",
        "% 2 * Tile::kValues",
        "% 1 * Tile::kValues",
        "tsan",
        "bfloat16",
        count=2,
    ),
    cta(
        "gates_x_read_before_they_landed",
        "rec_cta_forward.cu",
        "cp_async_wait<kSlots - 2>",
        "cp_async_wait<kSlots - 1>",
        "plain",
        "bfloat16",
        count=2,
    ),
    cta(
        "slot_filled_while_it_is_read",
        "rec_cta_forward.cu",
        "fetch(step + kSlots - 1, tile_at + (kSlots - 1) * time_step)",
        "fetch(step + kSlots, tile_at + kSlots * time_step)",
        "plain",
        "bfloat16",
    ),
    cta(
        "state_over_a_reset",
        "rec_cta_forward.cu",
        "fresh >> j & 1 ? Compute(0) : c[j]",
        "c[j]",
        "plain",
        "float64",
    ),
    cta(
        "rows_past_the_batch",
        "rec_cta_forward.cu",
        "return 2 * q + j < part.rows && unit < H;",
        "return unit < H;",
        "asan",
        "bfloat16",
    ),
    cta(
        "steps_past_the_last",
        "rec_cta_forward.cu",
        "if (step < steps && schedule.time(step)",
        "if (schedule.time(step)",
        "asan",
        "float32",
    ),
    cta(
        "a_step_past_the_length",
        "rec_cta_forward.cu",
        "active[j] = t < length[j];",
        "active[j] = t <= length[j];",
        "plain",
        "float64",
    ),
    cta(
        "no_barrier_in_a_step_back",
        "rec_cta_backward.cu",
        "    ptx::block_sync();  // the four hazards",
        "    // the four hazards",
        "tsan",
        "bfloat16",
    ),
    cta(
        "one_dgates_for_two_steps",
        "rec_cta_backward.cu",
        "% 2 * Tile::kValues",
        "% 1 * Tile::kValues",
        "tsan",
        "bfloat16",
        count=2,
    ),
    cta(
        "cell_of_the_wrong_step",
        "rec_cta_backward.cu",
        "c.at(step + 1, column, unit)",
        "c.at(step, column, unit)",
        "plain",
        "float64",
    ),
    cta(
        "dh_over_a_reset",
        "rec_cta_backward.cu",
        " & ~fresh;",
        ";",
        "plain",
        "float64",
    ),
    cta(
        "dc_over_a_reset",
        "rec_cta_backward.cu",
        "(fresh >> j & 1 ? Compute(0) : dc_step)",
        "dc_step",
        "plain",
        "float64",
    ),
    cta(
        "initial_cell_ignored",
        "rec_cta_backward.cu",
        "if (active && t == part.first(length[j]))",
        "if (false)",
        "plain",
        "float64",
    ),
    cta(
        "fragments_swapped",
        "rec_cta_product.cuh",
        "{b[2 * half], b[2 * half + 1]}",
        "{b[2 * half + 1], b[2 * half]}",
        "plain",
        "tf32",
    ),
    cta(
        "weights_past_the_last_unit",
        "rec_cta_product.cuh",
        "if (of_gate < H && column < H)",
        "if (column < H)",
        "asan",
        "float32",
    ),
    cta(
        "weights_read_before_they_are_there",
        "rec_cta_product.cuh",
        "    ptx::block_sync();  // the panel is complete",
        "    // the panel is complete",
        "tsan",
        "float16",
    ),
    cta(
        "weights_overwritten_before_they_are_read",
        "rec_cta_product.cuh",
        "    ptx::block_sync();  // it is read before",
        "    // it is read before",
        "tsan",
        "float16",
    ),
]


def sources(root: Path, driver: str) -> list[Path]:
    """A driver, with the product's sources if it runs the product's kernels."""
    found = [root / driver]
    if driver == RECURRENCE:
        kernels = sorted((root / "csrc/cuda").glob("*.cu"))
        found += [root / "csrc/cuda/plan.cpp", *(k for k in kernels if k.name != "device.cu")]
    return found


def noticed(mutant: Mutant) -> str | None:
    """What the mutant's driver said about it; None if it found nothing to complain about."""
    if reason := build.unavailable(mutant.variant):
        pytest.skip(reason)
    root = build.mutate(mutant.name, mutant.file, mutant.old, mutant.new, mutant.count)
    program = root / f"driver-{mutant.variant}"
    build.compile(sources(root, mutant.driver), mutant.variant, program, root=root)
    done = build.run(program, *mutant.arguments, variant=mutant.variant)
    return done.stdout + done.stderr if done.returncode else None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_is_noticed(mutant: Mutant) -> None:
    assert noticed(mutant)


@pytest.mark.parametrize(
    ("driver", "arguments", "variant"),
    sorted({(m.driver, m.arguments, m.variant) for m in MUTANTS}),
    ids=lambda v: str(v),
)
def test_what_notices_them_passes_without(
    driver: str, arguments: tuple[str, ...], variant: str
) -> None:
    if reason := build.unavailable(variant):
        pytest.skip(reason)
    name = "-".join([*driver.removesuffix(".cpp").split("/"), variant])
    path = build.FOLDER / "mutants" / name
    program = build.compile(sources(build.ROOT, driver), variant, path)
    done = build.run(program, *arguments, variant=variant)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_mutation_that_no_longer_applies_is_an_error() -> None:
    with pytest.raises(ValueError, match="has 0 of 'no such text', not 1"):
        build.mutate("none", MICRO_KERNELS, "no such text", "")
    with pytest.raises(ValueError, match="not 1"):
        build.mutate("many", MICRO_KERNELS, "ptx::block_sync();", "")
