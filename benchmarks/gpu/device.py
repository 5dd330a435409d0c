"""The clock, memory and graphs of a CUDA device, and the same questions for a fake one in tests."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from ..timing import Call, Clock
from .grid import Precision


class NoDevice(RuntimeError):
    """There is no CUDA device."""


class Device(Protocol):
    """What measuring asks of a device.

    Attributes:
        torch_device: where tensors go.
        clock: measures work on it.
    """

    torch_device: torch.device
    clock: Clock

    def synchronize(self) -> None:
        """Waits for all work."""
        ...

    def peak_mib(self, call: Call) -> float:
        """The most memory that a call takes beyond what is held before it."""
        ...

    def capture(self, call: Call, times: int) -> Call:
        """A graph of the call made some times in a row. Raises what capturing raises."""
        ...

    def clean(self) -> None:
        """Gives back unused memory."""
        ...

    def lost(self) -> bool:
        """Whether nothing can run in this process any more."""
        ...


class EventClock:
    """Times work on the current stream by events: the device's own time, waits for the host too."""

    def mean_ms(self, call: Call, repeats: int) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats


class Cuda:
    """The current CUDA device.

    Raises:
        NoDevice: if there is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            built = torch.version.cuda
            why = f"torch {torch.__version__} sees none" if built else "this torch has no CUDA"
            raise NoDevice(f"no CUDA device: {why}")
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.clock: Clock = EventClock()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_mib(self, call: Call) -> float:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def capture(self, call: Call, times: int) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up in the first calls
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay

    def clean(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def lost(self) -> bool:
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.torch_device).item()
        except RuntimeError:
            return True
        return False

    def warm_up(self, seconds: float = 0.7) -> None:
        """Keeps the device busy until its clocks have risen."""
        a = torch.randn(4096, 4096, device=self.torch_device, dtype=torch.float16)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(20):
                torch.mm(a, a)
            torch.cuda.synchronize()


@contextmanager
def allowed(precision: Precision) -> Iterator[None]:
    """torch's settings for float32 products, the same for cuDNN's RNNs and for torch.mm."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = precision.tf32
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
