"""The examples run, and what they claim is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import cartpole_ppo, forecast, tagger

ROOT = Path(forecast.__file__).parent.parent


def run(*arguments: str, **environment: str) -> str:
    """What Python prints, run in the project's folder."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}  # for a build in place
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["forecast", "cartpole_ppo", "tagger", "train_ddp"])
def test_runs_as_a_script_and_explains_itself(name: str) -> None:
    assert "--seed" in run(f"examples/{name}.py", "--help")


def test_forecast_windows_continue_each_other() -> None:
    pytest.importorskip("vega_datasets")
    training, test = forecast.load_weather()
    # Today's temperature plus the change is tomorrow's, which the next window knows as its today.
    tomorrow = training.past[:-1, -1, 1] + training.change[:-1, 0]
    torch.testing.assert_close(tomorrow, training.past[1:, -1, 1])
    windows = forecast.HISTORY_DAYS + forecast.HORIZON_DAYS - 1
    assert len(training.past) == forecast.TRAINING_DAYS - windows
    assert len(test.past) == 4 * 365 + 1 - forecast.TRAINING_DAYS - forecast.HORIZON_DAYS + 1


def test_forecast_beats_persistence() -> None:
    pytest.importorskip("vega_datasets")
    error, persistence = forecast.main(["--epochs", "6", "--hidden-size", "32"])
    assert error < 0.95 * persistence


def test_tagger_knows_the_kinds_of_a_line() -> None:
    lines = tagger.tag_lines(['if x:  # no\n    y = """a\nb""" + 25\n'])
    letters = [
        "".join(" " if kind == 0 else tagger.KINDS[kind][0] for kind in row[:length].tolist())
        for row, length in zip(lines.kinds, lines.lengths.tolist(), strict=True)
    ]
    assert letters == ["kk no  cccc", "    n o ssss", "ssss o nn"]


def test_tagger_beats_the_majority() -> None:
    settings = ["--epochs", "2", "--hidden-size", "32", "--batch-size", "16"]
    accuracy, majority = tagger.main([*settings, "--modules", "heapq", "dataclasses"])
    assert accuracy > majority + 0.3


def test_cartpole_training_sees_what_acting_saw() -> None:
    """One call with `reset` over the rollout gives the probabilities of the single steps."""
    pytest.importorskip("gymnasium")
    torch.manual_seed(0)
    policy = cartpole_ppo.Policy(hidden_size=16)
    torch.nn.init.normal_(policy.actor.weight)
    actor = cartpole_ppo.Actor(policy, seed=0)
    actor.rollout()
    rollout = actor.rollout()
    assert rollout.reset[1:].any(), "no episode ended inside the rollout: nothing is tested"
    distribution, _, _ = policy(rollout.observations, rollout.state, rollout.reset)
    log_probs = distribution.log_prob(rollout.actions)
    torch.testing.assert_close(log_probs, rollout.log_probs, atol=1e-5, rtol=1e-4)
    distribution, _, _ = policy(
        rollout.observations, rollout.state, torch.zeros_like(rollout.reset)
    )
    assert not torch.allclose(distribution.log_prob(rollout.actions), log_probs, atol=1e-3)


def test_cartpole_advantages_stop_at_the_end_of_an_episode() -> None:
    rewards, values = torch.rand(5, 3), torch.rand(6, 3)
    ended = torch.zeros(5, 3, dtype=torch.bool)
    ended[2] = True
    advantages = cartpole_ppo.advantages_of(rewards, values, ended)
    torch.testing.assert_close(advantages[2], rewards[2] - values[2])
    expected = cartpole_ppo.advantages_of(rewards[:3], values[:4], ended[:3])
    torch.testing.assert_close(advantages[:3], expected)


def test_ddp_in_two_processes_learns_what_one_does() -> None:
    script = ["examples/train_ddp.py", "--epochs", "1", "--hidden-size", "64", "--columns", "32"]
    script += ["--modules", "heapq", "dataclasses"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for count, command in ((2, [*torchrun, *script]), (1, script)):
        printed = run(*command, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        line = re.search(rf"{count} processes: (\S+) bits per character, unigram (\S+)", printed)
        assert line is not None, printed
        found.append((float(line[1]), float(line[2])))
    (two, unigram), (one, _) = found
    assert abs(two - one) < 0.01
    assert two < unigram - 0.2


@pytest.mark.slow
def test_cartpole_learns() -> None:
    pytest.importorskip("gymnasium")
    assert cartpole_ppo.main(["--steps", "60000"]) > 60
