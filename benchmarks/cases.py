"""A workload made concrete: modules with the same weights, inputs, and calls to time."""

import itertools
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lstm_cuda import FusedLSTM

from .loops import CellLoop
from .timing import Call
from .variants import VARIANTS, Boundaries, Forward, Variant, gradient_penalty
from .workloads import DTYPES, Workload

BUFFERS = 4  # inputs in turn, so that not one input stays in the cache


@dataclass(frozen=True)
class Case:
    """A workload with its modules and data.

    Attributes:
        workload: what this is made from.
        torch_lstm, fused_lstm: hold equal weights. With options, the former is a loop.
        plain_lstm: a FusedLSTM without options; fused_lstm itself where there are none.
        inputs: each [T, B, I], requires a gradient, as inside a larger net.
        gradients: of the loss with respect to the output, for each input [T, B, D * P].
        boundaries: lengths and resets.
    """

    workload: Workload
    torch_lstm: nn.Module
    fused_lstm: FusedLSTM
    plain_lstm: FusedLSTM
    inputs: list[Tensor]
    gradients: list[Tensor]
    boundaries: Boundaries

    @classmethod
    def build(
        cls, workload: Workload, dtype: str, device: torch.device, buffers: int = BUFFERS
    ) -> "Case":
        """Random weights and data, the same for the same workload and dtype in every run.

        They are drawn on the device: hosts take seconds for the largest.
        """
        generator = torch.Generator(device).manual_seed(zlib.crc32(workload.name.encode()))
        torch_dtype = DTYPES[dtype]

        def normal(features: int) -> Tensor:
            shape = (workload.steps, workload.batch, features)
            return torch.randn(shape, generator=generator, device=device).to(torch_dtype)

        torch_lstm = nn.LSTM(**workload.module_arguments, device=device)
        bound = workload.hidden_size**-0.5
        with torch.no_grad():
            for parameter in torch_lstm.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
        torch_lstm = torch_lstm.to(torch_dtype)
        torch_lstm.flatten_parameters()  # where that helps
        plain_lstm = FusedLSTM(**workload.module_arguments, device=device, dtype=torch_dtype)
        plain_lstm.load_state_dict(torch_lstm.state_dict())
        fused_lstm: FusedLSTM = plain_lstm
        beside: nn.Module = torch_lstm
        if workload.options:
            fused_lstm = FusedLSTM(
                **workload.module_arguments, **workload.options, device=device, dtype=torch_dtype
            )
            fused_lstm.load_state_dict(torch_lstm.state_dict(), strict=False)
            for name, gain in fused_lstm.named_parameters():
                if name.startswith("weight_ln"):
                    # With 1 a random net is chaotic: roundings grow from step to step.
                    nn.init.constant_(gain, 0.3)
            beside = CellLoop(fused_lstm)
        outputs = workload.proj_size or workload.hidden_size
        outputs *= 2 if workload.bidirectional else 1
        return cls(
            workload,
            beside,
            fused_lstm,
            plain_lstm,
            inputs=[normal(workload.input_size).requires_grad_() for _ in range(buffers)],
            gradients=[normal(outputs) for _ in range(buffers)],
            boundaries=Boundaries.draw(workload, generator),
        )

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.workload.variant]

    def calls(self, mode: str) -> tuple[Call, Call]:
        """What to time in a mode, until the next is asked for: the baseline's call and ours."""
        for lstm in (self.torch_lstm, self.fused_lstm, self.plain_lstm):
            lstm.train(mode == "training")  # nn.LSTM on CUDA keeps less in evaluation
        baseline: tuple[nn.Module, Forward] = (self.torch_lstm, self.variant.torch_way)
        if self.variant.fused_baseline is not None:
            baseline = (self.plain_lstm, self.variant.fused_baseline)
        make = self._inference if mode == "inference" else self._training
        return make(*baseline), make(self.fused_lstm, self.variant.fused_way)

    def _inference(self, lstm: nn.Module, forward: Forward) -> Call:
        inputs = itertools.cycle([x.detach() for x in self.inputs])

        @torch.inference_mode()
        def call() -> None:
            forward(lstm, next(inputs), self.boundaries)

        return call

    def _training(self, lstm: nn.Module, forward: Forward) -> Call:
        batches = itertools.cycle(zip(self.inputs, self.gradients, strict=True))

        def call() -> None:
            x, dy = next(batches)
            x.grad = None
            lstm.zero_grad(set_to_none=True)
            y, _ = forward(lstm, x, self.boundaries)
            if self.workload.gradient_penalty:
                gradient_penalty(x, y).backward()
            elif self.workload.last_step_only:
                y[-1].backward(dy[-1])
            else:
                y.backward(dy)

        return call
