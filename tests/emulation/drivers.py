"""Programs that run kernels under emulation, and the product's sources that each needs."""

from __future__ import annotations

from pathlib import Path

from . import build

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


def sources(root: Path, driver: str) -> list[Path]:
    """A driver, with those of the product's sources that it runs, and what should come out."""
    patterns = KERNELS.get(driver, [])
    kernels = [path for pattern in patterns for path in sorted((root / "csrc/cuda").glob(pattern))]
    return [root / driver, *kernels, root / build.PROBLEM.relative_to(build.ROOT)]
