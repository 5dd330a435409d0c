"""Time of two alternatives, measured in turn so that noise hits both."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Call = Callable[[], object]

MIN_SAMPLE_MS = 2.0  # far above the clock's own cost and resolution
MIN_PAIRS = 7
MAX_PAIRS = 101


class Clock(Protocol):
    """Measures work on one kind of device; a device with its own events gets its own clock."""

    def mean_ms(self, call: Call, repeats: int) -> float:
        """Mean time of one of `repeats` calls made back to back."""
        ...


class HostClock:
    """For work that is done when the call returns.

    Args:
        now: seconds; `time.perf_counter`, or `time.process_time` to count only the time that this
            process got on a machine shared with others (honest for one thread only).
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def mean_ms(self, call: Call, repeats: int) -> float:
        start = self._now()
        for _ in range(repeats):
            call()
        return (self._now() - start) * 1e3 / repeats


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Raises ValueError unless every value is a finite positive number."""
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError(f"measured something that is no finite positive number: {values}")
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Comparison:
    """Times of two alternatives measured in pairs.

    Attributes:
        baseline_ms, fused_ms: time of one call.
        ratio: baseline / fused of each pair; above 1 the fused one is faster.
        pairs: how many pairs were measured.
    """

    baseline_ms: Spread
    fused_ms: Spread
    ratio: Spread
    pairs: int

    @property
    def verdict(self) -> str:
        """Faster or slower, or equal when the difference is within the spread."""
        if self.ratio.low > 1:
            return "faster"
        return "slower" if self.ratio.high < 1 else "equal"


def compare(baseline: Call, fused: Call, clock: Clock, budget_s: float) -> Comparison:
    """Times pairs of samples until the budget is spent, MIN_PAIRS at least, MAX_PAIRS at most."""
    calls = (baseline, fused)
    repeats = [_repeats(call, clock) for call in calls]
    pairs: list[tuple[float, float]] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while len(pairs) < MAX_PAIRS:
            if len(pairs) >= MIN_PAIRS and time.perf_counter() - start > budget_s:
                break
            sample = [0.0, 0.0]
            # Alternating who goes first keeps a drift of the machine from favouring one.
            for which in (0, 1) if len(pairs) % 2 == 0 else (1, 0):
                sample[which] = clock.mean_ms(calls[which], repeats[which])
            pairs.append((sample[0], sample[1]))
    finally:
        if collecting:
            gc.enable()
    return Comparison(
        baseline_ms=Spread.of([first for first, _ in pairs]),
        fused_ms=Spread.of([second for _, second in pairs]),
        ratio=Spread.of([first / second for first, second in pairs]),
        pairs=len(pairs),
    )


def _repeats(call: Call, clock: Clock) -> int:
    """Calls needed for MIN_SAMPLE_MS; also warms up."""
    clock.mean_ms(call, 2)
    return max(1, math.ceil(MIN_SAMPLE_MS / max(clock.mean_ms(call, 3), 1e-4)))
