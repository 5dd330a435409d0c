"""Mutants of family rec_step."""

from __future__ import annotations

from .mutant import Mutant, step

MUTANTS: list[Mutant] = [
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
]
