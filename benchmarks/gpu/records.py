"""What the programs for a GPU and their reports share; it imports nothing that must be built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]

FAMILIES = ("rec_cta", "rec_cluster", "rec_group", "rec_step")  # of kernels; forced in turn
REFUSAL = "cannot run a layer of"  # in the message where a forced family does not fit the problem
STEP_TIMES = "step-times.jsonl"  # what step_times writes
TEST_LOG = "LSTM_CUDA_TEST_LOG"  # environment variable: where pytest_log writes
TESTS_FINISHED = "finished"  # in the last line there, if the tests were not cut off
DEVICE_LOST = 3  # exit status of a benchmark that can go on only in a new process


def read_records(path: Path) -> list[Record]:
    """The records of a file of JSON lines; a line that was cut off is none."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def soak_passed(record: Record) -> bool:
    """Whether nothing differed and nothing failed."""
    good = record["error"] is None and record["differences"] == 0
    return good and record.get("finite", True)
