"""check.md: what the check on a GPU found, from the data that its steps left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import summary
from .records import FAMILIES, STEP_TIMES, read_records, soak_passed
from .steps import StepResult, outcome
from .summary import write_summary


def write_report(out: Path, device: object, results: Sequence[StepResult]) -> None:
    """Writes check.md, and gpu.md anew: a benchmark that was cut off has not written it."""
    for folder in (out, out / "families"):
        if (folder / "gpu.jsonl").exists():
            write_summary(folder)
    (out / "check.md").write_text(report(out, device, results))


def report(out: Path, device: object, results: Sequence[StepResult]) -> str:
    """The steps, then what failed in them."""
    rows = [(r.part, r.name, r.status, f"{r.seconds:.0f}", r.detail, r.log or "") for r in results]
    headings = ("part", "step", "result", "seconds", "detail", "log")
    parts = [
        "# Check on a GPU",
        f"{device}",
        summary.table(headings, [[cell.replace("|", "/") for cell in row] for row in rows]),
        _tests(out),
        _soak(out),
        _micro(out),
        _bench(out),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tests(out: Path) -> str:
    rows = []
    for family in ("auto", *FAMILIES):
        for record in read_records(out / f"tests-{family}.jsonl"):
            if "test" in record and outcome(record) == "failed":
                lines = record.get("message", "").splitlines() or [""]
                rows.append((family, record["test"], lines[0][:150].replace("|", "/")))
    if not rows:
        return ""
    more = f"\n\n{len(rows) - 50} more are in tests-*.jsonl." if len(rows) > 50 else ""
    return "## Failed tests\n\n" + summary.table(("kernel", "test", "why"), rows[:50]) + more


def _soak(out: Path) -> str:
    bad = [row for row in read_records(out / "soak.jsonl") if not soak_passed(row)]
    names = ("family", "what", "dtype", "sizes", "calls", "differences", "error")
    rows = [[str(row.get(name, "")) for name in names] for row in bad]
    return "## Soaks that failed\n\n" + summary.table(names, rows) if rows else ""


def _micro(out: Path) -> str:
    found = [*read_records(out / "micro.jsonl"), *read_records(out / "probe.jsonl")]
    rows = [(f"{r['name']}, {r['unit']}", f"{r['median']:.4g}") for r in found]
    text = "## Rates and delays\n\n" + summary.table(("what", "median"), rows) if rows else ""
    return "\n\n".join(part for part in (text, _step_times(out)) if part)


def _step_times(out: Path) -> str:
    names = ("family", "arithmetic", "padded_hidden", "columns", "turns", "backward")
    rows = [
        [str(r[name]) for name in names]
        + [r["error"].replace("|", "/") if r["error"] else f"{r['median']:.3f}"]
        + ["" if r.get("packing") is None else f"{r['packing']:.1f}"]
        for r in read_records(out / STEP_TIMES)
    ]
    headings = (*names, "median", "packing before the first")
    return "## Steps, us\n\n" + summary.table(headings, rows) if rows else ""


def _bench(out: Path) -> str:
    records = read_records(out / "gpu.jsonl")
    if not records:
        return ""
    measured = sum(record["comparison"] is not None for record in records)
    slower = [
        r for r in records if r["comparison"] is not None and r["comparison"]["verdict"] == "slower"
    ]
    text = f"## Benchmarks\n\n{measured} of {len(records)} results; all of them are in gpu.md."
    if (out / "families" / "gpu.md").exists():
        text += " With each family forced: families/gpu.md."
    if slower:
        rows = [
            (r["name"], r["precision"], r["mode"], f"{r['comparison']['ratio']['median']:.2f}")
            for r in slower
        ]
        headings = ("slower than the baseline", "precision", "mode", "ratio")
        text += "\n\n" + summary.table(headings, rows)
    return text
