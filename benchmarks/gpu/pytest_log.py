"""A pytest plugin: one JSON object a test, written as it ends: a run cut off leaves them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from .records import TEST_LOG, TESTS_FINISHED


def _write(record: dict[str, Any]) -> None:
    with Path(os.environ[TEST_LOG]).open("a") as file:
        file.write(json.dumps(record) + "\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    Path(os.environ[TEST_LOG]).write_text("")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    record = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
    if report.outcome != "passed":
        record["message"] = message(report.longrepr)[:500]
    _write(record)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be read, for want of a package perhaps, counts as one test."""
    if report.outcome != "passed":
        text = message(report.longrepr)
        _write({"test": report.nodeid, "outcome": report.outcome, "message": text[-500:]})


def message(longrepr: Any) -> str:
    """Why a test was skipped or failed, from what pytest shows of it."""
    if isinstance(longrepr, tuple):
        return str(longrepr[2])
    crash = getattr(longrepr, "reprcrash", None)
    return str(longrepr) if crash is None else str(crash.message)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    _write({TESTS_FINISHED: int(exitstatus)})
