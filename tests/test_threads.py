"""Calls from several threads, threads within a call, and forked processes."""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from conftest import CUDA
from helpers import Data, Problem, assert_equal, call, gradients, make
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# Enough work for two threads; the first shares out rows, the second the weights of each step.
PROBLEMS = [Problem(24, 8, 32, 64, L=2, bidirectional=True, lengths=True), Problem(6, 1, 32, 448)]


@pytest.mark.parametrize("threads", [1, 2], ids="{}-inside".format)
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
def test_calls_from_several_threads_are_those_from_one(
    p: Problem, threads: int, device: str
) -> None:
    """Forward and backward, to the bit, with weights that all of them share."""
    torch.set_num_threads(threads)
    data = [make(p, device, seed).to(torch.float32) for seed in range(4)]
    for d in data[1:]:
        d.weights = data[0].weights
    barrier = Barrier(len(data))

    def run(d: Data, together: bool) -> list[Tensor]:
        if together:
            barrier.wait(100)
        outputs = call(p, d)
        return [*outputs.values(), *gradients(outputs, d).values()]

    expected = [run(d, together=False) for d in data]
    with ThreadPoolExecutor(len(data)) as pool:
        for _ in range(3):
            found = list(pool.map(lambda d: run(d, together=True), data))
            assert_equal(found, expected)


CHILDREN = """
import os, pickle, torch
from lstm_cuda import FusedLSTM

def threads():
    return len(os.listdir("/proc/self/task"))

torch.manual_seed(0)
lstm, x = FusedLSTM(32, 64), torch.randn(24, 8, 32)

def run():
    lstm.zero_grad()
    y = lstm(x)[0]
    y.sum().backward()
    return y.tolist(), [p.grad.tolist() for p in lstm.parameters()]

def in_child(threads):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(run(), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        result = pickle.load(pipe)
    os.waitpid(child, 0)
    return result

found = [in_child(1), in_child(2)]
counts = []
for n in (1, 2):
    before = threads()
    torch.set_num_threads(n)
    with torch.no_grad():
        lstm(x)
    counts.append(threads() - before)
torch.set_num_threads(1)
one = run()
torch.set_num_threads(2)
two = run()
found.append(in_child(1))
print(counts, found == [one, two, one])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_forked_processes_and_the_number_of_threads() -> None:
    """A child runs before and after its parent has; torch's number of threads is what there are.

    A child whose parent has used several threads must use one, as for all of torch: OpenMP's
    threads are not in the child, and it would wait for them.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run(
        [sys.executable, "-c", CHILDREN], env=environment, capture_output=True, text=True,
        timeout=150,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "[0, 1] True"


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="Python has a GIL")
def test_a_free_threaded_python_stays_free() -> None:
    assert not sys._is_gil_enabled()  # importing a module that needs it would bring it back
