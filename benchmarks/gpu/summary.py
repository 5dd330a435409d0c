"""Readable tables, in Markdown, from records alone: also after a run that was cut off."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from .records import REFUSAL, Record, read_records


def write_summary(out: Path) -> None:
    """gpu.md from gpu.jsonl, and pictures where matplotlib is there."""
    records = read_records(out / "gpu.jsonl")
    (out / "gpu.md").write_text(summarize(records))
    try:
        from .plots import plot_all
    except ModuleNotFoundError:
        return
    plot_all(out, records)


def summarize(records: Sequence[Record]) -> str:
    """All tables that the records of `gpu.jsonl` fill."""
    timings = [record for record in records if record["kind"] == "gpu timing"]
    if not timings:
        return "# lstm_cuda on a GPU\n\nNothing was measured.\n"
    good = [record for record in timings if record["comparison"] is not None]
    chosen = of_one_kernel(good)
    parts = [
        f"# lstm_cuda against torch.nn.LSTM on {timings[0]['environment']['device']}",
        _environments(timings),
        "Ratio: time of the baseline divided by time of FusedLSTM, median of interleaved pairs; "
        "above 1 FusedLSTM is faster. Times are microseconds a step, the whole call divided by T, "
        "input products included. A result outside its bounds is not timed.",
        _means(chosen),
        *_squares(chosen),
        *_lists(chosen),
        _graphs(chosen),
        _families(good),
        _failures(timings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def of_one_kernel(records: Sequence[Record]) -> list[Record]:
    """Those with the free choice of a kernel, if there are any; else those of the first forced."""
    kernels = [record["kernel"] for record in records]
    kernel = "auto" if "auto" in kernels else next(iter(kernels), "auto")
    return [record for record in records if record["kernel"] == kernel]


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, numbers to the right."""
    body = [[str(cell) for cell in row] for row in rows]
    right = [
        bool(body) and all(cell[:1].isdigit() or cell in ("", "-") for cell in column)
        for column in zip(*body, strict=True)
    ] or [False] * len(headings)
    rule = ["---:" if is_right else "---" for is_right in right]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, rule, *body))


def _environments(records: Sequence[Record]) -> str:
    """Every machine and software that records come from, with the range of dates."""
    found: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        e = record["environment"]
        line = (
            f"{e['device']}, {e['multiprocessors']} multiprocessors, {e['memory_gib']} GiB",
            f"driver {e['driver']}",
            f"torch {e['torch_version']}, CUDA {e['cuda_version']}, cuDNN {e['cudnn_version']}",
            f"lstm_cuda {e['lstm_cuda_version']} {e['commit'] or ''}".strip(),
        )
        found.setdefault(line, []).append(e["date"])
    return "\n".join(
        f"* {'; '.join(line)}; {min(dates)} to {max(dates)}" for line, dates in found.items()
    )


def _ratio(record: Record) -> float:
    return float(record["comparison"]["ratio"]["median"])


def _means(records: Sequence[Record]) -> str:
    rows = []
    for group, precision, mode in _distinct(records, "group", "precision", "mode"):
        ratios = [_ratio(r) for r in _of(records, group=group, precision=precision, mode=mode)]
        numbers = (geometric_mean(ratios), min(ratios), max(ratios))
        rows.append((group, precision, mode, len(ratios), *(f"{n:.2f}" for n in numbers)))
    headings = ("group", "precision", "mode", "points", "geometric mean", "lowest", "highest")
    return "## Ratios\n\n" + table(headings, rows) if rows else ""


def _squares(records: Sequence[Record]) -> Iterable[str]:
    square = _of(records, group="square")
    for precision, mode in _distinct(square, "precision", "mode"):
        found = _of(square, precision=precision, mode=mode)
        cells = {(r["hidden_size"], r["batch"]): r for r in found}
        batches = sorted({batch for _, batch in cells})
        rows = []
        for hidden in sorted({hidden for hidden, _ in cells}):
            row: list[object] = [hidden]
            for batch in batches:
                record = cells.get((hidden, batch))
                row.append("-" if record is None else _cell(record))
            rows.append(row)
        title = f"## Square sweep, {precision}, {mode}: ratio (FusedLSTM's us a step)"
        yield title + "\n\n" + table(["H", *(f"B {batch}" for batch in batches)], rows)


