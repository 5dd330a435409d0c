"""The steps of the check on a GPU: their commands, how each is run, and when it has passed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .records import (
    DEVICE_LOST,
    FAMILIES,
    REFUSAL,
    TEST_LOG,
    TESTS_FINISHED,
    Record,
    read_records,
)
from .toolkit import ROOT, find_tool

PARTS = ("tests", "sanitize", "micro", "soak", "bench")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_FOUND = 9  # exit status


@dataclass(frozen=True)
class Step:
    """One process of the check.

    Attributes:
        command: for a limit of time in seconds; None if something is missing.
        missing: what, then.
        weight: its share of the time, against those of other steps.
        limit_s: what it may take at least, if so much is left.
        judge: whether it passed, and a short text, from exit status and log.
        again: an exit status after which it is started once more, with --resume.
    """

    part: str
    name: str
    command: Callable[[float], list[str]] | None
    environment: dict[str, str] = field(default_factory=dict)
    weight: float = 1.0
    limit_s: float | None = None
    judge: Callable[[int, str], tuple[bool, str]] = lambda status, log: (status == 0, last(log))
    missing: str = ""
    again: int | None = None

    @property
    def log_name(self) -> str:
        return re.sub(r"\W+", "-", f"{self.part}-{self.name}").strip("-").lower() + ".log"

    def shown(self, limit_s: float = 60.0) -> str:
        """The command as one would type it."""
        assert self.command is not None
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, *self.command(limit_s)])


@dataclass
class StepResult:
    """How a step ended: "passed", "failed", "cut off" or "not run"."""

    part: str
    name: str
    status: str
    seconds: float
    detail: str
    log: str | None

    @classmethod
    def left(cls, step: Step, why: str) -> StepResult:
        return cls(step.part, step.name, "not run", 0.0, why, None)


def last(log: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def run_limited(command: list[str], limit_s: float, log: Path, variables: dict[str, str]) -> int:
    """Runs a command, its output appended to a file; ends it at the limit and returns 124 then."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)  # one that waits for a broken device may not end


def run_step(step: Step, limit_s: float, out: Path) -> StepResult:
    """Runs a step within a time, and judges it."""
    if step.command is None:
        return StepResult.left(step, step.missing)
    log = out / step.log_name
    log.write_text("")
    start = time.perf_counter()
    command = step.command(limit_s)
    status = run_limited(command, limit_s, log, step.environment)
    while status == step.again:
        left_s = limit_s - (time.perf_counter() - start)
        if left_s < 20:
            break
        command = step.command(left_s)
        if "--resume" not in command:
            command.append("--resume")
        status = run_limited(command, left_s, log, step.environment)
    seconds = time.perf_counter() - start
    passed, detail = step.judge(status, log.read_text(errors="replace"))
    ended = "passed" if passed else "cut off" if status == 124 else "failed"
    return StepResult(step.part, step.name, ended, round(seconds, 1), detail, log.name)


def build(out: Path, capability: tuple[int, int]) -> list[Step]:
    """Compiles the extension in place, for this device alone."""
    major, minor = capability
    # Some instructions of these are in no later architecture, and only there with this suffix.
    suffix = "a" if major in (9, 10) else ""
    variables = {
        "LSTM_CUDA_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}{suffix}",
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0)))),
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    missing = ""
    version = importlib.metadata.version("setuptools") if _has("setuptools") else "0"
    if int(version.split(".")[0]) < 77:
        missing = f"building needs setuptools 77.0.3 or newer; there is {version}"
    return [
        Step(
            "build",
            "extension",
            None if missing else lambda limit_s: command,
            variables,
            weight=1,
            limit_s=300,
            judge=judge_build,
            missing=missing,
        )
    ]


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def judge_build(status: int, log: str) -> tuple[bool, str]:
    errors = [line for line in log.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
    return status == 0, "" if status == 0 else (errors or [last(log)])[0][:200]


def of_part(part: str, out: Path, resume: bool = False) -> list[Step]:
    """The steps of a part."""
    return {"tests": _tests, "sanitize": _sanitize, "micro": _micro, "soak": _soak}.get(
        part, lambda out: _bench(out, resume)
    )(out)


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _tests(out: Path) -> list[Step]:
    """All tests for a GPU: with the free choice of a kernel, then with each family forced."""
    missing = "" if _has("pytest") else "no pytest"
    steps = []
    for family in ("", *FAMILIES):
        log = out / f"tests-{family or 'auto'}.jsonl"
        command = _module("pytest", "-m", "gpu", "-q", "-p", "benchmarks.gpu.pytest_log")
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "tests"]
        steps.append(
            Step(
                "tests",
                family or "auto",
                None if missing else lambda limit_s, command=command: command,  # type: ignore[misc]
                {"LSTM_CUDA_KERNEL": family, TEST_LOG: str(log)},
                weight=4 if not family else 2,
                judge=lambda status, text, log=log: judge_tests(read_records(log)),  # type: ignore[misc]
                missing=missing,
            )
        )
    return steps


