"""Small problems through every kernel family: what the sanitizers watch.

    python -m benchmarks.gpu.shapes [--families auto rec_cta rec_group] [--device cpu]

Every precision, direction and option, at sizes of one, of odd numbers and of a few tiles, at most
five steps; forward, and forward with backward. Results are compared with float64 on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lstm_cuda import FusedLSTM

from ..check import BOUNDS, relative_error
from ..workloads import DTYPES
from .device import allowed
from .grid import PRECISIONS, Precision
from .measure import forced
from .records import FAMILIES, REFUSAL

# T, B, I, H. The last is of several blocks in every family with resident weights.
SIZES = ((5, 3, 4, 33), (4, 17, 8, 64), (1, 2, 5, 1), (2, 1, 3, 7), (3, 9, 5, 100), (4, 20, 5, 200))
DIRECTIONS = ("forwards", "backwards", "both")
OPTIONS = ("plain", "no state", "boundaries", "projected")
ALL_PRECISIONS = (*PRECISIONS.values(), Precision("fp64", "float64", False, None, 1e12))


@dataclass(frozen=True)
class Problem:
    """One problem, in the words above."""

    precision: Precision
    sizes: tuple[int, int, int, int]
    direction: str
    option: str

    def __str__(self) -> str:
        T, B, features, H = self.sizes
        shape = f"T{T} B{B} {features}→{H}"
        return f"{self.precision.name} {shape} {self.direction}, {self.option}"


def problems() -> Iterator[Problem]:
    """Every precision with every direction and option; each precision gets all sizes in turn."""
    for row, (option, direction) in enumerate(itertools.product(OPTIONS, DIRECTIONS)):
        for column, precision in enumerate(ALL_PRECISIONS):
            yield Problem(precision, SIZES[(row + column) % len(SIZES)], direction, option)


def run_problem(problem: Problem, device: torch.device) -> dict[str, float]:
    """Relative errors of outputs and gradients on a device, by name."""
    T, B, features, H = problem.sizes
    dtype = DTYPES[problem.precision.dtype]
    generator = torch.Generator().manual_seed(T * 1000 + B * 10 + H)
    arguments: dict[str, Any] = {
        "proj_size": (H + 1) // 2 if problem.option == "projected" and H > 1 else 0,
        "bidirectional": problem.direction == "both",
        "reverse": problem.direction == "backwards",
    }
    truth = FusedLSTM(features, H, **arguments, dtype=torch.float64, backend="torch")
    with torch.no_grad():
        for parameter in truth.parameters():
            values = torch.randn(parameter.shape, generator=generator) * H**-0.5
            parameter.copy_(values.to(dtype))
    tested = FusedLSTM(features, H, **arguments, device=device, dtype=dtype)
    tested.load_state_dict(truth.state_dict())

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    D = 2 if problem.direction == "both" else 1
    P = arguments["proj_size"] or H
    x, dy = draw(T, B, features), draw(T, B, D * P)
    hx = None if problem.option == "no state" else (draw(D, B, P), draw(D, B, H))
    lengths = reset = None
    if problem.option == "boundaries":
        lengths = torch.randint(0, T + 1, (B,), generator=generator)
        reset = torch.rand(T, B, generator=generator) < 0.3
    data = _Data(x, dy, hx, lengths, reset)
    expected = data.to(torch.device("cpu"), torch.float64).results(truth)
    found = data.to(device, dtype).results(tested)
    return {name: relative_error(found[name].cpu(), expected[name]) for name in expected}


@dataclass(frozen=True)
class _Data:
    x: Tensor
    dy: Tensor
    hx: tuple[Tensor, Tensor] | None
    lengths: Tensor | None
    reset: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> _Data:
        return dataclasses.replace(
            self,
            x=self.x.to(device, dtype),
            dy=self.dy.to(device, dtype),
            hx=None
            if self.hx is None
            else (self.hx[0].to(device, dtype), self.hx[1].to(device, dtype)),
            lengths=None if self.lengths is None else self.lengths.to(device),
            reset=None if self.reset is None else self.reset.to(device),
        )

    def results(self, lstm: FusedLSTM) -> dict[str, Tensor]:
        options = {"lengths": self.lengths, "reset": self.reset}
        with torch.no_grad():
            inferred, _ = lstm(self.x, self.hx, **options)
        x = self.x.clone().requires_grad_()
        y, (h_n, c_n) = lstm(x, self.hx, **options)
        torch.autograd.backward([y, h_n, c_n], [self.dy, h_n.detach(), c_n.detach()])
        assert x.grad is not None
        found = {"inferred y": inferred, "y": y, "h_n": h_n, "c_n": c_n, "dx": x.grad}
        for name, parameter in lstm.named_parameters():
            assert parameter.grad is not None, f"no gradient reached {name}"
            found[f"d{name}"] = parameter.grad
        return {name: tensor.detach() for name, tensor in found.items()}


def bound(precision: Precision) -> float:
    """The largest relative error that is right: small problems, but sums of gradients, too."""
    return (precision.bounds or BOUNDS[DTYPES[precision.dtype]])[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description="Runs small problems through the kernels.")
    parser.add_argument("--families", nargs="+", default=["auto", *FAMILIES])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    counts = {"right": 0, "refused": 0, "wrong": 0}
    for family in options.families:
        for problem in problems():
            with forced(family), allowed(problem.precision):
                try:
                    errors = run_problem(problem, device)
                except RuntimeError as error:
                    if REFUSAL not in str(error):
                        raise
                    counts["refused"] += 1
                    continue
            wrong = {n: e for n, e in errors.items() if not e <= bound(problem.precision)}
            counts["wrong" if wrong else "right"] += 1
            for name, size in wrong.items():
                print(f"WRONG: {family}, {problem}: {name} has a relative error of {size:.1e}")
    print(", ".join(f"{count} {name}" for name, count in counts.items()), flush=True)
    return 1 if counts["wrong"] or not counts["right"] else 0


if __name__ == "__main__":
    sys.exit(main())
