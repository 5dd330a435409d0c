"""The same training with nn.LSTM and with FusedLSTM: equal losses, less time."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from examples.forecast import Forecaster, Weather, error_celsius, load_weather, train_epoch
from lstm_cuda import FusedLSTM


@dataclass(frozen=True)
class TrainingRun:
    """One of the two runs.

    Attributes:
        losses: of each batch.
        epoch_s: time of each epoch.
        test_error_celsius: of the forecast after training.
    """

    losses: list[float]
    epoch_s: list[float]
    test_error_celsius: float


@dataclass(frozen=True)
class TrainingComparison:
    """Both runs, from the same weights over the same batches."""

    torch_run: TrainingRun
    fused_run: TrainingRun
    persistence_celsius: float
    epochs: int

    @property
    def speedup(self) -> float:
        """Median over the epochs of nn.LSTM's time divided by ours."""
        pairs = zip(self.torch_run.epoch_s, self.fused_run.epoch_s, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    @property
    def largest_difference(self) -> float:
        """Largest difference of the two losses of a batch, relative to the loss."""
        pairs = zip(self.torch_run.losses, self.fused_run.losses, strict=True)
        return max(abs(theirs - ours) / theirs for theirs, ours in pairs)

    @property
    def agree(self) -> bool:
        """Whether the losses are the same but for the order of float32 sums.

        Rounding differences grow during training: each step starts from slightly other weights.
        """
        return self.largest_difference < 1e-3

    def record(self) -> dict[str, Any]:
        """What goes into the results file."""
        return {
            "kind": "training",
            **asdict(self),
            "speedup": self.speedup,
            "largest_difference": self.largest_difference,
        }


class _Trainee:
    def __init__(self, model: Forecaster) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.losses: list[float] = []
        self.epoch_s: list[float] = []

    def train_epoch(self, weather: Weather, seed: int) -> None:
        start = time.perf_counter()
        self.losses += train_epoch(self.model, self.optimizer, weather, seed)
        self.epoch_s.append(time.perf_counter() - start)

    def finish(self, test: Weather) -> TrainingRun:
        return TrainingRun(self.losses, self.epoch_s, error_celsius(self.model, test))


def compare_training(epochs: int, hidden_size: int = 128, seed: int = 0) -> TrainingComparison:
    """Trains two forecasters of `examples/forecast.py` in turn, epoch by epoch."""
    torch.manual_seed(seed)
    training, test = load_weather()
    theirs = _Trainee(Forecaster(hidden_size, nn.LSTM))
    ours = _Trainee(Forecaster(hidden_size, FusedLSTM))
    ours.model.load_state_dict(theirs.model.state_dict())
    for epoch in range(epochs):
        # Who goes first alternates, so that a drift of the machine favours none.
        for trainee in (theirs, ours) if epoch % 2 == 0 else (ours, theirs):
            trainee.train_epoch(training, seed=epoch)
    return TrainingComparison(
        theirs.finish(test), ours.finish(test), test.persistence_error_celsius(), epochs
    )
