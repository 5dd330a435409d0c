"""What all tests share: poisoned memory, the devices, and the seed."""

from collections.abc import Iterator

import pytest
import torch

from lstm_cuda import ops


def cuda_missing() -> str | None:
    """Why nothing can run on CUDA here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if ops.load_error is None and not ops.build_info()["cuda"]:
        return "lstm_cuda was built without CUDA kernels"
    return None


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    missing = cuda_missing() if request.param == "cuda" else None
    if missing is not None:
        pytest.skip(missing)
    return str(request.param)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Fill uninitialised memory with NaN: an output that is not written must not look right."""
    torch.manual_seed(20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: waking threads would take most of the time
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
