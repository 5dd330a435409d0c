"""Kernels broken on purpose, each of which some test under emulation must notice.

A mutant is a copy of the sources in which one piece of text is another. One that survives says that
a test is missing, or that what it took away was not needed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from emulation import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

MICRO_KERNELS = "tests/emulation/micro_kernels.cuh"
RECURRENCE = "tests/emulation/recurrence.cpp"
VARIANTS = "tests/emulation/variants.cpp"
VARIANT_CTA = "tests/emulation/variant_cta.cpp"
RESIDENT = "tests/emulation/resident.cpp"
VARIANT_CLUSTER = "tests/emulation/variant_cluster.cpp"
SMALL_VARIANT_CLUSTER = "tests/emulation/small_variant_cluster.cpp"
SMALL = {f: f"tests/emulation/small_{f}.cpp" for f in ("cluster", "group")}
# What drivers need of csrc/cuda.
STEP_VARIANTS = [
    *("plan.cpp", "prepare.cu", "rec_step.cu", "step_project.cu"),
    *("variant_forward.cu", "variant_backward.cu"),
]
KERNELS = {
    RECURRENCE: ["plan.cpp", "prepare.cu", "rec_cta_*.cu", "rec_step.cu", "step_*.cu"],
    VARIANTS: STEP_VARIANTS,
    VARIANT_CTA: [*STEP_VARIANTS, "cell_norms.cu", "variant_cta_*.cu"],
    VARIANT_CLUSTER: [*STEP_VARIANTS, "cell_norms.cu", "pack.cu", "variant_cluster_*.cu"],
    SMALL_VARIANT_CLUSTER: [*STEP_VARIANTS, "cell_norms.cu", "pack.cu"],
    RESIDENT: ["plan.cpp", "pack.cu", "rec_cluster*.cu", "rec_group*.cu"],
    SMALL["cluster"]: ["plan.cpp", "pack.cu"],
    SMALL["group"]: ["plan.cpp", "pack.cu"],
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str  # what is wrong with it
    file: str
    old: str
    new: str
    variant: str  # of the build that notices
    driver: str = "tests/emulation/test_micro.cpp"  # a program that fails when something is noticed
    arguments: tuple[str, ...] = ()
    count: int = 1  # how often `old` occurs
    arithmetic: str | None = None  # of all kernels that the driver then starts; None: any


def of_family(
    family: str, name: str, file: str, old: str, new: str, variant: str, arithmetic: str,
    count: int = 1,
) -> Mutant:  # fmt: skip
    """A mutant of one kernel family, in csrc/cuda."""
    arguments = (family, arithmetic, "forward", "0")
    path = f"csrc/cuda/{file}"
    return Mutant(
        f"{family}_{name}", path, old, new, variant, RECURRENCE, arguments, count, arithmetic
    )


def of_variants(name: str, file: str, old: str, new: str, variant: str, case: int) -> Mutant:
    """A mutant of rec_step for other cells, which one case of variants.cpp notices."""
    arithmetic, path = "float32", f"csrc/cuda/{file}"
    arguments = (arithmetic, "reverse", "0", str(case))
    return Mutant(
        f"variant_{name}", path, old, new, variant, VARIANTS, arguments, arithmetic=arithmetic
    )


def of_variant_family(
    family: str, name: str, file: str, old: str, new: str, variant: str, arithmetic: str, case: int,
) -> Mutant:  # fmt: skip
    """A mutant of another family for other cells, which one case of variant_cases.hpp notices."""
    driver = {"cta": VARIANT_CTA, "cluster": SMALL_VARIANT_CLUSTER}[family]
    arguments = (arithmetic, "random", "1", str(case))
    name, path = f"variant_{family}_{name}", f"csrc/cuda/{file}"
    return Mutant(name, path, old, new, variant, driver, arguments, arithmetic=arithmetic)


cta = functools.partial(of_family, "rec_cta")
variant_cta = functools.partial(of_variant_family, "cta")
variant_cluster = functools.partial(of_variant_family, "cluster")
step = functools.partial(of_family, "rec_step")


def of_small(
    family: str, name: str, file: str, old: str, new: str, variant: str, arithmetic: str, case: int,
    count: int = 1, order: str = "forward 0",
) -> Mutant:  # fmt: skip
    """A mutant of rec_cluster or rec_group, which one case of the small shapes notices."""
    arguments = (arithmetic, *order.split(), str(case))
    driver, path = SMALL[family], f"csrc/cuda/{file}"
    return Mutant(
        f"rec_{family}_{name}", path, old, new, variant, driver, arguments, count, arithmetic
    )


cluster = functools.partial(of_small, "cluster")
group = functools.partial(of_small, "group")
# Cases of variant_cases.hpp: all options at once, without norm and with it.
OPTIONS, NORM = 1, 8
# Cases of small_resident.hpp.
BUSY, SPLIT, CHUNKS, DIFFERENT_ROWS, NAN, TURNS, CHUNKS_IN_TURNS = 0, 1, 2, 12, 13, 14, 15


MUTANTS = [
    of_variants(
        "sums_read_before_they_are_there",
        "step_product.cuh",
        "    ptx::block_sync();  // all sums are there\n",
        "",
        "tsan",
        0,
    ),
    of_variants(
        "totals_read_too_early",
        "step_variant.cuh",
        "    ptx::block_sync();  // the totals of all warps are there\n",
        "",
        "tsan",
        1,
    ),
    of_variants(
        "totals_overwritten_while_they_are_read",
        "step_variant.cuh",
        "    ptx::block_sync();  // they are read no more\n",
        "",
        "tsan",
        1,
    ),
    of_variants(
        "rows_without_waiting_for_their_products",
        "step_variant.cuh",
        "    ptx::dependency_wait();\n",
        "",
        "tsan",
        1,
    ),
    of_variants(
        "units_past_the_last",
        "step_product.cuh",
        "if (unit >= o_.rows || b >= o_.B) continue;",
        "if (b >= o_.B) continue;",
        "asan",
        0,
    ),
    variant_cluster(
        "norms_not_waited_for",
        "forward_cells.cuh",
        "    totals_.wait(slot, at.step);\n",
        "",
        "tsan",
        "float32",
        NORM,
    ),
    variant_cluster(
        "norms_of_c_and_of_products_in_one_slot",
        "forward_cells.cuh",
        "enum Slot { of_product, of_c, kTotals };",
        "enum Slot { of_product, of_c = of_product, kTotals };",
        "plain",
        "float32",
        NORM,
    ),
    variant_cluster(
        "product_of_h0_over_a_reset",
        "forward_cells.cuh",
        "!p_.h0_product || fresh ||",
        "!p_.h0_product ||",
        "plain",
        "float32",
        NORM,
    ),
    variant_cluster(
        "totals_not_waited_for",
        "variant_backward_cells.cuh",
        "    totals_.wait(slot, step);\n",
        "",
        "tsan",
        "float32",
        NORM,
    ),
    variant_cluster(
        "totals_of_c_and_of_products_in_one_slot",
        "variant_backward_cells.cuh",
        "enum Slot { kOfC, kOfProducts };",
        "enum Slot { kOfC, kOfProducts = kOfC };",
        "plain",
        "float32",
        NORM,
    ),
    variant_cluster(
        "lanes_of_another_row_added_up",
        "variant_backward_cells.cuh",
        "using Lanes = Quarter<2, 16>;",
        "using Lanes = Quarter<8, 16>;",
        "plain",
        "float32",
        NORM,
    ),
    variant_cluster(
        "what_zoneout_leaves_over_a_reset",
        "variant_backward_cells.cuh",
        "fresh || !(keep > 0) ? 0.f",
        "!(keep > 0) ? 0.f",
        "plain",
        "float32",
        NORM,
    ),
    variant_cluster(
        "weights_of_norm_for_padding",
        "variant_backward_cells.cuh",
        "from && of_block < H ?",
        "from ?",
        "asan",
        "float32",
        NORM,
    ),
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
        "sums_over_stages_that_are_read",
        "step_product.cuh",
        "if constexpr (Tile::kDepthWarps == 1) ptx::block_sync();",
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
        "step_cells.cuh",
        "!schedule.fresh(schedule.time(p.step + 1), b)",
        "true",
        "plain",
        "float64",
    ),
    step(
        "state_over_a_reset",
        "step_cells.cuh",
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
        "jobs.fill(p.h_operand ? p.h_operand : p.h0, s.P, ring,",
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
        "rec_cta_team.cuh",
        "    ptx::block_sync();  // the two hazards",
        "    // the two hazards",
        "tsan",
        "bfloat16",
    ),
    cta(
        "one_h_for_two_steps",
        "rec_cta_team.cuh",
        "step % 2 * Tile::kValues",
        "step % 1 * Tile::kValues",
        "tsan",
        "bfloat16",
    ),
    cta(
        "rows_past_the_batch",
        "forward_memory.cuh",
        "if (!(in_batch >> j & 1)) continue;",
        "",
        "asan",
        "float32",
    ),
    cta(
        "steps_past_the_last",
        "rec_forward.cuh",
        "if (step < steps) {",
        "if (true) {",
        "asan",
        "float32",
    ),
    cta(
        "state_of_a_row_that_has_not_begun_lost",
        "rec_forward.cuh",
        "Team::kTakesState && !live ? to_compute(h[i][j]) : m[j]",
        "m[j]",
        "plain",
        "float64",
    ),
    cta(
        "initial_state_over_a_reset",
        "rec_forward.cuh",
        "fresh[i] >> j & 1 ? Compute(0) : cell.read(",
        "cell.read(",
        "plain",
        "float64",
    ),
    cta(
        "no_barrier_in_a_step_back",
        "rec_cta_backward.cuh",
        "    ptx::block_sync();  // the four hazards",
        "    // the four hazards",
        "tsan",
        "bfloat16",
    ),
    cta(
        "one_dgates_for_two_steps",
        "rec_cta_backward.cuh",
        "% 2 * Tile::kValues",
        "% 1 * Tile::kValues",
        "tsan",
        "bfloat16",
        count=2,
    ),
    cta(
        "cell_of_the_wrong_step",
        "rec_cta_backward.cuh",
        "rings.c.at(now.step + 1, column(i), unit(i))",
        "rings.c.at(now.step, column(i), unit(i))",
        "plain",
        "float64",
    ),
    cta(
        "dh_over_a_reset",
        "rec_cta_backward.cuh",
        " & ~fresh;",
        ";",
        "plain",
        "float64",
    ),
    cta(
        "dc_over_a_reset",
        "rec_cta_backward.cuh",
        "(now.is_fresh(i) ? Compute(0) : dc_step)",
        "dc_step",
        "plain",
        "float64",
    ),
    cta(
        "initial_cell_ignored",
        "rec_cta_backward.cuh",
        "if (active(i, now.t) && now.t == part.first(length(i)))",
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
    # ---- rec_cta, other cells ----
    variant_cta(
        "units_past_the_last_normalised",
        "forward_cells.cuh",
        "const bool exists = lane() / 4 < units;",
        "const bool exists = true;",
        "plain",
        "float32",
        NORM,
    ),
    variant_cta(
        "h_multiplied_without_its_scale",
        "forward_cells.cuh",
        "if (!v_.h_scale || !at.exists[j]) return h;",
        "return h;",
        "plain",
        "float32",
        OPTIONS,
    ),
    variant_cta(
        "left_over_of_zoneout_kept_over_a_reset",
        "variant_cta_backward.cuh",
        "(now.is_fresh(i) ? Compute(0) : left)",
        "left",
        "plain",
        "float32",
        OPTIONS,
    ),
    variant_cta(
        "sums_of_steps_not_added_up",
        "variant_cta_backward.cuh",
        "dw[2 * own_.H] += ",
        "dw[2 * own_.H] = ",
        "plain",
        "float32",
        OPTIONS,
    ),
    variant_cta(
        "totals_read_too_early",
        "unit_totals.cuh",
        "LSTM_DEVICE void wait(int, int) const { ptx::block_sync(); }",
        "LSTM_DEVICE void wait(int, int) const {}",
        "tsan",
        "bfloat16",
        NORM,
    ),
    variant_cta(
        "totals_overwritten_while_they_are_read",
        "variant_cta_backward.cuh",
        "total(1, 4 * own_.H, of_h)",
        "total(0, 4 * own_.H, of_h)",
        "tsan",
        "bfloat16",
        NORM,
    ),
    variant_cta(
        "units_past_the_last_in_totals",
        "variant_cta_backward.cuh",
        "sum[j] = active && i % 2 == j ? ",
        "sum[j] = i % 2 == j ? ",
        "plain",
        "float32",
        NORM,
    ),
    # ---- rec_cluster ----
    cluster(
        "barrier_not_armed_again",
        "exchange_cluster.cuh",
        "      if (warp() % F::kGroups == 0 && lane() == 0) ptx::mbarrier_expect(bar, kBytes);\n",
        "",
        "plain",
        "bfloat16",
        BUSY,
    ),
    cluster(
        "wrong_parity",
        "exchange_cluster.cuh",
        "unsigned(step - 1) / 2 % 2",
        "unsigned(step) / 2 % 2",
        "plain",
        "bfloat16",
        BUSY,
    ),
    cluster(
        "one_h_for_two_steps",
        "exchange_cluster.cuh",
        "h_ + buffer * kBuffer",
        "h_",
        "tsan",
        "bfloat16",
        BUSY,
        count=2,
    ),
    cluster(
        "one_barrier_for_two_steps",
        "exchange_cluster.cuh",
        "bars_ + buffer * kBars",
        "bars_",
        "plain",
        "bfloat16",
        BUSY,
        count=2,
    ),
    cluster(
        "second_chunk_not_waited_for",
        "exchange_cluster.cuh",
        "      ptx::mbarrier_wait(bar, unsigned(step - 1) / 2 % 2);\n",
        "      if (chunk == 0) ptx::mbarrier_wait(bar, unsigned(step - 1) / 2 % 2);\n",
        "tsan",
        "float16",
        CHUNKS,
    ),
    cluster(
        "depth_of_another_warp_waited_for",
        "exchange_cluster.cuh",
        "split_ * kChunks + chunk;",
        "(split_ ^ 1) * kChunks + chunk;",
        "tsan",
        "float16",
        BUSY,
    ),
    cluster(
        "sent_before_all_blocks_run",
        "exchange_cluster.cuh",
        "ptx::cluster_sync();  // all blocks have begun",
        "ptx::block_sync();  //",
        "plain",
        "bfloat16",
        BUSY,
        order="reverse 0",
    ),
    cluster(
        "sent_in_the_last_step",
        "rec_forward.cuh",
        "if (step + 1 < steps) team.send",
        "team.send",
        "plain",
        "bfloat16",
        BUSY,
    ),
    cluster(
        "columns_of_a_packet_swapped",
        "exchange_cluster.cuh",
        "uint4{low2, high2, low, high} : uint4{low, high, low2, high2}",
        "uint4{low, high, low2, high2} : uint4{low2, high2, low, high}",
        "plain",
        "bfloat16",
        BUSY,
    ),
    cluster(
        "partial_sums_in_one_buffer",
        "resident_team.cuh",
        "((turn % 2 * F::kGroups + group)",
        "((0 * F::kGroups + group)",
        "tsan",
        "tf32",
        SPLIT,
    ),
    cluster(
        "partial_sums_at_one_barrier",
        "resident_team.cuh",
        "1 + unsigned(turn % 2 * F::kGroups + group)",
        "1 + unsigned(group)",
        "plain",
        "tf32",
        BUSY,
        order="reverse 0",
    ),
    cluster(
        "partial_sums_not_waited_for",
        "resident_team.cuh",
        "ptx::named_sync(barrier, 32 * F::kSplit);",
        "ptx::named_arrive(barrier, 32 * F::kSplit);",
        "tsan",
        "tf32",
        SPLIT,
    ),
    cluster(
        "gates_x_read_before_they_landed",
        "rec_forward.cuh",
        "cp_async_wait<F::kSlots - 2>",
        "cp_async_wait<F::kSlots - 1>",
        "plain",
        "bfloat16",
        BUSY,
    ),
    cluster(
        "gates_x_read_before_other_lanes_waited",
        "rec_forward.cuh",
        "    ptx::warp_sync();  // the ring's slot",
        "    // the ring's slot",
        "tsan",
        "tf32",
        BUSY,
    ),
    cluster(
        "slot_filled_while_it_is_read",
        "rec_forward.cuh",
        "fetch(step + F::kSlots - 1, tile_at + (F::kSlots - 1) * time_step);",
        "fetch(step + F::kSlots, tile_at + F::kSlots * time_step);",
        "plain",
        "bfloat16",
        BUSY,
    ),
    cluster(
        "state_over_a_reset",
        "rec_forward.cuh",
        "begins ? Compute(0) : c[i][j]",
        "c[i][j]",
        "plain",
        "tf32",
        BUSY,
    ),
    cluster(
        "h_over_a_reset",
        "rec_forward.cuh",
        "fresh[i] >> (2 + j) & 1 ? Compute(0) : cell.read(",
        "cell.read(",
        "plain",
        "tf32",
        BUSY,
    ),
    cluster(
        "a_step_past_the_length",
        "rec_forward.cuh",
        "const bool live = t < length[i][j];",
        "const bool live = t <= length[i][j];",
        "plain",
        "tf32",
        BUSY,
    ),
    cluster(
        "rows_past_the_batch",
        "forward_memory.cuh",
        "if (!(in_batch >> j & 1)) continue;",
        "",
        "asan",
        "tf32",
        BUSY,
    ),
    cluster(
        "sums_not_scaled_back",
        "resident_team.cuh",
        "for (int i = 0; i < F::kOwned * 8 && kScaled; ++i)",
        "for (int i = 0; false; ++i)",
        "plain",
        "float32",
        BUSY,
    ),
    cluster(
        "low_parts_left_out",
        "resident.cuh",
        "      mma(sets[1], a[0], b[1]);\n",
        "",
        "plain",
        "float32",
        BUSY,
    ),
    cluster(
        "barrier_not_armed_again_in_backward",
        "reduce_cluster.cuh",
        "      if (ptx::thread_index() == 0) ptx::mbarrier_expect(bar, kBytes);\n",
        "",
        "plain",
        "bfloat16",
        BUSY,
    ),
    cluster(
        "wrong_parity_in_backward",
        "reduce_cluster.cuh",
        "unsigned(step) / 2 % 2",
        "unsigned(step + 1) / 2 % 2",
        "plain",
        "bfloat16",
        BUSY,
    ),
    cluster(
        "h_of_the_other_turn",
        "exchange_cluster.cuh",
        "step % 2 * F::kTurns + turn",
        "step % 2 * F::kTurns + 1 - turn",
        "plain",
        "bfloat16",
        TURNS,
    ),
    cluster(
        "turns_at_one_barrier_of_h",
        "exchange_cluster.cuh",
        "bars_ + buffer * kBars",
        "bars_ + step % 2 * F::kTurns * kBars",
        "plain",
        "bfloat16",
        CHUNKS_IN_TURNS,
        count=2,
    ),
    cluster(
        "partial_sums_of_turns_not_waited_for",
        "resident_team.cuh",
        "Exchange::kOrders && F::kTurns == 1",
        "Exchange::kOrders",
        "plain",
        "bfloat16",
        TURNS,
        order="reverse 0",
    ),
    cluster(
        "cells_of_the_other_turn",
        "rec_forward.cuh",
        "const int i = turn * F::kOwned + own;",
        "const int i = (F::kTurns - 1 - turn) * F::kOwned + own;",
        "plain",
        "bfloat16",
        TURNS,
    ),
    cluster(
        "dgates_of_turns_in_one_buffer",
        "rec_backward_product.cuh",
        "turn % kBuffers",
        "turn / F::kTurns % kBuffers",
        "tsan",
        "tf32",
        TURNS,
        count=4,
    ),
    cluster(
        "sums_of_turns_in_one_buffer",
        "reduce_cluster.cuh",
        "sums_ + buffer * kBuffer",
        "sums_ + step % 2 * F::kTurns * kBuffer",
        "tsan",
        "bfloat16",
        CHUNKS_IN_TURNS,
        count=2,
    ),
    cluster(
        "sums_of_two_steps_in_one_buffer",
        "reduce_cluster.cuh",
        "sums_ + buffer * kBuffer",
        "sums_",
        "tsan",
        "bfloat16",
        BUSY,
        count=2,
    ),
    cluster(
        "second_chunk_of_sums_not_waited_for",
        "reduce_cluster.cuh",
        "      ptx::mbarrier_wait(bar, unsigned(step) / 2 % 2);\n",
        "      if (chunk == 0) ptx::mbarrier_wait(bar, unsigned(step) / 2 % 2);\n",
        "tsan",
        "float16",
        CHUNKS,
    ),
    cluster(
        "one_dgates_for_two_steps",
        "reduce_cluster.cuh",
        "kOperands = 2",
        "kOperands = 1",
        "tsan",
        "bfloat16",
        BUSY,
        order="random 1",
    ),
    cluster(
        "dgates_multiplied_before_they_are_there",
        "rec_backward.cuh",
        "    ptx::block_sync();  // the hazards",
        "    // the hazards",
        "tsan",
        "bfloat16",
        BUSY,
    ),
    cluster(
        "inputs_read_before_they_landed",
        "rec_backward.cuh",
        "cp_async_wait<kSlots - 2>",
        "cp_async_wait<kSlots - 1>",
        "plain",
        "bfloat16",
        BUSY,
    ),
    cluster(
        "inputs_read_before_other_lanes_waited",
        "rec_backward.cuh",
        "      ptx::warp_sync();  // the slots of this step",
        "      // the slots of this step",
        "tsan",
        "bfloat16",
        BUSY,
    ),
    cluster(
        "gradient_over_a_reset",
        "rec_backward.cuh",
        "(cells.has(t) && !(cells.flags & Cells::kFresh) ? Cells::kCrossed : 0)",
        "(cells.has(t) ? Cells::kCrossed : 0)",
        "plain",
        "tf32",
        BUSY,
    ),
    cluster(
        "dc_over_a_reset",
        "rec_backward.cuh",
        "(fresh ? 0.f : dc_step)",
        "dc_step",
        "plain",
        "tf32",
        BUSY,
    ),
    cluster(
        "initial_cell_ignored",
        "rec_backward.cuh",
        "if (active && t == cells.own.first(0))",
        "if (false)",
        "plain",
        "tf32",
        BUSY,
    ),
    cluster(
        "sizes_of_some_lanes_ignored",
        "rec_backward_product.cuh",
        "    size = larger(size, ptx::shuffle_xor(size, 16));\n",
        "",
        "plain",
        "tf32",
        DIFFERENT_ROWS,
    ),
    cluster(
        "scale_of_another_column",
        "rec_backward_product.cuh",
        "unsigned(lane() % 4 * 8 + 4)",
        "unsigned(lane() % 4 * 8)",
        "plain",
        "tf32",
        DIFFERENT_ROWS,
    ),
    # ---- rec_group ----
    group(
        "words_of_all_uses_alike",
        "exchange_group.cuh",
        "(step - 1) / 2 % 2 ? 0u : kTag",
        "kTag",
        "plain",
        "bfloat16",
        BUSY,
    ),
    group(
        "one_slot_for_two_steps",
        "exchange_group.cuh",
        "words_ + step % 2 * kSlotWords",
        "words_",
        "plain",
        "bfloat16",
        BUSY,
    ),
    group(
        "one_word_of_four_looked_at",
        "exchange_group.cuh",
        "((v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag)) & kTag",
        "(v.x ^ tag) & kTag",
        "plain",
        "bfloat16",
        BUSY,
    ),
    group(
        "nan_lost",
        "exchange_group.cuh",
        "if (larger & kTag) b[0][0] = 0x7FFF7FFFu;",
        "",
        "plain",
        "bfloat16",
        NAN,
    ),
    group(
        "nan_sent_as_it_is",
        "exchange_group.cuh",
        "      if (h1 != h1) w = (w & 0x0000FFFFu) | (part == 0 ? kNaN << 16 : 0u);\n",
        "",
        "plain",
        "bfloat16",
        NAN,
    ),
    group(
        "words_not_zeroed",
        "pack.cu",
        "p.words[i] = uint4{0, 0, 0, 0};",
        ";",
        "plain",
        "bfloat16",
        BUSY,
    ),
    group(
        "partial_sums_in_one_buffer",
        "resident_team.cuh",
        "((turn % 2 * F::kGroups + group)",
        "((0 * F::kGroups + group)",
        "tsan",
        "bfloat16",
        BUSY,
        order="random 1",
    ),
    group(
        "sums_of_all_uses_alike",
        "reduce_group.cuh",
        "step / 2 % 2 ? 0 : 1",
        "1",
        "plain",
        "bfloat16",
        BUSY,
    ),
    group(
        "one_slot_of_sums_for_two_steps",
        "reduce_group.cuh",
        "const int other_slot = step % 2 ? -kSlotWords : kSlotWords;",
        "const int other_slot = 0;",
        "plain",
        "bfloat16",
        BUSY,
    ),
    group(
        "one_word_of_sums_looked_at",
        "reduce_group.cuh",
        "((v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag)) & 1",
        "(v.x ^ tag) & 1",
        "plain",
        "tf32",
        BUSY,
    ),
    group(
        "no_barrier_in_receive",
        "reduce_group.cuh",
        "    ptx::block_sync();  // partial sums are complete",
        "    // partial sums are complete",
        "tsan",
        "bfloat16",
        BUSY,
    ),
    group(
        "no_barrier_in_a_step_back",
        "rec_backward.cuh",
        "    ptx::block_sync();  // the hazards",
        "    // the hazards",
        "tsan",
        "bfloat16",
        BUSY,
    ),
    group(
        "weights_in_shared_memory_misplaced",
        "resident.cuh",
        "part * (kShared / kParts) + whole",
        "part * kShared + whole",
        "asan",
        "float32",
        CHUNKS,
    ),
]


def sources(root: Path, driver: str) -> list[Path]:
    """A driver, with those of the product's sources that it runs, and what should come out."""
    patterns = KERNELS.get(driver, [])
    kernels = [path for pattern in patterns for path in sorted((root / "csrc/cuda").glob(pattern))]
    return [root / driver, *kernels, root / build.PROBLEM.relative_to(build.ROOT)]


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
