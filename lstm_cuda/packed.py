"""Weights that kernels want in another form, kept between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops


class PackedWeights:
    """One layer's w_hh and w_hr as the CUDA kernels load them; for inference, where weights stay.

    Made when a call first wants it, and anew when the weights are other tensors or were changed in
    place.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[list[tuple[Tensor, int]], Tensor]] = {}

    def find(
        self, x: Tensor, w_hh: Sequence[Tensor], w_hr: Sequence[Tensor], allow_tf32: bool
    ) -> tuple[Tensor | None, int]:
        """The packed weights for a call of the op with this input, and their layout."""
        if torch.compiler.is_compiling():
            return None, 0
        cuda = x.device.type == "cuda"
        if cuda and torch.cuda.is_current_stream_capturing():
            return None, 0  # a graph outlives what is kept here, and sees changes of the weights
        G, P = w_hh[0].shape
        layout = ops.packed_layout(x, len(w_hh), G // 4, P, allow_tf32)
        if layout == 0:
            return None, 0
        now = [(w, 0 if w.is_inference() else w._version) for w in (*w_hh, *w_hr)]
        if layout in self._made:
            then, packed = self._made[layout]
            same = len(then) == len(now) and all(
                a is b and m == n for (a, m), (b, n) in zip(then, now, strict=True)
            )
            if same:
                return packed, layout
        packed = ops.pack_weights(w_hh, w_hr, layout)
        if cuda:
            torch.cuda.current_stream(x.device).synchronize()  # other streams may use it next
        self._made[layout] = (now, packed)
        return packed, layout

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        return PackedWeights()

    def __reduce__(self) -> tuple[type[PackedWeights], tuple[()]]:
        return PackedWeights, ()
