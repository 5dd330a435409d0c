"""Results as data: one JSON object per line, written as they come."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .check import Check
from .environment import CudaEnvironment, Environment
from .timing import Comparison
from .variants import VARIANTS
from .workloads import Workload


@dataclass(frozen=True)
class Result:
    """One workload in one mode; without a comparison if its check failed."""

    workload: Workload
    mode: str
    dtype: str
    check: Check
    comparison: Comparison | None

    def record(self) -> dict[str, Any]:
        """What goes into the file."""
        comparison = self.comparison
        return {
            "kind": "timing",
            **dataclasses.asdict(self.workload),
            "mode": self.mode,
            "dtype": self.dtype,
            "baseline": VARIANTS[self.workload.variant].baseline,
            "check": dataclasses.asdict(self.check),
            "comparison": comparison
            and {**dataclasses.asdict(comparison), "verdict": comparison.verdict},
        }


@dataclass(frozen=True)
class Memory:
    """What the forward pass of a workload keeps for its backward pass."""

    workload: Workload
    dtype: str
    baseline_mib: float
    fused_mib: float

    def record(self) -> dict[str, Any]:
        """What goes into the file."""
        return {
            "kind": "memory",
            **dataclasses.asdict(self.workload),
            "dtype": self.dtype,
            "baseline_mib": self.baseline_mib,
            "fused_mib": self.fused_mib,
        }


class ResultsFile:
    """Appends records, each with its environment, and leaves a readable file when cut off."""

    def __init__(
        self, path: Path, environment: Environment | CudaEnvironment, append: bool = False
    ) -> None:
        self.path = path
        self._environment = dataclasses.asdict(environment)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            path.write_text("")

    def add(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**record, "environment": self._environment}) + "\n")
