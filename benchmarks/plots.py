"""Pictures of the results."""

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from .environment import Environment
from .results import Result
from .train import TrainingComparison
from .variants import VARIANTS
from .workloads import GROUPS

COLORS = {"faster": "#2a7f62", "equal": "#9aa0a6", "slower": "#c0392b"}

TICKS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
FINE_TICKS = (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5)


def plot_group(path: Path, results: Sequence[Result], environment: Environment) -> None:
    """Speed-up of each workload: a bar from 1 to the ratio, its quartiles as a line."""
    by_mode = {
        mode: rows
        for mode in ("inference", "training")
        if (rows := [result for result in results if result.mode == mode])
    }
    labels = {result.workload.name: _label(result) for result in results}
    names = list(labels)
    figure, axes = pyplot.subplots(
        1,
        len(by_mode),
        figsize=(3.2 + 3.6 * len(by_mode), 1.7 + 0.3 * len(names)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (mode, rows) in zip(axes[0], by_mode.items(), strict=True):
        _bars(axis, rows, names)
        ratios = [result.comparison.ratio.median for result in rows if result.comparison]
        mean = f"geometric mean {geometric_mean(ratios):.2f}" if ratios else "no right result"
        axis.set_title(f"{mode}: {mean}", fontsize=10, loc="left")
    axes[0][0].set_yticks(range(len(names)), list(labels.values()))
    axes[0][0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle(_title(results), fontsize=11, x=0.01, ha="left")
    _footnote(
        figure,
        "bar: median ratio of paired measurements; black line: its quartiles; "
        "grey: equal within this spread\n"
        f"{environment}",
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _footnote(figure: Any, text: str) -> None:
    figure.supxlabel(text, fontsize=6.5, color="#5f6368", x=0.01, ha="left")


def _title(results: Sequence[Result]) -> str:
    baselines = {VARIANTS[r.workload.variant].baseline for r in results}
    baseline = baselines.pop() if len(baselines) == 1 else "the baseline"
    return f"FusedLSTM: how many times as fast as {baseline}\n{GROUPS[results[0].workload.group]}"


def _label(result: Result) -> str:
    workload = result.workload
    if workload.group in ("users", "lengths", "reset", "stream", "cost"):
        return f"{workload.name}\n{workload.shape}"
    return workload.name


def _bars(axis: Any, results: Sequence[Result], names: Sequence[str]) -> None:
    highest, lowest = 1.0, 1.0
    for result in results:
        comparison, y = result.comparison, names.index(result.workload.name)
        if comparison is None:
            axis.text(1.02, y, "wrong result", va="center", fontsize=7, color=COLORS["slower"])
            continue
        ratio = comparison.ratio
        axis.barh(
            y,
            ratio.median - 1,
            left=1,
            height=0.68,
            color=COLORS[comparison.verdict],
            zorder=2,
        )
        axis.plot([ratio.low, ratio.high], [y, y], color="black", linewidth=1, zorder=3)
        axis.annotate(
            f"{ratio.median:.2f}",
            (max(ratio.high, 1), y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
        highest, lowest = max(highest, ratio.high), min(lowest, ratio.low)
    axis.set_xscale("log", base=2)
    left, right = axis.get_xlim()  # of the other panel: both show the same range
    left, right = min(left, lowest * 0.9, 0.85), max(right, highest * 1.3, 1.3)
    axis.set_xlim(left, right)
    axis.xaxis.set_major_locator(FixedLocator(FINE_TICKS if right < 2 * left else TICKS))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", which="minor", bottom=False)
    axis.tick_params(axis="x", labelsize=8, length=2)
    axis.tick_params(axis="y", labelsize=8, length=0)
    axis.axvline(1, color="black", linewidth=1, zorder=4)
    axis.grid(axis="x", color="#e0e0e0", linewidth=0.6, zorder=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def plot_training(path: Path, training: TrainingComparison, environment: Environment) -> None:
    """Both losses over the epochs, where they must coincide, and over time, where they need not."""
    figure, (by_epoch, by_time) = pyplot.subplots(
        1, 2, figsize=(10, 4), sharey=True, layout="constrained"
    )
    runs = (
        ("nn.LSTM", training.torch_run, COLORS["equal"], 4.0),
        ("FusedLSTM", training.fused_run, COLORS["faster"], 1.3),
    )
    for name, run, color, width in runs:
        batches = len(run.losses) // training.epochs
        losses = [
            sum(run.losses[start : start + batches]) / batches
            for start in range(0, len(run.losses), batches)
        ]
        elapsed = [sum(run.epoch_s[: epoch + 1]) for epoch in range(training.epochs)]
        by_epoch.plot(
            range(1, training.epochs + 1), losses, color=color, linewidth=width, label=name
        )
        by_time.plot(elapsed, losses, color=color, linewidth=2, label=name)
        by_time.plot(elapsed[-1], losses[-1], "o", color=color, markersize=5)
    by_epoch.set_title(
        f"Same weights, same batches: losses differ by {training.largest_difference:.0e} at most",
        fontsize=10,
        loc="left",
    )
    by_time.set_title(f"FusedLSTM is {training.speedup:.2f} times as fast", fontsize=10, loc="left")
    by_epoch.set(xlabel="epoch", ylabel="training loss")
    by_time.set(xlabel="seconds")
    by_time.set_xlim(left=0)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (by_epoch, by_time):
        axis.grid(color="#e0e0e0", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.suptitle("A week's forecast of Seattle's temperature", fontsize=11, x=0.01, ha="left")
    _footnote(figure, str(environment))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
