"""Pictures of the GPU's results; the only part that needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.colors import TwoSlopeNorm

from .records import Record
from .summary import of_one_kernel, shape

COLORS = {"faster": "#2a7f62", "equal": "#9aa0a6", "slower": "#c0392b"}


def plot_all(out: Path, records: Sequence[Record]) -> None:
    """A map of the square sweep, and bars for the groups of workloads."""
    good = of_one_kernel([r for r in records if r.get("comparison")])
    square = [r for r in good if r["group"] == "square"]
    if square:
        plot_square(out / "gpu-square.png", square)
    for group in dict.fromkeys(r["group"] for r in good if r["group"] != "square"):
        plot_bars(out / f"gpu-{group}.png", [r for r in good if r["group"] == group])


def _caption(records: Sequence[Record]) -> str:
    e = records[0]["environment"]
    return (
        f"{e['device']}, driver {e['driver']}, torch {e['torch_version']}, cuDNN "
        f"{e['cudnn_version']}, lstm_cuda {e['lstm_cuda_version']} {e['commit'] or ''}, "
        f"{e['date']}"
    )


def plot_square(path: Path, records: Sequence[Record]) -> None:
    """For each precision and mode a map of H by B: how many times as fast as nn.LSTM."""
    precisions = list(dict.fromkeys(r["precision"] for r in records))
    modes = list(dict.fromkeys(r["mode"] for r in records))
    hidden = sorted({r["hidden_size"] for r in records})
    batches = sorted({r["batch"] for r in records})
    figure, axes = pyplot.subplots(
        len(modes),
        len(precisions),
        figsize=(1.2 + 3.2 * len(precisions), 1.2 + (0.6 + 0.32 * len(hidden)) * len(modes)),
        squeeze=False,
        layout="constrained",
    )
    norm = TwoSlopeNorm(vcenter=0, vmin=-1, vmax=4)  # of log2: half to sixteen times
    for axis, (mode, precision) in zip(
        axes.flat, [(m, p) for m in modes for p in precisions], strict=True
    ):
        grid = [[math.nan] * len(batches) for _ in hidden]
        for r in records:
            if (r["mode"], r["precision"]) == (mode, precision):
                row, column = hidden.index(r["hidden_size"]), batches.index(r["batch"])
                ratio = r["comparison"]["ratio"]["median"]
                grid[row][column] = math.log2(ratio)
                axis.text(column, row, f"{ratio:.2g}", ha="center", va="center", fontsize=7)
        axis.imshow(grid, norm=norm, cmap="RdYlGn", aspect="auto")
        axis.set_title(f"{precision}, {mode}", fontsize=9)
        axis.set_xticks(range(len(batches)), [f"B {batch}" for batch in batches], fontsize=7)
        axis.set_yticks(range(len(hidden)), [str(h) for h in hidden], fontsize=7)
    figure.suptitle("FusedLSTM: how many times as fast as nn.LSTM, by H and B", fontsize=11)
    figure.supxlabel(_caption(records), fontsize=6.5, color="#5f6368")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_bars(path: Path, records: Sequence[Record]) -> None:
    """The ratio of each record, its quartiles as a line."""
    figure, axis = pyplot.subplots(figsize=(9, 1.2 + 0.24 * len(records)), layout="constrained")
    labels = []
    for y, r in enumerate(records):
        comparison, ratio = r["comparison"], r["comparison"]["ratio"]
        color = COLORS[comparison["verdict"]]
        axis.barh(y, ratio["median"] - 1, left=1, height=0.7, color=color, zorder=2)
        axis.plot([ratio["low"], ratio["high"]], [y, y], color="black", linewidth=1, zorder=3)
        right = max(ratio["high"], 1)
        axis.text(right * 1.03, y, f"{ratio['median']:.2f}", va="center", fontsize=6.5)
        labels.append(f"{r['name']}, {shape(r)}, {r['precision']}, {r['mode']}")
    axis.set_yticks(range(len(records)), labels, fontsize=6.5)
    axis.set_ylim(len(records) - 0.4, -0.6)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.axvline(1, color="black", linewidth=1)
    axis.margins(x=0.08)
    axis.set_title(f"How many times as fast as {records[0]['baseline']}", fontsize=10, loc="left")
    figure.supxlabel(_caption(records), fontsize=6.5, color="#5f6368")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
