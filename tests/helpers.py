"""Problems of random, non-zero data, the float64 truth for them, and the bounds on errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lstm_cuda import FusedLSTM, fused_lstm
from lstm_cuda.reference import lstm_layer

# Of a result's error norm(out - ref64) / norm(ref64): (bound, floor). The error is at most the
# bound, and at most twice eager torch's in the same dtype on the same inputs plus the floor.
# Origin: float64 is reassociation only; float32 is ten times eager's worst seen (5e-7, T to 256, H
# to 512), for another order of sums and tanh of a few ulp; 16-bit is a few times the half ulp with
# which each h is stored.
BOUNDS = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (5e-6, 1e-6),
    torch.float16: (4e-3, 1e-3),
    torch.bfloat16: (3e-2, 8e-3),
}
DTYPES = [*BOUNDS]
NAMES = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """Sizes and options of a stack; ``make`` draws the data."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    L: int = 1
    bidirectional: bool = False
    reverse: bool = False
    P: int = 0
    bias: bool = True
    hx: bool = True
    lengths: bool = False
    reset: bool = False

    def __str__(self) -> str:
        flags = ["bidirectional", "reverse", "lengths", "reset"]
        marks = [name for name in flags if getattr(self, name)]
        marks += [f"P{self.P}"] if self.P else []
        marks += ["nobias"] if not self.bias else []
        marks += ["nohx"] if not self.hx else []
        return "-".join([f"T{self.T}-B{self.B}-I{self.I}-H{self.H}-L{self.L}", *marks])

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def out(self) -> int:
        return self.P or self.H

    def options(self) -> dict[str, bool]:
        return {"bidirectional": self.bidirectional, "reverse": self.reverse}