def _cell(record: Record) -> str:
    verdict = record["comparison"]["verdict"]
    mark = "" if verdict == "faster" else f" {verdict}"
    return f"{_ratio(record):.2f} ({record['us_per_step']['fused']:.2f}){mark}"


def _lists(records: Sequence[Record]) -> Iterable[str]:
    for (group,) in _distinct(records, "group"):
        if group == "square":
            continue
        rows = []
        for r in _of(records, group=group):
            ratio, steps = r["comparison"]["ratio"], r["us_per_step"]
            rows.append(
                (
                    r["name"],
                    shape(r),
                    r["precision"],
                    r["mode"],
                    families(r),
                    f"{steps['baseline']:.2f}",
                    f"{steps['fused']:.2f}",
                    f"{ratio['median']:.2f}",
                    f"{ratio['low']:.2f} - {ratio['high']:.2f}",
                    r["comparison"]["verdict"],
                    _pair(r["host_ms"], 3),
                    _pair(r["peak_mib"], 0),
                    _pair(r["tflops"], 1),
                )
            )
        headings = (
            *("workload", "shape", "precision", "mode", "kernels", "baseline us", "FusedLSTM us"),
            *("ratio", "quartiles", "", "host ms", "peak MiB", "TFLOP/s"),
        )
        note = "Pairs: the baseline's, then FusedLSTM's.\n\n"
        yield f"## {group}\n\n{note}{table(headings, rows)}"


def shape(record: Record) -> str:
    """As `Workload.shape`, from a record."""
    sizes = f"{record['input_size']}→{record['hidden_size']}"
    sizes += f"→{record['proj_size']}" if record["proj_size"] else ""
    layers = f" L{record['num_layers']}" if record["num_layers"] > 1 else ""
    bi = " bi" if record["bidirectional"] else ""
    return f"T{record['steps']} B{record['batch']} {sizes}{layers}{bi}"


def families(record: Record) -> str:
    """The kernel families that ran, from the plan in words."""
    found = re.findall(r"(?:forward|backward): (\w+), ", record.get("plan", ""))
    return ", ".join(dict.fromkeys(found)) or "-"


def _pair(sides: dict[str, float], digits: int) -> str:
    return f"{sides['baseline']:.{digits}f}, {sides['fused']:.{digits}f}"


def _graphs(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        graph = r.get("graph")
        if not graph:
            continue
        cells: list[str] = []
        for side in ("baseline", "fused"):
            both, alone = graph.get("comparison"), graph.get(f"{side}_ms")
            spread = both[f"{side}_ms"] if both else alone
            us = spread["median"] * 1e3 / r["steps"] if spread else None
            cells.append(graph.get(f"{side}_error", "-") if us is None else f"{us:.2f}")
        ratio = f"{graph['comparison']['ratio']['median']:.2f}" if graph.get("comparison") else "-"
        rows.append((r["name"], shape(r), r["precision"], r["mode"], *cells, ratio))
    headings = ("workload", "shape", "precision", "mode", "baseline us", "FusedLSTM us", "ratio")
    title = "## Captured in a CUDA graph\n\n"
    return title + table(headings, rows) if rows else ""


def _families(records: Sequence[Record]) -> str:
    kernels = [kernel for (kernel,) in _distinct(records, "kernel")]
    if len(kernels) < 2:
        return ""
    rows = []
    for name, precision, mode in _distinct(records, "name", "precision", "mode"):
        found = {r["kernel"]: r for r in _of(records, name=name, precision=precision, mode=mode)}
        us = [f"{found[k]['us_per_step']['fused']:.2f}" if k in found else "-" for k in kernels]
        rows.append((name, precision, mode, *us))
    title = "## Kernel families, us a step\n\n"
    return title + table(("workload", "precision", "mode", *kernels), rows)


def _failures(records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        if r["error"] and REFUSAL not in r["error"]:  # a forced family that does not fit
            wrong = "; ".join(r.get("check", {}).get("failures", ())[:3])
            text = f"{r['error']}: {wrong}" if wrong else r["error"]
            rows.append((r["name"], r["precision"], r["mode"], r["kernel"], text.replace("|", "/")))
    headings = ("workload", "precision", "mode", "kernel", "what")
    return "## Not measured\n\n" + table(headings, rows) if rows else ""


def _distinct(records: Iterable[Record], *names: str) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(tuple(record[name] for name in names) for record in records))


def _of(records: Iterable[Record], **values: object) -> list[Record]:
    return [r for r in records if all(r[name] == value for name, value in values.items())]
