"""Readable tables."""

from collections.abc import Sequence
from statistics import geometric_mean

from rich.console import Console
from rich.table import Table

from .results import Memory, Result
from .timing import Spread
from .train import TrainingComparison
from .variants import VARIANTS
from .workloads import GROUPS

STYLES = {"faster": "green", "equal": "default", "slower": "red"}


def print_group(console: Console, group: str, results: Sequence[Result]) -> None:
    """One group: a row for each workload and mode, and geometric means."""
    table = Table(title=f"{group}: {GROUPS[group]}", title_justify="left", title_style="bold")
    baselines = {VARIANTS[result.workload.variant].baseline for result in results}
    baseline = baselines.pop() if len(baselines) == 1 else "baseline"
    for column in ("workload", "shape", "dtype", "mode"):
        table.add_column(column, no_wrap=True)
    for column in (f"{baseline} ms", "FusedLSTM ms", "ratio", "quartiles"):
        table.add_column(column, justify="right")
    table.add_column("")
    for result in results:
        workload, comparison = result.workload, result.comparison
        cells = [workload.name, workload.shape, result.dtype, result.mode]
        if comparison is None:
            table.add_row(*cells, "-", "-", "-", "-", "WRONG RESULT", style="bold red")
            continue
        table.add_row(
            *cells,
            f"{comparison.baseline_ms.median:.3f}",
            f"{comparison.fused_ms.median:.3f}",
            f"{comparison.ratio.median:.2f}",
            _quartiles(comparison.ratio),
            comparison.verdict,
            style=STYLES[comparison.verdict],
        )
    console.print(table)
    for mode in ("inference", "training"):
        of_mode = [result for result in results if result.mode == mode]
        ratios = [result.comparison.ratio.median for result in of_mode if result.comparison]
        if ratios:
            console.print(
                f"  {mode}: geometric mean [bold]{geometric_mean(ratios):.2f}[/bold] over "
                f"{len(ratios)} of {len(of_mode)}, from {min(ratios):.2f} to {max(ratios):.2f}"
            )
    console.print()


def _quartiles(spread: Spread) -> str:
    return f"{spread.low:.2f} - {spread.high:.2f}"


def print_memory(console: Console, rows: Sequence[Memory]) -> None:
    """What each module keeps alive between forward and backward."""
    table = Table(
        title="memory: kept from forward for backward, besides input and parameters",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("workload")
    table.add_column("shape")
    for column in ("nn.LSTM MiB", "FusedLSTM MiB", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.workload.name,
            row.workload.shape,
            f"{row.baseline_mib:.2f}",
            f"{row.fused_mib:.2f}",
            f"{row.baseline_mib / row.fused_mib:.2f}",
        )
    console.print(table)
    console.print()


def print_training(console: Console, training: TrainingComparison) -> None:
    """The two runs of the forecaster side by side."""
    table = Table(
        title=f"training: a forecaster of Seattle's weather, {training.epochs} epochs",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    for column in ("time s", "first loss", "last loss", "test error C"):
        table.add_column(column, justify="right")
    for name, run in (("nn.LSTM", training.torch_run), ("FusedLSTM", training.fused_run)):
        table.add_row(
            name,
            f"{sum(run.epoch_s):.2f}",
            f"{run.losses[0]:.6f}",
            f"{run.losses[-1]:.6f}",
            f"{run.test_error_celsius:.3f}",
        )
    console.print(table)
    console.print(
        f"  ratio [bold]{training.speedup:.2f}[/bold] (median over epochs); "
        f"largest relative difference of a loss {training.largest_difference:.1e}; "
        f"persistence has a test error of {training.persistence_celsius:.3f} C"
    )
    if not training.agree:
        console.print("  [bold red]THE TWO LOSS CURVES DIFFER[/bold red]")
    console.print()


def print_failures(console: Console, results: Sequence[Result]) -> bool:
    """Names what was computed wrong; returns whether anything was."""
    failures = {
        (result.workload.name, failure) for result in results for failure in result.check.failures
    }
    for name, failure in sorted(failures):
        console.print(f"[bold red]WRONG RESULT[/bold red] {name}: {failure}")
    return bool(failures)
