"""Where a measurement was taken: without this a number says nothing."""

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import lstm_cuda


@dataclass(frozen=True)
class Environment:
    """Machine, software and date of a run.

    Attributes:
        capability: the instruction set that our CPU kernels use.
        load: how busy other work kept the machine at the start, in mean running threads.
        commit: ends in "+" if files differ from it; None outside of a checkout.
    """

    cpu: str
    cores: int
    capability: str
    load: float
    threads: int
    clock: str
    torch_version: str
    lstm_cuda_version: str
    commit: str | None
    date: str

    @classmethod
    def current(cls, clock: str) -> "Environment":
        return cls(
            cpu=_cpu_model(),
            cores=os.cpu_count() or 1,
            capability=str(lstm_cuda.build_info().get("cpu_capability", "unknown")),
            load=round(os.getloadavg()[0], 2),
            threads=torch.get_num_threads(),
            clock=clock,
            torch_version=torch.__version__,
            lstm_cuda_version=lstm_cuda.__version__,
            commit=_commit(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )

    @property
    def disturbed(self) -> bool:
        """Whether other work needs cores that the measurement needs, too."""
        return self.load > self.cores - self.threads

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        changed = "+" if self.commit and self.commit.endswith("+") else ""
        return (
            f"{self.cpu}, {self.cores} cores, {threads}, {self.capability}, load {self.load}; "
            f"torch {self.torch_version}, lstm_cuda {self.lstm_cuda_version}"
            f"{f' ({self.commit[:9]}{changed})' if self.commit else ''}; {self.date}"
        )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
