"""The GPU's side of the benchmarks, as far as it can be seen without a GPU."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as entry
from benchmarks.environment import CudaEnvironment
from benchmarks.gpu import measure, run
from benchmarks.gpu.device import Cuda, NoDevice, allowed
from benchmarks.gpu.grid import (
    BATCH,
    GROUPS,
    HIDDEN,
    PRECISIONS,
    STEPS,
    Point,
    all_points,
    flops,
    for_check,
    select,
    shortened,
)
from benchmarks.gpu.records import REFUSAL, read_records
from benchmarks.gpu.summary import families, summarize, table
from benchmarks.results import ResultsFile
from benchmarks.timing import HostClock
from benchmarks.variants import VARIANTS
from benchmarks.workloads import Workload
from lstm_cuda import CudaDevice, FusedLSTM, explain, force_kernel

MODES = ("inference", "training")
ENVIRONMENT = CudaEnvironment(
    "a card", "9.0", 132, 79.1, 50.0, "580.1", None, "a cpu", 16, "2.11", "13.0", 91900, "0.1",
    "0123456789abcdef+", "2026-01-02T03:04:05+00:00",
)  # fmt: skip


class FakeDevice:
    """The CPU in the place of a GPU: graphs are the calls themselves, or cannot be made."""

    torch_device = torch.device("cpu")
    clock = HostClock()

    def __init__(self, captures: bool = True) -> None:
        self.captures, self.captured = captures, 0

    def synchronize(self) -> None:
        pass

    def peak_mib(self, call: Callable[[], object]) -> float:
        call()
        return 1.5

    def capture(self, call: Callable[[], object], times: int) -> Callable[[], object]:
        self.captured += 1
        if not self.captures and self.captured % 2:
            raise RuntimeError("not while capturing\nmore words")
        return lambda: [call() for _ in range(times)]

    def clean(self) -> None:
        pass

    def lost(self) -> bool:
        return False


def small(variant: str = "dense", name: str = "small", **changes: object) -> Workload:
    return Workload(name, "workload", 6, 3, 5, 7, variant=variant, **changes)  # type: ignore[arg-type]


def point(workload: Workload, precision: str = "fp32", graph: bool = False) -> Point:
    return Point(workload, PRECISIONS[precision], rank=0, graph=graph)


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.MIN_SAMPLE_MS", 0.05)


# The grid


def test_the_square_sweep_is_whole() -> None:
    square = [p for p in all_points() if p.workload.group == "square"]
    found = {(p.workload.hidden_size, p.workload.batch, p.precision.name) for p in square}
    assert found == {(h, b, p) for h in HIDDEN for b in BATCH for p in PRECISIONS}
    assert len(square) == len(found)
    assert all(p.workload.input_size == p.workload.hidden_size for p in square)
    assert all(p.workload.modes == MODES for p in square)


def test_every_group_and_boundary_is_measured() -> None:
    points = all_points()
    assert {p.workload.group for p in points} == set(GROUPS)
    assert {p.workload.variant for p in points} == set(VARIANTS) - {"stream", "penalty"}
    assert all(p.workload.variant == "dense" for p in points if p.graph)
    keys = [(p.workload.name, p.precision.name) for p in points]
    assert len(set(keys)) == len(keys)


def test_real_nets_come_first_and_strict_float32_last() -> None:
    points = all_points()
    assert [p.rank for p in points] == sorted(p.rank for p in points)
    first = points[: len({p.workload.name for p in points if p.workload.group == "workload"})]
    assert {p.workload.group for p in first} == {"workload"}
    assert {p.precision.name for p in points[-30:]} == {"fp32"}
    core = [p for p in points if p.workload.name == "B16-H256" and p.precision.name == "fp16"]
    rest = [p for p in points if p.workload.name == "B16-H192" and p.precision.name == "fp16"]
    assert points.index(core[0]) < points.index(rest[0])


def test_selection() -> None:
    points = select(all_points(), ["square"], ["bf16"], ["training"])
    assert len(points) == len(HIDDEN) * len(BATCH)
    assert {p.workload.modes for p in points} == {("training",)}
    assert [p.workload.name for p in select(all_points(), ["TSF darts"], ["tf32"], MODES)] == [
        "TSF darts"
    ]
    assert select(all_points(), ["NAM amp, training"], ["tf32"], ["inference"]) == []


def test_long_calls_are_shortened() -> None:
    wide = Workload("wide", "square", STEPS, 256, 2048, 2048)
    assert shortened(wide, PRECISIONS["fp32"]).steps < shortened(wide, PRECISIONS["bf16"]).steps
    assert shortened(wide, PRECISIONS["fp32"], longest_ms=0.1).steps == 16
    assert shortened(small(), PRECISIONS["fp32"]).steps == small().steps
    assert for_check(wide).steps < 16
    assert for_check(small()) == small()


def test_operations() -> None:
    one = Workload("one", "square", 10, 3, 5, 7)
    assert flops(one, training=False) == 2 * 4 * 7 * (5 + 7) * 3 * 10
    assert flops(one, training=True) == 3 * flops(one, training=False)
    two = dataclasses.replace(one, num_layers=2, bidirectional=True)
    assert flops(two, False) == 2 * 2 * 4 * 7 * (5 + 7 + 14 + 7) * 3 * 10
    projected = dataclasses.replace(one, proj_size=2)
    assert flops(projected, False) == 2 * (4 * 7 * (5 + 2) + 7 * 2) * 3 * 10


# One point


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "stream"])
def test_a_point_is_checked_and_measured(variant: str) -> None:
    settings = measure.Settings(pair_s=0.0)
    records = list(measure.measure(point(small(variant)), FakeDevice(), settings))
    assert [record["mode"] for record in records] == ["inference", "training"]
    for record in records:
        assert record["error"] is None and record["check"]["failures"] == []
        assert record["baseline"] == VARIANTS[variant].baseline
        for side in ("baseline", "fused"):
            ms = record["comparison"][f"{side}_ms"]["median"]
            assert record["us_per_step"][side] == pytest.approx(ms * 1e3 / 6, rel=1e-3, abs=1e-5)
            assert record["host_ms"][side] > 0
            assert record["peak_mib"][side] == 1.5
        assert record["graph"] is None
    assert "inference, saves nothing" in records[0]["plan"]
    assert "saves for backward" in records[1]["plan"]
    json.dumps(records)


def test_a_projected_stack_passes_its_check() -> None:
    workload = small(num_layers=2, bidirectional=True, proj_size=4)
    for record in measure.measure(point(workload), FakeDevice(), measure.Settings(pair_s=0.0)):
        assert record["error"] is None


def test_graphs_hold_one_call_for_each_input() -> None:
    settings = measure.Settings(pair_s=0.0)
    record, _ = measure.measure(point(small(), graph=True), FakeDevice(), settings)
    eager, graph = record["comparison"], record["graph"]["comparison"]
    # The same calls on the CPU: a time that were not divided would be four times as long.
    assert graph["baseline_ms"]["median"] < 2 * eager["baseline_ms"]["median"]
    device = FakeDevice()
    list(measure.measure(point(small(), graph=True), device, measure.Settings("auto", 0.0, False)))
    assert device.captured == 0


def test_a_graph_that_cannot_be_made_is_a_result_too() -> None:
    device = FakeDevice(captures=False)
    settings = measure.Settings(pair_s=0.0)
    for record in measure.measure(point(small(), graph=True), device, settings):
        graph = record["graph"]
        assert graph["baseline_error"] == "RuntimeError: not while capturing"
        assert "comparison" not in graph and graph["fused_ms"]["median"] > 0


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    build = measure.Case.build

    def sabotaged(*arguments: object, **options: object) -> object:
        case = build(*arguments, **options)
        case.fused_lstm.bias_hh_l0.data[0] += 1
        return case

    monkeypatch.setattr(measure.Case, "build", sabotaged)
    for record in measure.measure(point(small()), FakeDevice(), measure.Settings(pair_s=0.0)):
        assert record["comparison"] is None and record["error"] == "wrong result"
        assert record["check"]["failures"]


def test_a_kernel_is_forced_while_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[str] = []

    class Forced:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            forced.append(self.name)

        def __exit__(self, *_: object) -> None:
            forced.append("end")

    monkeypatch.setattr(measure.lstm_cuda, "force_kernel", Forced)
    settings = measure.Settings("rec_step", 0.0)
    for record in measure.measure(point(small()), FakeDevice(), settings):
        assert forced == ["rec_step"] and record["kernel"] == "rec_step"
    assert forced == ["rec_step", "end"]


@pytest.mark.parametrize("name", PRECISIONS)
def test_both_sides_get_the_same_tf32_setting(name: str) -> None:
    before = torch.backends.cudnn.allow_tf32
    with allowed(PRECISIONS[name]):
        assert torch.backends.cudnn.allow_tf32 is (name == "tf32")
        assert torch.backends.cuda.matmul.allow_tf32 is (name == "tf32")
    assert torch.backends.cudnn.allow_tf32 is before


def test_the_host_time_is_a_median() -> None:
    assert measure.host_ms(lambda: None, FakeDevice()) < 1.0


# A run


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def fake_records(p: Point, kernel: str, error: str | None = None) -> Iterator[dict]:
    for mode in p.workload.modes:
        yield {**measure.head(p, mode, kernel), "error": error}


def test_a_run_keeps_the_order_and_ends_with_its_time() -> None:
    clock, records = Clock(), []
    work = [(point(small(name=name)), "auto") for name in "abcd"]

    def measured(p: Point, kernel: str) -> Iterator[dict]:
        clock.time += 4.0
        return fake_records(p, kernel)

    outcome = run.run_points(work, measured, records.append, end=10.0, now=clock)
    assert [r["name"] for r in records] == ["a", "a", "b", "b", "c", "c"]
    assert (outcome.measured, outcome.left, outcome.wrong) == (3, 1, 0)


@pytest.mark.parametrize("lost", [False, True])
def test_an_error_is_recorded_and_ends_the_run_only_with_the_device(lost: bool) -> None:
    records: list[dict] = []
    work = [(point(small(name=name)), "auto") for name in "ab"]

    def measured(p: Point, kernel: str) -> Iterator[dict]:
        first = next(fake_records(p, kernel))
        yield first
        if p.workload.name == "a":
            raise RuntimeError("an illegal address\nmore words")
        yield {**first, "mode": "training"}

    outcome = run.run_points(work, measured, records.append, 9.0, Clock(), lambda: lost)
    errors = [(r["name"], r["mode"], r["error"]) for r in records]
    assert errors[:2] == [
        ("a", "inference", None),
        ("a", "training", "RuntimeError: an illegal address"),
    ]
    assert outcome.lost is lost
    assert (len(records), outcome.left) == ((2, 1) if lost else (4, 0))


def test_wrong_results_are_counted() -> None:
    def measured(p: Point, kernel: str) -> Iterator[dict]:
        return fake_records(p, kernel, "wrong result")

    work = [(point(small()), "auto")]
    assert run.run_points(work, measured, lambda record: None, 9.0, Clock()).wrong == 2


def test_resuming_measures_what_is_missing(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "gpu.jsonl", ENVIRONMENT)
    first, second = point(small(name="first")), point(small(name="second"))
    for record in fake_records(first, "auto"):
        file.add(record)
    file.add(next(fake_records(second, "auto")))  # its training is missing
    with file.path.open("a") as stream:
        stream.write('{"name": "cut o')
    records = read_records(file.path)
    assert len(records) == 3
    done = {measure.key(record) for record in records}
    assert run.remaining([first, second], ["auto", "rec_cta"], done) == [
        (first, "rec_cta"),
        (second, "auto"),
        (second, "rec_cta"),
    ]
    ResultsFile(file.path, ENVIRONMENT, append=True)
    assert len(read_records(file.path)) == 3


# Tables and pictures


def measured_records(kernel: str = "auto") -> list[dict]:
    points = [
        point(small(), graph=True),
        point(Workload("B3-H7", "square", 6, 3, 7, 7), "bf16"),
        point(dataclasses.replace(small("lengths", name="l"), group="lengths")),
    ]
    device = FakeDevice(captures=kernel == "auto")
    settings = measure.Settings(pair_s=0.0)
    records = [r for p in points for r in measure.measure(p, device, settings)]
    records += fake_records(point(small(name="bad")), kernel, "OutOfMemoryError: a | b")
    environment = dataclasses.asdict(ENVIRONMENT)
    return [{**r, "kernel": kernel, "environment": environment} for r in records]


def test_the_summary_shows_every_kind_of_result() -> None:
    text = summarize([*measured_records(), *measured_records("rec_step")])
    for part in (
        "on a card",
        "driver 580.1",
        "cuDNN 91900",
        "0123456789abcdef+",
        "## Ratios",
        "## Square sweep, bf16, training",
        "## workload",
        "## lengths",
        "| l | T6 B3 5→7 |",
        "## Captured in a CUDA graph",
        "## Kernel families",
        "OutOfMemoryError: a / b",
    ):
        assert part in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in lines)
    assert summarize([]) == "# lstm_cuda on a GPU\n\nNothing was measured.\n"


def test_a_forced_kernel_alone_has_its_tables_too() -> None:
    text = summarize(measured_records("rec_step"))
    assert "## Square sweep, bf16, training" in text and "## Kernel families" not in text


def test_the_kernels_that_ran_are_named() -> None:
    h100 = CudaDevice(architecture=90, multiprocessors=132, shared_bytes=232448)
    lstm = FusedLSTM(5, 200, 2, bidirectional=True, dtype=torch.bfloat16)
    x = torch.randn(500, 16, 5, dtype=torch.bfloat16)
    assert families({"plan": explain(lstm, x, h100)}) == "rec_cluster"
    with force_kernel("rec_group"):
        assert families({"plan": explain(lstm, x, h100)}) == "rec_group"
    plan = "layer 0\n  forward: rec_cta, a\n  backward: rec_step, b\n  forward: rec_cta, c"
    assert families({"plan": plan}) == "rec_cta, rec_step"
    assert families({}) == families({"plan": explain(lstm, x)}) == "-"


def test_a_forced_family_that_does_not_fit_is_no_failure() -> None:
    records = measured_records("rec_cta")
    refusal = f"RuntimeError: lstm_cuda: rec_cta {REFUSAL} H=512, P=512 here: too wide"
    records += [{**records[-1], "name": "wide", "error": refusal}]
    text = summarize(records)
    assert "wide" not in text and "OutOfMemoryError" in text


def test_numbers_are_to_the_right() -> None:
    assert table(["a", "b"], [["x", 1]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.gpu.plots import plot_all

    plot_all(tmp_path, measured_records())
    assert {path.name for path in tmp_path.iterdir()} == {
        "gpu-square.png",
        "gpu-workload.png",
        "gpu-lengths.png",
    }


# The program


def test_the_list_needs_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--device", "cuda", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(all_points())
    assert lines[0].startswith("workload ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NoDevice, match="no CUDA device"):
        Cuda()
    assert entry.main(["--device=cuda", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_workload_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--workloads", "nonsense"])
    assert "nonsense" in capsys.readouterr().err
