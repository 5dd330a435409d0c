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
            date=_now(),
        )

    @property
    def disturbed(self) -> bool:
        """Whether other work needs cores that the measurement needs, too."""
        return self.load > self.cores - self.threads

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"{self.cpu}, {self.cores} cores, {threads}, {self.capability}, load {self.load}; "
            f"torch {self.torch_version}, lstm_cuda {self.lstm_cuda_version}{_short(self.commit)}; "
            f"{self.date}"
        )


@dataclass(frozen=True)
class CudaEnvironment:
    """A GPU, its host, and software and date of a run.

    Attributes:
        capability: compute capability, "9.0".
        driver: None where it cannot be asked.
        clocks: of the multiprocessors and of memory, now and at most, as nvidia-smi gives them.
    """

    device: str
    capability: str
    multiprocessors: int
    memory_gib: float
    l2_mib: float
    driver: str | None
    clocks: str | None
    cpu: str
    cores: int
    torch_version: str
    cuda_version: str | None
    cudnn_version: int | None
    lstm_cuda_version: str
    commit: str | None
    date: str

    @classmethod
    def current(cls) -> "CudaEnvironment":
        """Of the current device; needs one."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return cls(
            device=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            memory_gib=round(properties.total_memory / 2**30, 1),
            l2_mib=round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
            driver=_nvidia_smi("driver_version"),
            clocks=_nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"),
            cpu=_cpu_model(),
            cores=os.cpu_count() or 1,
            torch_version=torch.__version__,
            cuda_version=torch.version.cuda,
            cudnn_version=torch.backends.cudnn.version(),
            lstm_cuda_version=lstm_cuda.__version__,
            commit=_commit(),
            date=_now(),
        )

    def __str__(self) -> str:
        return (
            f"{self.device} ({self.multiprocessors} multiprocessors, {self.memory_gib} GiB, "
            f"compute capability {self.capability}), driver {self.driver}; "
            f"torch {self.torch_version}, CUDA {self.cuda_version}, cuDNN {self.cudnn_version}, "
            f"lstm_cuda {self.lstm_cuda_version}{_short(self.commit)}; {self.date}"
        )


def _nvidia_smi(fields: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _short(commit: str | None) -> str:
    if commit is None:
        return ""
    return f" ({commit[:9]}{'+' if commit.endswith('+') else ''})"


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