def judge_tests(records: Iterable[Record]) -> tuple[bool, str]:
    """A test that a forced family cannot run is neither passed nor failed; nor is a skipped one."""
    counts = {"passed": 0, "failed": 0, "refused": 0, "skipped": 0}
    finished = False
    for record in records:
        finished |= TESTS_FINISHED in record
        if "test" in record:
            counts[outcome(record)] += 1
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    text += "" if finished else "; not all were run"
    return finished and counts["passed"] > 0 and counts["failed"] == 0, text


def outcome(record: Record) -> str:
    """Of one test."""
    refused = record["outcome"] == "failed" and REFUSAL in record.get("message", "")
    return "refused" if refused else str(record["outcome"])


def _sanitize(out: Path) -> list[Step]:
    """The sanitizers over small problems through every family."""
    sanitizer = find_tool("compute-sanitizer")
    steps = []
    for tool in SANITIZERS:
        command = [sanitizer or "", "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND)]
        command += ["--print-limit", "30", "--report-api-errors", "no"]
        if tool != "initcheck":  # which must see what other kernels have written
            command += ["--kernel-name", "kns=lstm_cuda"]
        command += _module("benchmarks.gpu.shapes")
        steps.append(
            Step(
                "sanitize",
                tool,
                (lambda limit_s, command=command: command) if sanitizer else None,  # type: ignore[misc]
                # Every tensor an allocation of its own: else its neighbours hide what is outside.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                weight=1.5,
                judge=judge_sanitizer,
                missing="no compute-sanitizer (a part of the toolkit)",
            )
        )
    return steps


def judge_sanitizer(status: int, log: str) -> tuple[bool, str]:
    """Passed only with a summary that counts nothing."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log)
    clean = bool(summaries) and all(re.search(r"SUMMARY: 0 ", line) for line in summaries)
    results = [line for line in log.splitlines() if re.search(r"\d+ right, \d+ refused", line)]
    return status == 0 and clean, "; ".join([*summaries[-1:], *results[-1:]]) or last(log)


def _micro(out: Path) -> list[Step]:
    command = _module("benchmarks.gpu.micro", "--out", str(out))
    probe = _module("benchmarks.gpu.probe", "--out", str(out))
    record = _module("benchmarks.gpu.record", "--out", str(out))
    times = _module("benchmarks.gpu.step_times", "--out", str(out))
    return [
        Step("micro", "rates and delays", lambda limit_s: command),
        Step("micro", "launches", lambda limit_s: probe, weight=0.5, limit_s=30),  # compiles
        Step("micro", "the emulation's kernels", lambda limit_s: record, limit_s=60),  # compiles
        Step("micro", "step times", lambda limit_s: times, limit_s=90),
    ]


def _soak(out: Path) -> list[Step]:
    def command(limit_s: float) -> list[str]:
        budget = max(5, int(limit_s - 15))
        return _module("benchmarks.gpu.soak", "--out", str(out), "--budget-s", str(budget))

    return [Step("soak", "repetition", command, weight=1.5)]


def _bench(out: Path, resume: bool) -> list[Step]:
    """The grid with the free choice of a kernel; then families in turn, while there is time."""

    def command(limit_s: float, folder: Path, *options: str) -> list[str]:
        # The summary is written after the budget, and the last point may take some seconds.
        arguments = ["--out", str(folder), "--budget-s", str(max(5, int(limit_s - 25)))]
        arguments += ["--resume"] if resume else []
        return _module("benchmarks", "--device", "cuda", *options, *arguments)

    forced = ["--workloads", "square", "--no-graphs", "--pair-s", "0.1", "--kernel", *FAMILIES]
    return [
        Step("bench", "grid", lambda limit_s: command(limit_s, out), weight=8, again=DEVICE_LOST),
        Step(
            "bench",
            "families",
            lambda limit_s: command(limit_s, out / "families", *forced),
            weight=3,
            again=DEVICE_LOST,
        ),
    ]
