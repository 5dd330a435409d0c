"""The ways to call an LSTM that are compared: what users of nn.LSTM write, and what we offer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .workloads import Workload

Result = tuple[Tensor, tuple[Tensor, Tensor]]
Forward = Callable[[nn.Module, Tensor, "Boundaries"], Result]


@dataclass(frozen=True)
class Boundaries:
    """Where rows stop and episodes begin.

    Attributes:
        lengths: uniform in [T/2, T], [B] int64, on the CPU, where packing wants them.
        device_lengths: the same where the data is.
        reset: True at 2 % of the steps, [T, B] bool.
    """

    lengths: Tensor
    device_lengths: Tensor
    reset: Tensor

    @classmethod
    def draw(cls, workload: Workload, generator: torch.Generator) -> "Boundaries":
        """Random ones, on the generator's device."""
        steps, batch, device = workload.steps, workload.batch, generator.device
        shortest = (steps + 1) // 2
        lengths = torch.randint(shortest, steps + 1, (batch,), generator=generator, device=device)
        reset = torch.rand(steps, batch, generator=generator, device=device) < 0.02
        return cls(lengths.cpu(), lengths, reset)


def dense(lstm: nn.Module, x: Tensor, boundaries: Boundaries) -> Result:
    """The plain call."""
    return lstm(x)


def without_libraries(lstm: nn.Module, x: Tensor, boundaries: Boundaries) -> Result:
    """nn.LSTM in torch's own ops: cuDNN's cannot be differentiated twice, and on a CPU these are
    faster at that than what torch does for oneDNN's."""
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
        return lstm(x)


def gradient_penalty(x: Tensor, y: Tensor) -> Tensor:
    """That of WGAN-GP (Gulrajani et al. 2017), with the mean of y as the score of each row."""
    (dx,) = torch.autograd.grad(y.mean((0, 2)).sum(), x, create_graph=True)
    return (dx.norm(dim=(0, 2)) - 1).pow(2).mean()


def packed(lstm: nn.Module, x: Tensor, boundaries: Boundaries) -> Result:
    """nn.LSTM over rows of several lengths: pack, run, pad."""
    sequence = pack_padded_sequence(x, boundaries.lengths, enforce_sorted=False)
    output, state = lstm(sequence)
    return pad_packed_sequence(output, total_length=len(x))[0], state


def with_lengths(lstm: nn.Module, x: Tensor, boundaries: Boundaries) -> Result:
    """FusedLSTM over rows of several lengths."""
    return lstm(x, lengths=boundaries.device_lengths)


def step_loop(lstm: nn.Module, x: Tensor, boundaries: Boundaries) -> Result:
    """nn.LSTM over episodes as CleanRL runs it: one call per step, the state masked between."""
    assert isinstance(lstm, nn.RNNBase)
    zeros = x.new_zeros(lstm.num_layers, x.shape[1], lstm.hidden_size)
    state = (zeros, zeros)
    outputs = []
    for frame, done in zip(x, boundaries.reset.to(x.dtype), strict=True):
        keep = (1.0 - done).view(1, -1, 1)
        output, state = lstm(frame.unsqueeze(0), (keep * state[0], keep * state[1]))
        outputs.append(output)
    return torch.cat(outputs), state


def with_reset(lstm: nn.Module, x: Tensor, boundaries: Boundaries) -> Result:
    """FusedLSTM over episodes."""
    return lstm(x, reset=boundaries.reset)


def streamed(lstm: nn.Module, x: Tensor, boundaries: Boundaries) -> Result:
    """One call per step with carried state, the same for both modules."""
    outputs, state = [], None
    for frame in x:
        output, state = lstm(frame.unsqueeze(0), state)
        outputs.append(output)
    assert state is not None
    return torch.cat(outputs), state


@dataclass(frozen=True)
class Variant:
    """Who is compared with whom.

    Attributes:
        torch_way: what users of nn.LSTM write; also gives the float64 truth.
        fused_way: the same result from FusedLSTM.
        baseline: what the baseline is called.
        fused_baseline: if given, the time is compared with this call of a FusedLSTM without options
            instead of `torch_way`: it tells what an option costs.
    """

    torch_way: Forward
    fused_way: Forward
    baseline: str
    fused_baseline: Forward | None = None


VARIANTS = {
    "dense": Variant(dense, dense, "nn.LSTM"),
    "penalty": Variant(without_libraries, dense, "nn.LSTM in torch's ops"),
    "lengths": Variant(packed, with_lengths, "pack, nn.LSTM, pad"),
    "reset": Variant(step_loop, with_reset, "nn.LSTM in a loop"),
    "stream": Variant(streamed, streamed, "nn.LSTM"),
    "lengths cost": Variant(packed, with_lengths, "without lengths", dense),
    "reset cost": Variant(step_loop, with_reset, "without reset", dense),
    "option": Variant(dense, dense, "a loop in torch's ops"),
    "option cost": Variant(dense, dense, "without the option", dense),
}
