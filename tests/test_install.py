"""The package as a whole: what it exports, and how it lives with processes and threads."""

import multiprocessing
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Problem, assert_equal, call, error, gradients, make

import lstm_cuda
from lstm_cuda import FusedLSTM

ROOT = Path(lstm_cuda.__file__).parent.parent


def test_exports() -> None:
    assert all(hasattr(lstm_cuda, name) for name in lstm_cuda.__all__)
    assert re.match(r"\d", lstm_cuda.__version__)


def test_build_info() -> None:
    info = lstm_cuda.build_info()
    assert {"torch_version", "cuda", "cpu_capabilities", "compiler", "cpu_capability"} <= set(info)
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert isinstance(info["cuda"], bool)


WITHOUT = """
import sys
sys.modules["lstm_cuda._C"] = None  # as if it had not been built
import torch, lstm_cuda
x = torch.randn(5, 2, 3)
assert lstm_cuda.FusedLSTM(3, 4, backend="torch")(x)[0].shape == (5, 2, 4)
try:
    lstm_cuda.FusedLSTM(3, 4)(x)
except RuntimeError as error:
    print(error)
"""


def test_imports_without_the_compiled_part() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "pip install" in result.stdout and 'backend="torch" works' in result.stdout
    assert torch.__version__ in result.stdout


def _sums() -> list[float]:
    p = Problem(5, 3, 4, 33, L=2)
    d = make(p).to(torch.float32)
    outputs = call(p, d)
    return [t.sum().item() for t in (*outputs.values(), *gradients(outputs, d).values())]


def _in_a_child(queue: "multiprocessing.Queue[list[float]]") -> None:
    torch.set_num_threads(1)  # as DataLoader's workers do: OpenMP's threads do not survive a fork
    queue.put(_sums())


def _in_a_fork(queue: "multiprocessing.Queue[list[float]]") -> None:
    p = Problem(64, 16, 32, 64)
    call(p, make(p).to(torch.float32))  # the op has run before, with whatever threads it started
    queue.put(_from("fork", _in_a_child))


def _from(method: str, target: Callable[..., None]) -> list[float]:
    """What the target puts into its queue in a child process."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=target, args=(queue,))
    child.start()
    found: list[float] = queue.get(timeout=60)
    child.join(10)
    assert child.exitcode == 0
    return found


# The fork happens in a fresh process: compilers and servers that other tests have started in this
# one have threads that a fork would cut off.
@pytest.mark.parametrize("target", [_in_a_child, _in_a_fork], ids=["spawn", "fork"])
def test_child_processes(target: Callable[..., None]) -> None:
    assert _from("spawn", target) == pytest.approx(_sums(), rel=1e-4, abs=1e-4)


def test_concurrent_threads() -> None:
    p = Problem(20, 9, 17, 40, L=2, bidirectional=True, lengths=True)

    def run() -> list[torch.Tensor]:
        d = make(p).to(torch.float32)
        outputs = call(p, d)
        return [*outputs.values(), *gradients(outputs, d).values()]

    expected = run()
    results: list[list[torch.Tensor]] = []
    threads = [
        threading.Thread(target=lambda: results.extend(run() for _ in range(5))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for result in results:
        assert_equal(result, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int) -> None:
    """Not bit for bit: rows are shared out differently, and sums run in another order."""
    before = torch.get_num_threads()
    p = Problem(20, 33, 17, 40, bidirectional=True, lengths=True)
    d = make(p).to(torch.float32)
    try:
        torch.set_num_threads(1)
        expected = call(p, d)
        torch.set_num_threads(threads)
        found = call(p, d)
    finally:
        torch.set_num_threads(before)
    for name in expected:
        assert error(found[name], expected[name]) < 5e-6


def test_memory_is_poisoned() -> None:
    """The other tests count on it: what an op leaves unwritten is NaN."""
    assert torch.isnan(torch.empty(1000)).all()


def test_no_leak() -> None:
    """What a call saves goes with its graph."""
    import gc
    import weakref

    fused = FusedLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    y, _ = fused(x)
    node = weakref.ref(y)
    y.sum().backward()
    input_ref = weakref.ref(x)
    del y, x
    gc.collect()
    assert node() is None and input_ref() is None