@dataclass
class Data:
    """The arguments of a call, and the gradients to feed it."""

    x: Tensor
    hx: tuple[Tensor, Tensor] | None
    weights: list[list[Tensor]]
    lengths: Tensor | None
    reset: Tensor | None
    cotangents: dict[str, Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Data:
        """The same values, as far as the dtype holds them, as fresh leaves."""

        def cast(t: Tensor) -> Tensor:
            return t.detach().to(dtype, copy=True).requires_grad_()

        return Data(
            cast(self.x),
            None if self.hx is None else (cast(self.hx[0]), cast(self.hx[1])),
            [[cast(w) for w in row] for row in self.weights],
            self.lengths,
            self.reset,
            {name: t.to(dtype) for name, t in self.cotangents.items()},
        )

    def leaves(self) -> dict[str, Tensor]:
        leaves = {"x": self.x}
        if self.hx is not None:
            leaves |= {"h0": self.hx[0], "c0": self.hx[1]}
        for k, row in enumerate(self.weights):
            leaves |= {f"weights[{k}][{j}]": w for j, w in enumerate(row)}
        return leaves


def make(p: Problem, device: str = "cpu", seed: int = 0) -> Data:
    """Normal data in float64, weights at nn.LSTM's initial scale, lengths from 0 to T."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(device)

    LD, G, scale = p.L * p.D, 4 * p.H, p.H**-0.5
    weights = []
    for k in range(LD):
        row = [draw(G, p.I if k < p.D else p.D * p.out, scale=scale), draw(G, p.out, scale=scale)]
        row += [draw(G, scale=scale), draw(G, scale=scale)] if p.bias else []
        row += [draw(p.P, p.H, scale=scale)] if p.P else []
        weights.append(row)
    lengths = None
    if p.lengths:
        lengths = torch.randint(0, p.T + 1, (p.B,), generator=g)
        lengths[0] = p.T
        if p.B > 1:
            lengths[-1] = 0
        lengths = lengths.to(device)
    reset = (torch.rand(p.T, p.B, generator=g) < 0.2).to(device) if p.reset else None
    state = (LD, p.B, p.out), (LD, p.B, p.H)
    return Data(
        draw(p.T, p.B, p.I),
        (draw(*state[0]), draw(*state[1])) if p.hx else None,
        weights,
        lengths,
        reset,
        {
            "y": draw(p.T, p.B, p.D * p.out),
            "h_n": draw(*state[0]),
            "c_n": draw(*state[1]),
            "cells": draw(p.T, p.B, p.D * p.H),
        },
    )


def arguments(d: Data) -> tuple[Any, ...]:
    """x and the four lists of weights of one layer, as layer_forward takes them."""
    rows = d.weights
    has_bias, has_projection = len(rows[0]) >= 4, len(rows[0]) in (3, 5)
    bias = [row[2] for row in rows] + [row[3] for row in rows] if has_bias else []
    w_hr = [row[-1] for row in rows] if has_projection else []
    return d.x, [row[0] for row in rows], [row[1] for row in rows], bias, w_hr


def call(p: Problem, d: Data, backend: str = "auto") -> Results:
    """The outputs of fused_lstm for a problem."""
    y, (h_n, c_n), cells = fused_lstm(
        d.x, d.hx, d.weights, lengths=d.lengths, reset=d.reset, return_cells=True, backend=backend,
        **p.options(),
    )  # fmt: skip
    return {"y": y, "h_n": h_n, "c_n": c_n, "cells": cells}


def truth(p: Problem, d: Data) -> Results:
    """Outputs by ``reference.lstm_layer``, layer by layer, without ``fused_lstm``."""
    x, h_n, c_n = d.x, [], []
    for layer in range(p.L):
        rows = slice(layer * p.D, (layer + 1) * p.D)
        h0, c0 = (None, None) if d.hx is None else (d.hx[0][rows], d.hx[1][rows])
        bits = 2 if p.bidirectional else int(p.reverse)
        x, h, c, cells = lstm_layer(x, d.weights[rows], h0, c0, d.lengths, d.reset, bits)
        h_n.append(h)
        c_n.append(c)
    return {"y": x, "h_n": torch.cat(h_n), "c_n": torch.cat(c_n), "cells": cells.flatten(2)}


def torch_lstm(p: Problem, d: Data) -> Results:
    """Outputs by torch.nn.LSTM, which has neither cells, lengths, resets nor reverse."""
    assert not (p.lengths or p.reset or p.reverse)
    lstm = nn.LSTM(
        p.I, p.H, p.L, p.bias, bidirectional=p.bidirectional, proj_size=p.P, device=d.x.device,
        dtype=d.x.dtype,
    )  # fmt: skip
    flat = [w for row in d.weights for w in row]
    named = dict(zip(lstm._flat_weights_names, flat, strict=True))
    y, (h_n, c_n) = torch.func.functional_call(lstm, named, (d.x, d.hx))
    return {"y": y, "h_n": h_n, "c_n": c_n}


def gradients(outputs: Results, d: Data, of: str = "y h_n c_n cells") -> Results:
    """The gradient of each leaf, for the data's cotangents of the named outputs."""
    names = [name for name in of.split() if name in outputs]
    leaves = d.leaves()
    found = torch.autograd.grad(
        [outputs[name] for name in names],
        list(leaves.values()),
        [d.cotangents[name] for name in names],
        allow_unused=True,
        materialize_grads=True,
    )
    return {f"d{name}": grad for name, grad in zip(leaves, found, strict=True)}


def run(f: Callable[[Problem, Data], Results], p: Problem, d: Data, of: str) -> Results:
    """Outputs and gradients of one of ``call``, ``truth``, ``torch_lstm``."""
    outputs = f(p, d)
    return {name: outputs[name] for name in of.split()} | gradients(outputs, d, of)


def error(out: Tensor, ref: Tensor) -> float:
    """norm(out - ref) / norm(ref); infinite if out is not finite or has another shape."""
    if out.shape != ref.shape or not bool(torch.isfinite(out).all()):
        return float("inf")
    out, ref = out.detach().double(), ref.detach().double()
    difference, norm = (out - ref).norm().item(), ref.norm().item()
    return difference / norm if norm > 0 else difference


def assert_accurate(p: Problem, d64: Data, dtype: torch.dtype, of: str = "y h_n c_n cells") -> None:
    """Both bounds, on each output and each gradient of fused_lstm."""
    d64 = d64.to(dtype).to(torch.float64)  # the truth for the values that the dtype holds
    ref = run(truth, p, d64, of)
    plain = not (p.lengths or p.reset or p.reverse or "cells" in of)
    eager = run(torch_lstm if plain else truth, p, d64.to(dtype), of)
    out = run(call, p, d64.to(dtype), of)
    compare(out, eager, ref, dtype)


def compare(out: Results, eager: Results, ref: Results, dtype: torch.dtype) -> None:
    bound, floor = BOUNDS[dtype]
    assert out.keys() == ref.keys()
    for name in ref:
        assert out[name].dtype == dtype, name
        e = error(out[name], ref[name])
        allowed = min(bound, 2 * error(eager[name], ref[name]) + floor)
        assert e <= allowed, f"{name}: error {e:.2e}, allowed {allowed:.2e}"


def assert_equal(a: Any, b: Any) -> None:
    """Bitwise equality, NaN equal to NaN, through tuples."""
    if isinstance(a, Tensor):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert_equal(left, right)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    """Equality of two computations in float64 up to the order of sums."""
    e = error(a, b)
    assert e <= tolerance, f"error {e:.2e}"


def pair(*args: Any, device: str = "cpu", **kwargs: Any) -> tuple[nn.LSTM, FusedLSTM]:
    """An nn.LSTM and a FusedLSTM with copies of its parameters."""
    lstm = nn.LSTM(*args, device=device, **kwargs)
    return lstm, FusedLSTM.from_torch(lstm, copy=True)
