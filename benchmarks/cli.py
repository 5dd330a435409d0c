"""The command line: what to run, in which order, within which time."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

from . import plots, report
from .cases import Case
from .check import check
from .environment import Environment
from .memory import memory_of
from .results import Result, ResultsFile
from .timing import HostClock, compare
from .train import compare_training
from .workloads import DTYPES, GROUPS, WORKLOADS, Workload, select

EXTRAS = {
    "training": "the forecaster of examples/forecast.py trained with both modules",
    "memory": "what each module keeps from forward for backward, for the group users",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what was asked for; returns the exit status, 1 if any result was wrong."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if options.list:
        _print_list(console)
        return 0
    wanted = options.workloads or [*GROUPS, *EXTRAS]
    torch.set_num_threads(options.threads)
    environment = Environment.current("process" if options.process_time else "wall")
    console.print(f"{environment}\n", highlight=False)
    if environment.disturbed and not options.process_time:
        console.print(
            "[yellow]Other work keeps this machine busy: expect wide spreads, or measure with "
            "--process-time.[/yellow]\n"
        )
    file = ResultsFile(options.out / "results.jsonl", environment)
    right = True

    if "training" in wanted:
        training = compare_training(epochs=4 if options.quick else 20)
        file.add(training.record())
        report.print_training(console, training)
        plots.plot_training(options.out / "training.png", training, environment)
        right = training.agree

    if "memory" in wanted:
        rows = [
            memory_of(Case.build(workload, options.dtype, options.device))
            for workload in select(["users"], options.quick)
            if "training" in workload.modes
        ]
        for row in rows:
            file.add(row.record())
        report.print_memory(console, rows)

    workloads = select(wanted, options.quick)
    budget = Budget(total_s=45, row_s=1) if options.quick else Budget(total_s=600, row_s=6)
    results = []
    for result in _measure(workloads, options, budget, console):
        file.add(result.record())
        results.append(result)
    for group in GROUPS:
        if of_group := [result for result in results if result.workload.group == group]:
            report.print_group(console, group, of_group)
            plots.plot_group(options.out / f"{group}.png", of_group, environment)
    right &= not report.print_failures(console, results)
    console.print(f"data and plots: {options.out}", highlight=False)
    return 0 if right else 1


class Budget:
    """Shares the time that is left among the rows that are left.

    Args:
        total_s: for all rows, checks included.
        row_s: at most for one row.
    """

    def __init__(self, total_s: float, row_s: float) -> None:
        self._end = time.perf_counter() + total_s
        self._row_s = row_s

    def share_s(self, rows_left: int) -> float:
        """Time for the next row."""
        return max(0.0, min(self._row_s, (self._end - time.perf_counter()) / rows_left))


def _measure(
    workloads: Sequence[Workload], options: argparse.Namespace, budget: Budget, console: Console
) -> Iterator[Result]:
    """Checks each workload and times those that are right."""
    rows_left = sum(len(workload.modes) for workload in workloads)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[now]}"))
    # Without automatic refresh: its thread would take time from what is measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("measuring", total=rows_left, now="")
        for workload in workloads:
            dtype = workload.dtype or options.dtype
            progress.update(task, now=f"{workload.name}: check", refresh=True)
            case = Case.build(workload, dtype, options.device)
            checked = check(case)
            for mode in workload.modes:
                progress.update(task, now=f"{workload.name}: {mode}", refresh=True)
                comparison = None
                if not checked.failures:
                    budget_s = budget.share_s(rows_left)
                    comparison = compare(*case.calls(mode), options.clock, budget_s)
                yield Result(workload, mode, dtype, checked, comparison)
                rows_left -= 1
                progress.advance(task)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compares lstm_cuda with torch.nn.LSTM: checks results, then measures time.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer workloads and less time (under 90 s)")
    add("--workloads", nargs="+", default=[], metavar="NAME", help="names or groups; see --list")
    add("--list", action="store_true", help="name all workloads and stop")
    add(
        "--device",
        choices=("cpu",),
        default="cpu",
        help="default cpu; cuda has options of its own: --device cuda --help",
    )
    add("--dtype", choices=DTYPES, default="float32", help="default float32")
    add("--threads", type=int, default=1, help="of torch; default 1")
    add(
        "--process-time",
        action="store_true",
        help="count only the time that this process got; for busy machines, with one thread",
    )
    add(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder for data and plots, replaced there",
    )
    options = parser.parse_args(arguments)
    known = {*GROUPS, *EXTRAS, *(workload.name for workload in WORKLOADS)}
    if unknown := [name for name in options.workloads if name not in known]:
        parser.error(f"--workloads: nothing is called {unknown}; see --list")
    if options.process_time and options.threads != 1:
        parser.error("--process-time adds up the time of all threads: it needs --threads 1")
    options.device = torch.device(options.device)
    options.clock = HostClock(time.process_time if options.process_time else time.perf_counter)
    return options


def _print_list(console: Console) -> None:
    for name, meaning in {**GROUPS, **EXTRAS}.items():
        console.print(f"[bold]{name}[/bold]: {meaning}", highlight=False)
        for workload in WORKLOADS:
            if workload.group == name:
                console.print(f"    {workload.name}  ({workload.shape})", highlight=False)
