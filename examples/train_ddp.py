"""Train a character model of Python source in several processes.

The text is the standard library's own source, cut into columns that are read side by side; each
process trains on its share of them, and DistributedDataParallel averages the gradients. The state
is carried from one window to the next, so a column is one long sequence (truncated
backpropagation through time).

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py

One process for each GPU with NCCL, or on the CPU with gloo. A process alone needs no torchrun.
"""

import argparse
import importlib
import inspect
import math
import os
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lstm_cuda import FusedLSTM

TRAINING_MODULES = ("argparse", "ast", "csv", "dataclasses", "heapq", "logging", "pathlib")
TEST_MODULES = ("shlex", "textwrap", "queue")
CHARACTERS = 128
WINDOW_STEPS = 64

State = tuple[Tensor, Tensor]


def load_columns(modules: Sequence[str], columns: int) -> Tensor:
    """The source of these modules as character codes, cut into columns; [time, columns] int64."""
    text = "".join(inspect.getsource(importlib.import_module(name)) for name in modules)
    codes = torch.tensor([min(ord(c), CHARACTERS - 1) for c in text])
    steps = len(codes) // columns
    return codes[: steps * columns].view(columns, steps).t().contiguous()


def unigram_bits(text: Tensor) -> float:
    """Bits per character of a model that knows only how frequent each character is."""
    share = torch.bincount(text.flatten()) / text.numel()
    return -(share * share.clamp(min=1e-9).log2()).sum().item()


class CharacterModel(nn.Module):
    """Embedding, LSTM, and the scores of the next character."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 32)
        self.lstm = FusedLSTM(32, hidden_size)
        self.head = nn.Linear(hidden_size, CHARACTERS)

    def forward(self, characters: Tensor, state: State | None) -> tuple[Tensor, State]:
        output, state = self.lstm(self.embedding(characters), state)
        return self.head(output), state


def windows_bits(
    model: nn.Module, text: Tensor, optimizer: torch.optim.Optimizer | None = None
) -> Tensor:
    """Reads all columns window by window, and trains if there is an optimizer.

    Returns:
        Mean bits per character over the columns of all processes, a scalar.
    """
    state = None
    total = torch.zeros((), device=text.device)
    windows = (len(text) - 1) // WINDOW_STEPS
    for window in range(windows):
        start = window * WINDOW_STEPS
        scores, state = model(text[start : start + WINDOW_STEPS], state)
        state = (state[0].detach(), state[1].detach())  # no gradient crosses a window's start
        target = text[start + 1 : start + 1 + WINDOW_STEPS]
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        total += loss.detach()
    dist.all_reduce(total)
    return total / (windows * dist.get_world_size() * math.log(2))


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Trains, prints and returns bits per character of new text: the model's and unigram's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--columns", type=int, default=64, help="of all processes together")
    parser.add_argument("--modules", nargs="+", default=TRAINING_MODULES, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    alone = "RANK" not in os.environ
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    if options.columns % world != 0:
        raise SystemExit(f"--columns must be a multiple of {world}, the number of processes")

    def mine(modules: Sequence[str]) -> Tensor:
        return load_columns(modules, options.columns).chunk(world, 1)[rank].to(device)

    torch.manual_seed(options.seed)
    training, test = mine(options.modules), mine(TEST_MODULES)
    model = DistributedDataParallel(CharacterModel(options.hidden_size).to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    bits = math.inf
    start = time.perf_counter()
    for epoch in range(options.epochs):
        training_bits = windows_bits(model, training, optimizer)
        with torch.no_grad():
            bits = windows_bits(model, test).item()
        if rank == 0:
            print(f"epoch {epoch + 1}  bits per character {training_bits:.3f}, new text {bits:.3f}")
    unigram = unigram_bits(load_columns(TEST_MODULES, options.columns))
    if rank == 0:
        print(
            f"{world} processes: {bits:.3f} bits per character, unigram {unigram:.3f} "
            f"({time.perf_counter() - start:.0f} s)"
        )
    dist.barrier()  # nobody leaves while another still needs it
    dist.destroy_process_group()
    return bits, unigram


if __name__ == "__main__":
    main()
