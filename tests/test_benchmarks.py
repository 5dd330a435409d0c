"""The benchmark program: what it measures is right, and it never reports what is wrong."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("vega_datasets")

from benchmarks import __main__ as entry
from benchmarks import cli, train
from benchmarks.cases import Case
from benchmarks.check import check
from benchmarks.memory import _saved_mib
from benchmarks.timing import MAX_PAIRS, MIN_PAIRS, Spread, compare
from benchmarks.variants import VARIANTS
from benchmarks.workloads import GROUPS, WORKLOADS, Workload, select

CPU = torch.device("cpu")


def small(variant: str = "dense", **changes: object) -> Workload:
    arguments: dict[str, object] = {"variant": variant, "num_layers": 2, **changes}
    return Workload("small", "users", 7, 3, 5, 6, **arguments)  # type: ignore[arg-type]


# Workloads


def test_names_are_unique_and_groups_are_known() -> None:
    names = [workload.name for workload in WORKLOADS]
    assert len(set(names)) == len(names)
    assert not set(names) & set(GROUPS)
    assert {workload.group for workload in WORKLOADS} == set(GROUPS)
    assert {workload.variant for workload in WORKLOADS} == set(VARIANTS)


def test_selection_by_group_name_and_quickness() -> None:
    assert len(select(["square"], quick=False)) == 28
    assert all(workload.quick for workload in select(GROUPS, quick=True))
    assert {workload.group for workload in select(GROUPS, quick=True)} == set(GROUPS)
    assert [workload.name for workload in select(["HYD NeuralHydrology"], quick=True)] == [
        "HYD NeuralHydrology"
    ]


# Checks


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes_its_check(variant: str, dtype: str) -> None:
    result = check(Case.build(small(variant), dtype, CPU))
    assert result.failures == []
    assert math.isfinite(result.worst_error)


def test_a_gradient_at_the_last_step_only_passes_its_check() -> None:
    assert check(Case.build(small(last_step_only=True), "float32", CPU)).failures == []


@pytest.mark.parametrize("value", [1e-3, math.nan])
def test_a_wrong_weight_fails_the_check(value: float) -> None:
    case = Case.build(small(), "float32", CPU)
    with torch.no_grad():
        case.fused_lstm.weight_hh_l0[0, 0] += value
    failures = check(case).failures
    assert any(failure.startswith("inference y: ") for failure in failures)
    assert any(failure.startswith("y: ") for failure in failures)
    assert any(failure.startswith("dx: ") for failure in failures)


def test_training_leaves_gradients_of_one_pass() -> None:
    case = Case.build(small(), "float64", CPU)
    for call in case.calls("training"):
        assert case.torch_lstm.training and case.fused_lstm.training
        call()
        call()  # the second batch: its gradients replace those of the first
    x, dy = case.inputs[1].detach(), case.gradients[1]
    expected = torch.autograd.grad(case.torch_lstm(x)[0], list(case.torch_lstm.parameters()), dy)
    for lstm in (case.torch_lstm, case.fused_lstm):
        for parameter, gradient in zip(lstm.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def test_inference_is_measured_in_evaluation() -> None:
    case = Case.build(small(), "float32", CPU)
    case.calls("inference")
    assert not case.torch_lstm.training and not case.fused_lstm.training


# Timing


class FakeClock:
    """Takes the time that a call returns, times a noise that goes up and down."""

    def __init__(self, noise: float = 1.0) -> None:
        self.noise, self.count = noise, 0

    def mean_ms(self, call: Callable[[], object], repeats: int) -> float:
        self.count += 1
        time_ms = call()
        assert isinstance(time_ms, float)
        return time_ms * (self.noise if self.count % 3 else 1 / self.noise)


def test_ratio_and_verdict() -> None:
    faster = compare(lambda: 6.0, lambda: 2.0, FakeClock(), budget_s=0.0)
    assert (faster.ratio.median, faster.verdict, faster.pairs) == (3.0, "faster", MIN_PAIRS)
    slower = compare(lambda: 2.0, lambda: 6.0, FakeClock(), budget_s=60.0)
    assert (slower.verdict, slower.pairs) == ("slower", MAX_PAIRS)
    assert compare(lambda: 2.0, lambda: 2.1, FakeClock(1.2), budget_s=60.0).verdict == "equal"


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_cannot_be_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="finite positive"):
        Spread.of([1.0, value, 1.0])


def test_budget_is_shared_and_never_negative() -> None:
    assert cli.Budget(total_s=100, row_s=6).share_s(50) == pytest.approx(2, abs=0.1)
    assert cli.Budget(total_s=100, row_s=6).share_s(2) == 6
    assert cli.Budget(total_s=-1, row_s=6).share_s(2) == 0


# Memory


def test_saved_memory_counts_each_storage_once() -> None:
    case = Case.build(small(), "float32", CPU)

    def forward(lstm: torch.nn.Module, x: Tensor, boundaries: object) -> tuple[Tensor, tuple]:
        y = x.exp()  # saves y
        z = y * y  # saves y twice more
        return z * x.detach(), (z, z)  # saves the input, which is not counted

    assert _saved_mib(case, case.torch_lstm, forward) * 2**20 == 4 * 7 * 3 * 5


# The program


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict]]:
    status = cli.main([*arguments, "--out", str(tmp_path)])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    return status, [json.loads(line) for line in lines]


def test_results_say_what_was_measured_where(tmp_path: Path) -> None:
    status, records = run(tmp_path, "--quick", "--workloads", "SIL Silero VAD", "SIL stream")
    assert status == 0
    assert [(r["name"], r["mode"]) for r in records] == [
        ("SIL Silero VAD", "inference"),
        ("SIL Silero VAD", "training"),
        ("SIL stream", "inference"),
    ]
    for record in records:
        assert record["dtype"] == "float32"
        assert record["check"]["failures"] == []
        comparison = record["comparison"]
        assert comparison["baseline_ms"]["median"] > 0 and comparison["fused_ms"]["median"] > 0
        ratio = comparison["ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        environment = record["environment"]
        assert environment["threads"] == 1 and environment["torch_version"] == torch.__version__
        assert {"cpu", "cores", "capability", "commit", "date"} <= set(environment)
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.jsonl",
        "users.png",
        "stream.png",
    }


def test_a_wrong_result_is_not_timed_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = Case.build

    def sabotaged(workload: Workload, dtype: str, device: torch.device) -> Case:
        case = build(workload, dtype, device)
        case.fused_lstm.bias_hh_l0.data[0] += 1
        return case

    monkeypatch.setattr(Case, "build", sabotaged)
    status, records = run(tmp_path, "--quick", "--workloads", "SIL Silero VAD")
    assert status == 1
    assert [record["comparison"] for record in records] == [None, None]
    assert records[0]["check"]["failures"]
    assert "WRONG RESULT" in capsys.readouterr().out


def test_training_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "compare_training", lambda epochs: train.compare_training(2, 16))
    status, (record,) = run(tmp_path, "--workloads", "training")
    assert status == 0
    assert record["largest_difference"] < 1e-3
    for name in ("torch_run", "fused_run"):
        losses = record[name]["losses"]
        assert sum(losses[-16:]) < sum(losses[:16])
    assert (tmp_path / "training.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--workloads", "nonsense"], "nonsense"),
        (["--threads", "2", "--process-time"], "--threads 1"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(workload.name in listed for workload in WORKLOADS)


def test_a_missing_package_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "NEEDED", ("rich", "no_such_package"))
    assert entry.main([]) == 2
    assert "pip install no_such_package" in capsys.readouterr().err
