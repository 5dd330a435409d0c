"""FusedLSTM in several processes: DDP, FSDP2, distributed checkpoints.

All cases run in one start of the processes (distributed_worker.py): that takes most of the time.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import CUDA, cuda_missing
from distributed_worker import Results, Tagger
from helpers import assert_equal, close
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lstm_cuda import FusedLSTM

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 100

# Checkpoints are also written and read by one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@dataclass(frozen=True)
class Run:
    """What the cases gave in a group of processes."""

    folder: Path
    world: int
    by_rank: list[dict[str, Results | str]]

    def of(self, case: str) -> Results:
        """The first rank's values, if no rank failed."""
        for results in self.by_rank:
            assert not isinstance(results[case], str), results[case]
        values = self.by_rank[0][case]
        assert isinstance(values, dict)
        return values


@pytest.fixture(scope="module", params=["cpu", CUDA])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All cases, in two processes; on GPUs in one for each GPU, at most two."""
    device, world = request.param, 2
    if device == "cuda":
        if missing := cuda_missing():
            pytest.skip(missing)
        world = min(2, torch.cuda.device_count())
    folder = tmp_path_factory.mktemp("distributed")
    single = {"model": Tagger(nn.LSTM, seed=9).state_dict()}
    dcp.save(single, checkpoint_id=folder / "single", no_dist=True)

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logs = [folder / f"log{rank}" for rank in range(world)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            arguments = [str(a) for a in (worker.__file__, rank, world, device, folder)]
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments], env=environment, stdout=out, stderr=out
                    )
                )
        end = time.monotonic() + TIMEOUT_S
        for process in processes:
            process.wait(max(1.0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # A process that has its results has done all that is asked of it: now and then gloo's threads
    # end one with an error after that.
    said = "\n".join(log.read_text() for log in logs)
    assert all((folder / f"rank{rank}").exists() for rank in range(world)), said
    return Run(folder, world, [torch.load(folder / f"rank{rank}") for rank in range(world)])


def joined(batches: int = 1, fill: bool = False) -> Results:
    """The gradients of one process that has all rows."""
    model = Tagger()
    if fill:
        worker.fill(model)
    for _, batch in zip(range(batches), worker.batches(), strict=False):
        worker.backward(model, batch)
    return worker.gradients(model)


def compare(values: Results, expected: Results, tolerance: float = 1e-12) -> None:
    assert list(values) == list(expected)
    for name in expected:
        assert values[name].dtype == expected[name].dtype
        close(values[name], expected[name], tolerance)


@pytest.mark.parametrize("case", ["ddp", "ddp_static_graph", "fsdp"])
def test_gradients_are_those_of_the_joined_batch(case: str, run: Run) -> None:
    compare(run.of(case), joined())


@pytest.mark.parametrize("case", ["ddp_no_sync", "fsdp_no_sync"])
def test_accumulated_gradients_are_those_of_both_batches(case: str, run: Run) -> None:
    compare(run.of(case), joined(batches=2))


def test_fsdp_of_a_model_without_memory(run: Run) -> None:
    compare(run.of("fsdp_meta"), joined(fill=True))


def test_fsdp_mixed_precision(run: Run) -> None:
    """Computed in bfloat16, averaged over the ranks and kept in float32."""
    values = run.of("fsdp_mixed_precision")
    x, lengths = next(worker.batches())
    model = Tagger().bfloat16()
    outputs, mean = [], {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    parts = zip(x.bfloat16().chunk(run.world, 1), lengths.chunk(run.world), strict=True)
    for part in parts:
        model.zero_grad()
        outputs.append(model(*part))
        outputs[-1].float().square().mean().backward()
        for name, grad in worker.gradients(model).items():
            mean[name] += grad.float() / run.world
    compare(values, {"output": outputs[0], **mean}, 1e-6)


def test_a_sharded_checkpoint_goes_into_a_torch_lstm(run: Run) -> None:
    """In one process, with the optimizer's state; it is what one process would have come to."""
    trained = run.of("save")
    for lstm in (nn.LSTM, FusedLSTM):
        model = Tagger(lstm, seed=9)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        state, optimizer_state = get_state_dict(model, optimizer)
        both = {"model": state, "optimizer": optimizer_state}
        dcp.load(both, checkpoint_id=run.folder / "sharded", no_dist=True)
        set_state_dict(
            model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"]
        )
        assert_equal(list(model.state_dict().values()), list(trained.values()))
        for p, grad in zip(model.parameters(), joined().values(), strict=True):
            close(optimizer.state[p]["exp_avg"], 0.1 * grad)


def test_a_checkpoint_of_a_torch_lstm_is_loaded_sharded(run: Run) -> None:
    values = run.of("load")
    expected = Tagger(nn.LSTM, seed=9).state_dict()
    assert list(values) == list(expected)
    assert_equal(list(values.values()), list(expected.values()))
