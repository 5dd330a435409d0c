"""Deliberate bugs in the kernels, each of which a test must notice (test_mutants.py)."""

from . import micro, other_cells, rec_cluster, rec_cta, rec_group, rec_step

MUTANTS = [
    mutant
    for each in (micro, rec_cta, rec_step, rec_cluster, rec_group, other_cells)
    for mutant in each.MUTANTS
]
