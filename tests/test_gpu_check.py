"""The check on a GPU, as far as it can be seen without one: its steps, limits, verdicts, report."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import micro, probe, record, run, shapes, soak, step_times, steps
from benchmarks.gpu.check_report import report
from benchmarks.gpu.records import DEVICE_LOST, FAMILIES, REFUSAL, read_records, soak_passed
from benchmarks.gpu.steps import Step, StepResult
from benchmarks.gpu.toolkit import find_tool
from lstm_cuda import ops

without_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
CPU = torch.device("cpu")


def python(code: str, **changes: object) -> Step:
    command = [sys.executable, "-c", code]
    return Step("part", "step", lambda limit_s: list(command), **changes)  # type: ignore[arg-type]


# Steps


def test_every_part_has_steps(tmp_path: Path) -> None:
    for part in steps.PARTS:
        found = steps.of_part(part, tmp_path)
        assert found and all(step.part == part for step in found)
        assert all(step.missing or step.command for step in found)
        assert len({step.log_name for step in found}) == len(found)


def test_families_are_forced_in_turn(tmp_path: Path) -> None:
    found = steps.of_part("tests", tmp_path)
    assert [step.environment["LSTM_CUDA_KERNEL"] for step in found] == ["", *FAMILIES]
    assert all("gpu" in step.shown() for step in found)


def test_families_are_measured_apart_from_the_grid(tmp_path: Path) -> None:
    grid, forced = steps.of_part("bench", tmp_path)
    assert f"--out {tmp_path} " in grid.shown() and "--kernel" not in grid.shown()
    assert f"--out {tmp_path / 'families'} " in forced.shown()
    assert f"--kernel {' '.join(FAMILIES)} " in forced.shown()
    assert forced.log_name != grid.log_name
    run._parse(forced.command(60)[5:])  # type: ignore[misc]


def test_families_are_those_that_there_are() -> None:
    assert tuple(ops._C.kernel_families()) == FAMILIES


def test_every_sanitizer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "find_tool", lambda name: f"/a/{name}")
    found = steps.of_part("sanitize", tmp_path)
    assert [step.name for step in found] == ["memcheck", "racecheck", "synccheck", "initcheck"]
    for step in found:
        assert f"/a/compute-sanitizer --tool {step.name} --error-exitcode 9" in step.shown()
        assert ("kns=lstm_cuda" in step.shown()) is (step.name != "initcheck")
    monkeypatch.setattr(steps, "find_tool", lambda name: None)
    assert all(step.command is None for step in steps.of_part("sanitize", tmp_path))


@pytest.mark.parametrize(
    ("capability", "architecture"), [((9, 0), "9.0a"), ((8, 6), "8.6"), ((12, 0), "12.0")]
)
def test_the_build_is_for_the_device(capability: tuple[int, int], architecture: str) -> None:
    (step,) = steps.build(Path(), capability)
    assert step.environment["TORCH_CUDA_ARCH_LIST"] == architecture
    assert int(step.environment["MAX_JOBS"]) >= 1


def test_a_build_needs_a_setuptools_that_reads_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.importlib.metadata, "version", lambda name: "65.5.0")
    (step,) = steps.build(Path(), (9, 0))
    assert step.command is None and "there is 65.5.0" in step.missing


def test_a_program_knows_when_to_end(tmp_path: Path) -> None:
    for bench in steps.of_part("bench", tmp_path, resume=True):
        assert "--budget-s 275 --resume" in bench.shown(300)
    for bench in steps.of_part("bench", tmp_path):
        assert bench.shown(300).endswith("--budget-s 275")
    (repetition,) = steps.of_part("soak", tmp_path)
    assert repetition.shown(100).endswith("--budget-s 85")


# Running


def test_a_step_that_passes(tmp_path: Path) -> None:
    result = steps.run_step(python("print('much'); print('well done')"), 60, tmp_path)
    assert (result.status, result.detail) == ("passed", "well done")
    assert (tmp_path / str(result.log)).read_text() == "much\nwell done\n"


def test_a_step_that_fails(tmp_path: Path) -> None:
    result = steps.run_step(python("raise SystemExit('no')"), 60, tmp_path)
    assert (result.status, result.detail) == ("failed", "no")


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.perf_counter()
    result = steps.run_step(python(code), 1.0, tmp_path)
    assert result.status == "cut off" and time.perf_counter() - start < 3.5
    time.sleep(4)
    assert not mark.exists()


def test_a_lost_device_is_left_for_a_new_process(tmp_path: Path) -> None:
    code = f"import sys; sys.exit(0 if '--resume' in sys.argv else {DEVICE_LOST})"
    assert steps.run_step(python(code, again=DEVICE_LOST), 60, tmp_path).status == "passed"
    assert steps.run_step(python(code), 60, tmp_path).status == "failed"


def test_what_is_missing_is_not_run(tmp_path: Path) -> None:
    result = steps.run_step(Step("part", "step", None, missing="no tool"), 60, tmp_path)
    assert (result.status, result.detail) == ("not run", "no tool")


def test_shares_of_the_time() -> None:
    todo = [python("", weight=w) for w in (1.0, 3.0)]
    assert gpu_check.limits(todo, 100) == 25
    assert gpu_check.limits(todo[1:], 90) == 90  # what the first left over is the second's
    missing = dataclasses.replace(todo[0], command=None)
    assert gpu_check.limits([missing, *todo], 100) == 0
    assert gpu_check.limits([*todo, missing], 100) == 25
    long = [dataclasses.replace(todo[0], limit_s=60), todo[1]]
    assert gpu_check.limits(long, 100) == 60
    assert gpu_check.limits(long, 40) == 40


def test_nothing_runs_after_a_failed_build_or_past_the_time(tmp_path: Path) -> None:
    broken = dataclasses.replace(python("raise SystemExit(1)"), part="build")
    end = time.perf_counter() + 60
    results = gpu_check.run_all([broken, python("")], end, tmp_path)
    assert [(r.status, r.detail) for r in results[1:]] == [("not run", "the build failed")]
    (late,) = gpu_check.run_all([python("")], time.perf_counter() + 1, tmp_path)
    assert (late.status, late.detail) == ("not run", "no time was left")


def test_results_of_other_parts_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    first = StepResult("tests", "auto", "failed", 1.0, "", "a.log")
    again = dataclasses.replace(first, status="passed")
    other = StepResult("micro", "rates", "passed", 1.0, "", "b.log")
    gpu_check.keep(path, [first], {})
    gpu_check.keep(path, [other], {})
    assert gpu_check.keep(path, [again], {}) == [again, other]


# Verdicts


def test_skips_and_refusals_are_no_passes() -> None:
    refused = {"test": "b", "outcome": "failed", "message": f"RuntimeError: rec_cta {REFUSAL} H=9"}
    skipped = {"test": "c", "outcome": "skipped", "message": "no CUDA device"}
    passed = {"test": "a", "outcome": "passed"}
    failed = {"test": "d", "outcome": "failed", "message": "wrong"}
    end = {"finished": 1}
    assert steps.judge_tests([passed, refused, skipped, end]) == (
        True,
        "1 passed, 0 failed, 1 refused, 1 skipped",
    )
    assert not steps.judge_tests([refused, skipped, end])[0]
    assert not steps.judge_tests([passed, failed, end])[0]
    assert steps.judge_tests([passed]) == (
        False,
        "1 passed, 0 failed, 0 refused, 0 skipped; not all were run",
    )
    assert not steps.judge_tests([])[0]


@pytest.mark.parametrize(
    ("status", "log", "good"),
    [
        (0, "60 right, 3 refused, 0 wrong\n========= ERROR SUMMARY: 0 errors", True),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        (9, "========= ERROR SUMMARY: 2 errors", False),
        (0, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", False),
        (1, "60 right, 3 refused, 1 wrong\n========= ERROR SUMMARY: 0 errors", False),
        (0, "60 right, 3 refused, 0 wrong", False),
    ],
)
def test_verdict_of_a_sanitizer(status: int, log: str, good: bool) -> None:
    assert steps.judge_sanitizer(status, log)[0] is good


def test_the_log_of_pytest_holds_every_outcome(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'too bad'\n"
        "def test_skipped(): pytest.skip('no CUDA device')\n"
        "@pytest.fixture\ndef broken(): raise RuntimeError('in the fixture')\n"
        "def test_set_up(broken): pass\n"
    )
    (tmp_path / "test_unread.py").write_text("import no_such_module\n")
    log = tmp_path / "log.jsonl"
    plugin = ["-p", "benchmarks.gpu.pytest_log", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugin, "--continue-on-collection-errors"]
    command += ["--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path)]
    output = tmp_path / "output"
    steps.run_limited(command, 60, output, {"LSTM_CUDA_TEST_LOG": str(log)})
    records = read_records(log)
    found = {r["test"].split("::")[-1]: r for r in records if "test" in r}
    outcomes = {name: record["outcome"] for name, record in found.items()}
    assert outcomes == {
        "test_unread.py": "failed",
        "test_good": "passed",
        "test_bad": "failed",
        "test_skipped": "skipped",
        "test_set_up": "failed",
    }, output.read_text()
    assert "too bad" in found["test_bad"]["message"]
    assert "no CUDA device" in found["test_skipped"]["message"]
    assert "in the fixture" in found["test_set_up"]["message"]
    assert "no_such_module" in found["test_unread.py"]["message"]
    assert records[-1] == {"finished": 1}


# The programs that steps start


def test_small_problems_cover_everything() -> None:
    problems = list(shapes.problems())
    for name in ("precision", "direction", "option", "sizes"):
        assert len({getattr(p, name) for p in problems}) > 2
    combinations = {(p.precision, p.direction, p.option) for p in problems}
    assert len(combinations) == len(problems) == 5 * 3 * 4
    for precision in shapes.ALL_PRECISIONS:
        assert {p.sizes for p in problems if p.precision is precision} == set(shapes.SIZES)
    assert max(p.sizes[0] for p in problems) <= 5


def test_small_problems_are_right_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert shapes.main(["--device", "cpu", "--families", "auto"]) == 0
    assert "60 right, 0 refused, 0 wrong" in capsys.readouterr().out


def test_a_wrong_result_and_a_refusal_are_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(problem: shapes.Problem, device: torch.device) -> dict[str, float]:
        if problem.option == "projected":
            raise RuntimeError(f"rec_cta {REFUSAL} H=9")
        return {"y": 1e-13 if problem.option == "plain" else float("nan")}

    monkeypatch.setattr(shapes, "run_problem", fake)
    assert shapes.main(["--device", "cpu", "--families", "auto"]) == 1
    assert "15 right, 15 refused, 30 wrong" in capsys.readouterr().out

    def broken(problem: shapes.Problem, device: torch.device) -> dict[str, float]:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(shapes, "run_problem", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        shapes.main(["--device", "cpu", "--families", "auto"])


def test_the_recorder_is_compiled_for_the_device(tmp_path: Path) -> None:
    command = record.compile_command("nvcc", (9, 0), tmp_path / "record")
    assert "-gencode=arch=compute_90a,code=sm_90a" in command
    assert command[-3] == str(record.RECORDER)
    assert record.compile_command("nvcc", (8, 6), tmp_path)[3].endswith("code=sm_86")
    assert record.file_name("NVIDIA H200") == "nvidia-h200.json"


def test_tools_are_looked_for_in_the_toolkit_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "some-tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_tool("some-tool") == str(tool)
    monkeypatch.delenv("CUDA_HOME")
    assert find_tool("some-tool") is None
    assert find_tool("sh") is not None


def work_of(values: Callable[[int], float]) -> Callable[[], list[torch.Tensor]]:
    calls = iter(range(10**6))
    return lambda: [torch.ones(3), torch.full((2,), values(next(calls)))]


def test_a_difference_of_one_bit_in_one_call_is_counted() -> None:
    end = time.perf_counter() + 60
    same = soak.repeat(work_of(lambda call: 1.0), 5, 40, end)
    assert same == {"calls": 40, "steps": 200, "differences": 0, "finite": True}
    once = soak.repeat(work_of(lambda call: 1.0 + (call == 23) * 2**-23), 5, 40, end)
    assert once["differences"] == 1
    last = soak.repeat(work_of(lambda call: 1.0 + (call == 39) * 2**-23), 5, 40, end)
    assert last["differences"] == 1
    assert not soak.repeat(work_of(lambda call: float("nan")), 5, 2, end)["finite"]
    assert soak.repeat(work_of(lambda call: 1.0), 5, 40, time.perf_counter())["calls"] == 2


def test_soaks_run_through_everything_within_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "SIZES", ((9, 2, 3, 5), (7, 3, 4, 8)))
    rows = list(soak.soaks(CPU, 2, 60.0, ["auto"]))
    assert {(row["sizes"], row["dtype"]) for row in rows} == {
        (sizes, dtype)
        for sizes in soak.SIZES
        for dtype in ("float16", "float32", "bfloat16", "float64")
    }
    assert all(soak_passed(row) for row in rows)
    assert list(soak.soaks(CPU, 2, 0.0, ["auto"])) == []
    assert not soak_passed({"error": "RuntimeError: x"})
    assert not soak_passed({"error": None, "differences": 1})


# The program


def test_the_report_names_what_failed(tmp_path: Path) -> None:
    (tmp_path / "tests-rec_cta.jsonl").write_text(
        json.dumps({"test": "t.py::test_a", "outcome": "failed", "message": "a | b\nc"})
        + "\n"
        + json.dumps({"test": "t.py::test_b", "outcome": "failed", "message": f"x {REFUSAL} H=9"})
    )
    (tmp_path / "soak.jsonl").write_text(
        json.dumps({"family": "rec_step", "error": None, "differences": 3, "calls": 9})
    )
    (tmp_path / "micro.jsonl").write_text(
        json.dumps({"name": "launch", "unit": "us", "median": 1.23456})
    )
    (tmp_path / "gpu.jsonl").write_text(
        json.dumps({"comparison": None, "name": "a", "kind": "gpu timing"})
    )
    results = [StepResult("tests", "rec_cta", "failed", 12.3, "1 passed", "a.log")]
    text = report(tmp_path, {"name": "a card"}, results)
    for part in (
        "a card",
        "| tests | rec_cta | failed | 12 | 1 passed | a.log |",
        "| rec_cta | t.py::test_a | a / b |",
        "| rec_step |",
        "| launch, us | 1.235 |",
        "0 of 1 results",
    ):
        assert part in text
    assert "test_b" not in text
    assert "Failed tests" not in report(tmp_path / "empty", None, [])


@without_device
@pytest.mark.parametrize("part", [*steps.PARTS, "all"])
def test_without_a_device_it_says_what_it_would_do(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--part", part, "--out", str(tmp_path / "new")]) == 2
    printed = capsys.readouterr()
    assert "no CUDA device" in printed.err
    for name in steps.PARTS if part == "all" else (part,):
        assert f"  {name}: " in printed.out
    assert not (tmp_path / "new").exists()


@without_device
def test_programs_without_a_device(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for program in (micro, probe, record, soak, step_times):
        assert program.main(["--out", str(tmp_path / "new")]) == 2
        assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_whole_run_leaves_data_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = {"name": "A Card 9000", "capability": (9, 0)}
    monkeypatch.setattr(gpu_check, "describe_device", lambda: device)
    made = {"micro": [python("print('fine')")], "soak": [python("raise SystemExit('bad')")]}
    monkeypatch.setattr(steps, "of_part", lambda part, out, resume: made[part])
    arguments = ["--no-build", "--out", str(tmp_path)]
    assert gpu_check.main(["--part", "micro", *arguments]) == 0
    assert gpu_check.main(["--part", "soak", *arguments]) == 1
    text = (tmp_path / "check.md").read_text()
    assert "| passed |" in text or "| failed |" in text
    assert "A Card 9000" in text and "bad" in text
    data = json.loads((tmp_path / "check.json").read_text())
    assert data["device"]["name"] == "A Card 9000"
    assert "==> part: step" in capsys.readouterr().out
