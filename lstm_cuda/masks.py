"""What the random options of a cell draw, once for a layer: the same for every path and pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .reference import Cell


@dataclass(frozen=True)
class Masks:
    """The random choices of one layer in training.

    Args:
        h_scale: [D, B, P], 0 or ``1 / (1 - recurrent_dropout)``, what h is multiplied by where it
            meets w_hh; None without recurrent dropout.
        seed: [D] int64, of zoneout's choices; None without zoneout.
        first_step: the time in the whole sequence of what is time 0 in a call, for these choices.
    """

    h_scale: Tensor | None = None
    seed: Tensor | None = None
    first_step: int = 0


def draw(
    cell: Cell, weights: Sequence[Sequence[Tensor]], B: int, dtype: torch.dtype
) -> tuple[Sequence[Sequence[Tensor]], Masks]:
    """The random choices of a layer in training, from torch's generator of the weights' device.

    Args:
        cell: its options.
        weights: a row for each recurrence, w_hh [4H, P] being second.
        B: batch.
        dtype: of ``h_scale``.

    Returns:
        The rows with ``weight_dropout`` of w_hh; the masks.
    """
    w_hh = weights[0][1]
    if cell.weight_dropout > 0:
        weights = [[row[0], F.dropout(row[1], cell.weight_dropout), *row[2:]] for row in weights]
    h_scale = seed = None
    if cell.recurrent_dropout > 0:
        ones = w_hh.new_ones(len(weights), B, w_hh.shape[1], dtype=dtype)
        h_scale = F.dropout(ones, cell.recurrent_dropout)
    if any(cell.zoneout):
        seed = torch.randint(2**63 - 1, (len(weights),), device=w_hh.device)
    return weights, Masks(h_scale, seed)


def zoneout_choices(
    seed: Tensor,
    which: int,
    shape: tuple[int, int, int, int],
    probability: float,
    first_step: int = 0,
) -> Tensor:
    """Where zoneout keeps the state: csrc/random.h's choices, in torch.

    Args:
        seed: [D] int64.
        which: 0 for h, 1 for c.
        shape: T, B, D, n, n being P or H.
        probability: that an element is kept.
        first_step: the time of the first of the T steps.

    Returns:
        [T, B, D, n] bool.
    """
    T, B, D, n = shape
    t, b, j = (torch.arange(size, device=seed.device) for size in (T, B, n))
    lane = j // 64 * 16 + j % 16
    choice = torch.full_like(seed, which)[:, None]
    counter = [lane, b[:, None, None], first_step + t[:, None, None, None], choice]
    words = _philox([word.expand(T, B, D, n) for word in counter], seed[:, None])
    drawn = torch.stack(words).gather(0, (j // 16 % 4).expand(1, T, B, D, n))[0]
    return drawn < int(probability * 2**32)


_MASK = 0xFFFFFFFF


def _philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) of words of 32 bits, each in an int64."""
    key = [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(10):
        # Products wrap around in 64 bits, which leaves both halves right.
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32 & _MASK) ^ counter[1] ^ key[0],
            second & _MASK,
            (first >> 32 & _MASK) ^ counter[3] ^ key[1],
            first & _MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    return counter
