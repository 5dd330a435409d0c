"""What is asked of a GPU for the choice of kernels: launches that it can do, times of steps."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import probe, shapes, step_times, steps
from benchmarks.gpu.check_report import report
from benchmarks.gpu.toolkit import find_tool
from benchmarks.timing import HostClock
from lstm_cuda import CudaDevice

CPU = torch.device("cpu")

ANSWERS = """
{"name": "clusters of 16 that run at once", "value": 7, "error": null}
{"name": "cooperative launch", "value": 1, "error": null}
{"name": "cooperative launch, replays in a graph of 3", "value": 3, "error": null}
"""


def test_answers_of_the_probe() -> None:
    records = probe.read_answers(f"a warning\n{ANSWERS}")
    assert [(r["name"].split(",")[0], r["median"], r["unit"]) for r in records] == [
        ("clusters of 16 that run at once", 7, "times"),
        ("cooperative launch", 1, "times"),
        ("cooperative launch", 3, "times"),
    ]
    assert probe.missing(records) == []
    refused = ANSWERS.replace('3, "error": null', '0, "error": "cudaErrorStreamCaptureUnsupported"')
    assert probe.missing(probe.read_answers(refused)) == [
        "cooperative launch, replays in a graph of 3"
    ]
    assert len(probe.missing([])) == 2


@pytest.mark.skipif(find_tool("nvcc") is None, reason="no nvcc")
def test_the_probe_compiles(tmp_path: Path) -> None:
    program = tmp_path / "probe"
    for capability in ((9, 0), (8, 0)):
        command = probe.compile_command(str(find_tool("nvcc")), capability, program)
        subprocess.run([*command, "-Werror", "all-warnings"], check=True)
    if not torch.cuda.is_available():
        done = subprocess.run([str(program)], capture_output=True, text=True)
        assert done.returncode == 2 and json.loads(done.stdout)["error"].startswith("cudaError")


def test_step_times_are_of_every_kernel_that_plans_name() -> None:
    h200 = CudaDevice(architecture=90, multiprocessors=132, shared_bytes=232448)
    found = list(step_times.subjects(h200))
    assert len(found) == len(set(found))
    assert {s.family for s in found} == {"rec_cta", "rec_cluster", "rec_group"}
    for hidden, family in ((32, "rec_cta"), (384, "rec_cluster"), (2048, "rec_group")):
        some = {
            (s.arithmetic, s.backward) for s in found if (s.hidden, s.family) == (hidden, family)
        }
        exact = {("float32", False), ("float32", True)} if family == "rec_cta" else set()
        rounded = {"tf32", "float16", "bfloat16"}
        assert some == exact | {(a, backward) for a in rounded for backward in (False, True)}
    columns = {(s.columns, s.turns) for s in found if (s.hidden, s.arithmetic) == (256, "bfloat16")}
    assert columns == {(8, 1), (16, 1), (16, 2), (32, 1), (32, 2)}
    assert {s.turns for s in found if s.family != "rec_cluster"} == {1}
    a100 = CudaDevice(architecture=80, multiprocessors=108, shared_bytes=166912)
    assert {s.family for s in step_times.subjects(a100)} == {"rec_cta", "rec_group"}


class Host:
    """The CPU as a device; time passes only by steps."""

    torch_device = CPU
    clock = HostClock()

    def clean(self) -> None:
        pass


def subject(backward: bool) -> step_times.Subject:
    return step_times.Subject(
        "rec_cta", shapes.PRECISIONS["fp32"], 32, 8, 1, 8, backward, "float32"
    )


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_is_the_difference_of_two_lengths(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, product = step_times.calls(subject(backward), 5, CPU)
    assert whole() is not None and product() is not None

    class Counted(Host):
        """Every call takes 1 ms, and 2 us more for each step; products 0.5 ms and nothing."""

        class clock:
            @staticmethod
            def mean_ms(call: Callable[[], float], repeats: int) -> float:
                return call()

    def calls(_: object, steps: int, __: object) -> tuple[Callable[[], float], ...]:
        return lambda: 1 + 2e-3 * steps, lambda: 0.5

    monkeypatch.setattr(step_times, "calls", calls)
    assert step_times.step_us(subject(backward), Counted()) == pytest.approx([2.0] * 7)  # type: ignore[arg-type]


def test_step_times_go_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def step_us(which: step_times.Subject, device: object) -> list[float]:
        if which.backward:
            raise RuntimeError("an illegal address")
        return [0.3, 0.1, 0.2]

    monkeypatch.setattr(step_times, "step_us", step_us)
    both = [subject(True), subject(False)]
    bad, good = step_times.measure_all(both, Host(), 90, lambda: False)  # type: ignore[arg-type]
    assert bad["error"] == "RuntimeError: an illegal address"
    assert (good["low"], good["median"], good["high"]) == (0.1, 0.2, 0.3)
    lost = list(step_times.measure_all(both, Host(), 90, lambda: True))  # type: ignore[arg-type]
    assert lost == [bad]


def test_packing_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def pack(w_hh: list[torch.Tensor], w_hr: list[torch.Tensor], layout: int) -> torch.Tensor:
        asked.append((w_hh[0].shape, w_hh[0].dtype, layout))
        return w_hh[0]

    monkeypatch.setattr(step_times.ops, "packed_layout", lambda *_: 7)
    monkeypatch.setattr(step_times.ops, "pack_weights", pack)
    monkeypatch.setattr(step_times, "step_us", lambda *_: [0.1])
    precision = shapes.PRECISIONS["bf16"]
    both = [
        step_times.Subject("rec_group", precision, 512, 8, 1, 32, backward, "bfloat16")
        for backward in (False, True)
    ]
    good, other = step_times.measure_all(both, Host(), 90, lambda: False)  # type: ignore[arg-type]
    assert good["error"] is None and good["packing"] > 0 and other["packing"] is None
    assert set(asked) == {((2048, 512), torch.bfloat16, 7)}
    (cta,) = step_times.measure_all([subject(False)], Host(), 90, lambda: False)  # type: ignore[arg-type]
    assert cta["packing"] is None


STEP_TIME = {
    "kind": "step time",
    "family": "rec_cluster",
    "arithmetic": "bfloat16",
    "padded_hidden": 256,
    "columns": 16,
    "turns": 2,
    "backward": False,
    "architecture": 90,
    "error": None,
    "median": 0.51234,
    "packing": 4.56,
    "environment": {"device": "NVIDIA H200", "date": "2026-12-01T10:00:00+00:00"},
}


def test_rows_for_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step-times.jsonl"
    failed = {**STEP_TIME, "error": "RuntimeError: x"}
    path.write_text(f"{json.dumps(STEP_TIME)}\n{json.dumps(failed)}\n")
    assert step_times.main(["--print", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == (
        "{Family::rec_cluster, Arithmetic::bfloat16, 256, 2, 2, false, 90, 0.512},"
        "  // NVIDIA H200, 2026-12-01"
    )
    text = report(tmp_path, None, [])
    assert "| rec_cluster | bfloat16 | 256 | 16 | 2 | False | 0.512 | 4.6 |" in text
    assert "RuntimeError: x" in text


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_measured_time_replaces_the_estimate(tmp_path: Path) -> None:
    """The row that is printed, in the table where it belongs."""
    csrc = steps.ROOT / "csrc"
    header = (csrc / "cuda" / "plan_model.h").read_text()
    empty = "std::array<Measured, 0> kMeasured{};"
    assert header.count(empty) == 1
    (row,) = step_times.rows([STEP_TIME])
    header = header.replace(empty, f"std::array<Measured, 1> kMeasured{{{{\n{row}\n}}}};")
    folder = tmp_path / "cuda"
    shutil.copytree(csrc / "cuda", folder, ignore=shutil.ignore_patterns("*.cu*"))
    shutil.copy(csrc / "recurrence.h", tmp_path)
    shutil.copy(csrc / "host_device.h", tmp_path)
    (folder / "plan_model.h").write_text(header)
    (tmp_path / "main.cpp").write_text(
        """
#include "cuda/plan_model.h"
using namespace lstm_cuda;
constexpr double step(int tiles, bool backward, int architecture, int turns = 2) {
  return model::step_us(Family::rec_cluster, Arithmetic::bfloat16, 256, tiles, turns, backward,
                        {architecture, 132, 232448}, 1900);
}
static_assert(step(2, false, 90) == 0.512);
static_assert(step(1, false, 90) == 1 && step(2, true, 90) == 1 && step(2, false, 100) == 1);
static_assert(step(2, false, 90, 1) == 1);
int main() {}
"""
    )
    command = ["g++", "-std=c++20", "-fsyntax-only", str(tmp_path / "main.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
