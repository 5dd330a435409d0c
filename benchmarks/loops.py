"""Cells with options as people write them today: a loop over time in torch's ops."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lstm_cuda import FusedLSTM
from lstm_cuda.reference import ACTIVATIONS

State = tuple[Tensor, Tensor]


class CellLoop(nn.Module):
    """One layer of a FusedLSTM with any of the options below, in one direction.

    Each step is what the private loops do: Stanza's cell and mask, AllenNLP's and torch's
    benchmarks' ``custom_lstms``. Where a cell is the usual one, that is ``nn.LSTMCell``'s op.

    Args:
        fused: whose parameters and options these are; copied.
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor
    weight_ci_l0: Tensor
    weight_cf_l0: Tensor
    weight_co_l0: Tensor
    weight_ln_ih_l0: Tensor
    weight_ln_hh_l0: Tensor
    weight_ln_c_l0: Tensor
    bias_ln_c_l0: Tensor

    def __init__(self, fused: FusedLSTM) -> None:
        super().__init__()
        for name, parameter in fused.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))
        self.hidden_size = fused.hidden_size
        self.cell = fused.cell
        self.peephole = bool(fused._peephole_names)
        self.layer_norm = bool(fused._layer_norm_names)
        masks = {"recurrent_dropout", "zoneout", "weight_dropout"}
        self.usual = not (self.peephole or self.layer_norm or set(self.cell.options) - masks)

    def forward(self, x: Tensor) -> tuple[Tensor, State]:
        h = c = x.new_zeros(x.shape[1], self.hidden_size)
        cell, w_hh = self.cell, self.weight_hh_l0
        mask = None
        if self.training and cell.weight_dropout:
            w_hh = F.dropout(w_hh, cell.weight_dropout)
        if self.training and cell.recurrent_dropout:
            mask = F.dropout(torch.ones_like(h), cell.recurrent_dropout)
        outputs = []
        for frame in x:
            seen = h if mask is None else h * mask
            if self.usual:
                new_h, new_c = torch._VF.lstm_cell(
                    frame, (seen, c), self.weight_ih_l0, w_hh, self.bias_ih_l0, self.bias_hh_l0
                )
            else:
                new_h, new_c = self.step(frame, seen, c, w_hh)
            h, c = (self.mixed(k, *pair) for k, pair in enumerate(((h, new_h), (c, new_c))))
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])

    def step(self, x: Tensor, h: Tensor, c: Tensor, w_hh: Tensor) -> State:
        """A cell written out."""
        cell = self.cell
        recurrent, candidate, output = (
            ACTIVATIONS[name]
            for name in (
                cell.recurrent_activation,
                cell.activation,
                cell.output_activation or cell.activation,
            )
        )
        if self.layer_norm:
            of_x = F.layer_norm(
                F.linear(x, self.weight_ih_l0), w_hh.shape[:1], self.weight_ln_ih_l0
            )
            of_h = F.layer_norm(F.linear(h, w_hh), w_hh.shape[:1], self.weight_ln_hh_l0)
            z = of_x + of_h + self.bias_ih_l0 + self.bias_hh_l0
        else:
            z = F.linear(x, self.weight_ih_l0, self.bias_ih_l0) + F.linear(h, w_hh, self.bias_hh_l0)
        i, f, g, o = z.chunk(4, 1)
        if self.peephole:
            i, f = i + c * self.weight_ci_l0, f + c * self.weight_cf_l0
        i = recurrent(i)
        f = 1 - i if cell.coupled else recurrent(f)
        c = f * c + i * candidate(g)
        if cell.cell_clip:
            c = c.clamp(-cell.cell_clip, cell.cell_clip)
        if self.peephole:
            o = o + c * self.weight_co_l0
        shown = c
        if self.layer_norm:
            shown = F.layer_norm(c, c.shape[1:], self.weight_ln_c_l0, self.bias_ln_c_l0)
        return recurrent(o) * output(shown), c

    def mixed(self, which: int, old: Tensor, new: Tensor) -> Tensor:
        """Zoneout of h (0) or c (1)."""
        probability = self.cell.zoneout[which]
        if not probability:
            return new
        if not self.training:
            return probability * old + (1 - probability) * new
        return torch.where(torch.rand_like(new) < probability, old, new)
