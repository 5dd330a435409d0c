"""What docs/options.md says of other people's loops: its examples, run on modules like those."""

import re
from pathlib import Path
from typing import Any

import torch
from helpers import close
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import lstm_cuda
from lstm_cuda import FusedLSTM

EXAMPLES = re.findall(
    r"^```python\n(.+?)^```",
    (Path(lstm_cuda.__file__).parent.parent / "docs" / "options.md").read_text(),
    re.M | re.S,
)


def run(example: str, **names: Any) -> dict[str, Any]:
    names["FusedLSTM"] = FusedLSTM
    # What follows the state dict is called in evaluation, as `old` is.
    for line in ("lstm.load_state_dict(state)\n", "layer_norm=True)\n"):
        example = example.replace(line, line + "lstm.eval()\n")
    exec(example, names)
    return names


class CellList(nn.Module):
    """Cells in a list, layer by layer and direction by direction; in evaluation, without masks."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_size, *[2 * hidden_size] * (num_layers - 1)]
        self.cells = nn.ModuleList(nn.LSTMCell(n, hidden_size) for n in widths for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, I], one sequence."""
        for forwards, backwards in zip(self.cells[::2], self.cells[1::2], strict=True):
            both = []
            for cell, order in ((forwards, 1), (backwards, -1)):
                state = None
                outputs = []
                for t in range(len(x))[::order]:
                    state = cell(x[t], state)
                    outputs.append(state[0])
                both.append(torch.stack(outputs[::order]))
            x = torch.cat(both, -1)
        return x


def test_cells_in_a_list() -> None:
    old = CellList(5, 4, 2)
    rows = [torch.randn(n, 5) for n in (6, 3)]
    names = run(
        EXAMPLES[0], old=old, packed=pack_sequence(rows), input_size=5, hidden_size=4, num_layers=2
    )
    output, _ = pad_packed_sequence(names["output"])
    for b, row in enumerate(rows):
        close(output[: len(row), b], old(row), 1e-6)
    assert names["lstm"].cell.recurrent_dropout == 0.33


def test_weights_under_another_name() -> None:
    old = nn.Module()
    old.module = nn.LSTM(5, 4)
    x = torch.randn(6, 2, 5)
    expected, _ = old.module(x)
    old.module.register_parameter("weight_hh_l0_raw", old.module.weight_hh_l0)
    del old.module.weight_hh_l0
    lstm = run(EXAMPLES[1], old=old, input_size=5, hidden_size=4)["lstm"]
    close(lstm.eval()(x)[0], expected, 1e-6)
    assert not torch.allclose(lstm.train()(x)[0], expected)


def test_states_of_all_layers_in_one_tensor() -> None:
    names = run(EXAMPLES[2], x=torch.randn(2, 6, 5), input_size=5, hidden_size=4, num_layers=3)
    assert names["output"].shape == (2, 6, 4) and names["h_n"].shape == (3, 2, 4)
