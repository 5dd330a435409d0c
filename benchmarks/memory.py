"""Memory that a forward pass keeps alive for its backward pass."""

import torch
from torch import Tensor, nn

from .cases import Case
from .results import Memory
from .variants import Forward


def memory_of(case: Case) -> Memory:
    """What nn.LSTM and FusedLSTM keep for this workload."""
    variant = case.variant
    return Memory(
        case.workload,
        str(case.inputs[0].dtype).removeprefix("torch."),
        _saved_mib(case, case.torch_lstm, variant.torch_way),
        _saved_mib(case, case.fused_lstm, variant.fused_way),
    )


def _saved_mib(case: Case, lstm: nn.Module, forward: Forward) -> float:
    """Size of all distinct storages saved for backward, but for input and parameters."""
    x = case.inputs[0]
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *lstm.parameters())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward(lstm, x, case.boundaries)
    # The graph must live until here: a storage freed early could give its address to another.
    del result
    return sum(saved.values()) / 2**20
