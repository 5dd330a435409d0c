"""Forecast Seattle's daily maximum temperature for the next week from the last 90 days.

Four years of daily weather (2012 to 2015) come with the package `vega_datasets`. The model sees
three of them and is judged on the fourth, against the forecast "the next days are like today".

    pip install vega_datasets
    python examples/forecast.py
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lstm_cuda import FusedLSTM

HISTORY_DAYS = 90
HORIZON_DAYS = 7
TRAINING_DAYS = 3 * 365  # 2012 to 2014


@dataclass(frozen=True)
class Weather:
    """Windows of daily weather: what is known, and how the temperature went on.

    Attributes:
        past: standardised precipitation, maximum, minimum, wind; [windows, HISTORY_DAYS, 4].
        change: maximum temperature of the following days less that of the last known day, in
            units of `scale_celsius`; [windows, HORIZON_DAYS].
        scale_celsius: standard deviation of the maximum temperature.
    """

    past: Tensor
    change: Tensor
    scale_celsius: float

    def persistence_error_celsius(self) -> float:
        """Root mean square error of "the next days are like today"."""
        return self.scale_celsius * self.change.square().mean().sqrt().item()


def load_weather() -> tuple[Weather, Weather]:
    """Seattle's daily weather as windows to train on and later windows to test on."""
    try:
        from vega_datasets import local_data
    except ImportError as error:
        raise SystemExit("the weather series is missing: pip install vega_datasets") from error
    table = local_data.seattle_weather()
    days = torch.tensor(table[["precipitation", "temp_max", "temp_min", "wind"]].to_numpy(float))
    days[:, 0].log1p_()  # rain is mostly nothing and sometimes a flood
    known = days[:TRAINING_DAYS]
    days = ((days - known.mean(0)) / known.std(0)).float()
    scale_celsius = torch.tensor(table["temp_max"].to_numpy(float))[:TRAINING_DAYS].std().item()
    return (
        _windows(days[:TRAINING_DAYS], scale_celsius),
        _windows(days[TRAINING_DAYS - HISTORY_DAYS :], scale_celsius),
    )


def _windows(days: Tensor, scale_celsius: float) -> Weather:
    windows = days.unfold(0, HISTORY_DAYS + HORIZON_DAYS, 1).transpose(1, 2).contiguous()
    past, future = windows[:, :HISTORY_DAYS], windows[:, HISTORY_DAYS:, 1]
    return Weather(past.contiguous(), future - past[:, -1:, 1], scale_celsius)


class Forecaster(nn.Module):
    """Reads the past days and predicts the change from today for each day of the horizon."""

    def __init__(self, hidden_size: int = 64, lstm: Callable[..., nn.Module] = FusedLSTM) -> None:
        super().__init__()
        self.lstm = lstm(4, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, HORIZON_DAYS)

    def forward(self, past: Tensor) -> Tensor:
        output, _ = self.lstm(past)
        return self.head(output[:, -1])


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, weather: Weather, seed: int
) -> list[float]:
    """One pass over the windows in an order drawn from `seed`; returns the loss of each batch."""
    losses = []
    order = torch.randperm(len(weather.past), generator=torch.Generator().manual_seed(seed))
    for batch in order.split(64):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(weather.past[batch]), weather.change[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def error_celsius(model: nn.Module, weather: Weather) -> float:
    """Root mean square error of the forecast over all days of the horizon."""
    error = model(weather.past) - weather.change
    return weather.scale_celsius * error.square().mean().sqrt().item()


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Trains, prints and returns the test errors of the model and of persistence, in Celsius."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    training, test = load_weather()
    model = Forecaster(options.hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    print(f"{len(training.past)} windows to train on, {len(test.past)} to test on")
    start = time.perf_counter()
    for epoch in range(options.epochs):
        losses = train_epoch(model, optimizer, training, seed=epoch)
        loss = sum(losses) / len(losses)
        test_error = error_celsius(model, test)
        print(f"epoch {epoch + 1:3d}  training loss {loss:.4f}  test error {test_error:.2f} C")
    test_error = error_celsius(model, test)
    persistence = test.persistence_error_celsius()
    print(
        f"error over the next {HORIZON_DAYS} days: {test_error:.2f} C, "
        f"persistence {persistence:.2f} C ({time.perf_counter() - start:.0f} s)"
    )
    return test_error, persistence


if __name__ == "__main__":
    main()
