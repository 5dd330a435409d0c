"""``FusedLSTMCell``: ``torch.nn.LSTMCell`` on ``fused_lstm``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_backend, check_pair
from .functional import fused_lstm, native_dtype

_State = tuple[Tensor, Tensor]


class FusedLSTMCell(nn.RNNCellBase):
    """``torch.nn.LSTMCell`` on the fused op: one step, ``(h', c') = cell(input, (h, c))``.

    Args:
        input_size, hidden_size, bias, device, dtype: as for ``torch.nn.LSTMCell``.
        backend: as for ``FusedLSTM``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        check_backend(backend)
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self.backend = backend

    def forward(self, input: Tensor, hx: _State | None = None) -> _State:
        """One step.

        Args:
            input: [B, I], or [I] unbatched.
            hx: (h [B, H], c [B, H]), without B for unbatched input, or None for zeros.

        Returns:
            (h' [B, H], c' [B, H]), without B for unbatched input.

        Raises:
            TypeError, ValueError, RuntimeError: an argument is wrong; the message says which, what
                was wanted, what came.
        """
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor; got {type(input).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(
                f"FusedLSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead"
            )
        batched = input.dim() == 2
        if hx is not None:
            h, c = check_pair(hx)
            if h.dim() != input.dim() or c.dim() != input.dim():
                raise ValueError(
                    f"FusedLSTMCell: Expected hx to be {input.dim()}D as the input, got "
                    f"{h.dim()}D and {c.dim()}D instead"
                )
            hx = (h.unsqueeze(0), c.unsqueeze(0))
            if not batched:
                hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        row = [self.weight_ih, self.weight_hh]
        if self.bias:
            row += [self.bias_ih, self.bias_hh]
        x = input.unsqueeze(0) if batched else input.unsqueeze(0).unsqueeze(0)
        dtype = native_dtype(x, hx)
        wide = dtype is torch.float32
        _, (h, c), *_ = fused_lstm(x, hx, [row], backend=self.backend, wide_c=wide)
        if dtype is not None:
            h, c = h.to(dtype), c.to(dtype)
        h, c = h.squeeze(0), c.squeeze(0)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))
