"""Mutants of the micro-kernels: what the emulation itself must notice."""

from __future__ import annotations

from .mutant import MICRO_KERNELS, Mutant

MUTANTS: list[Mutant] = [
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
]
