"""What a mutant is, and those of each kernel family by a shorter name."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from emulation.drivers import RECURRENCE, SMALL, SMALL_VARIANT_CLUSTER, VARIANT_CTA, VARIANTS

MICRO_KERNELS = "tests/emulation/micro_kernels.cuh"


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
