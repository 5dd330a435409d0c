"""Tag every character of Python source with the kind of token it belongs to.

The text is the standard library's own source, the truth comes from its `tokenize` module. Each
line is a sequence of its own, so lengths vary from 1 to 100 characters: `lengths` says where each
line stops, and the backward direction starts there. Inside a docstring a line looks like prose
with a few keywords, so the task is not solved by spelling alone.

    python examples/tagger.py
"""

import argparse
import importlib
import inspect
import io
import keyword
import time
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lstm_cuda import FusedLSTM

KINDS = ("space", "name", "keyword", "operator", "number", "string", "comment")
LONGEST_LINE = 100
TRAINING_MODULES = ("argparse", "ast", "csv", "dataclasses", "heapq", "logging", "pathlib")
TEST_MODULES = ("shlex", "textwrap", "queue")
IGNORED = -100  # the label that cross_entropy skips: padding


@dataclass(frozen=True)
class Lines:
    """Lines of source, padded at the end.

    Attributes:
        characters: character codes, 0 to 127; [lines, longest line] int64.
        kinds: index into KINDS, IGNORED past the end of the line; [lines, longest line] int64.
        lengths: characters in each line; [lines] int64.
    """

    characters: Tensor
    kinds: Tensor
    lengths: Tensor

    def majority_accuracy(self) -> float:
        """Accuracy of always answering the most frequent kind."""
        counts = torch.bincount(self.kinds[self.kinds != IGNORED])
        return (counts.max() / counts.sum()).item()


def kind_of(token: tokenize.TokenInfo) -> int | None:
    """The kind of a token as an index into KINDS; None for tokens without text of their own."""
    name = tokenize.tok_name[token.type]
    if name == "NAME":
        return KINDS.index("keyword" if keyword.iskeyword(token.string) else "name")
    if name in ("NUMBER", "COMMENT"):
        return KINDS.index(name.lower())
    if name == "OP":
        return KINDS.index("operator")
    return KINDS.index("string") if "STRING" in name else None


def load_lines(modules: Sequence[str]) -> Lines:
    """Every line of the source of these modules, with its tags."""
    return tag_lines([inspect.getsource(importlib.import_module(name)) for name in modules])


def tag_lines(sources: Sequence[str]) -> Lines:
    """Every line of 1 to LONGEST_LINE characters in these sources, with its tags."""
    characters, kinds = [], []
    for source in sources:
        text = source.splitlines(keepends=True)
        tags = [[KINDS.index("space")] * len(line) for line in text]
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            kind = kind_of(token)
            if kind is None:
                continue
            (first, begin), (last, end) = token.start, token.end
            for row in range(first - 1, last):
                start = begin if row == first - 1 else 0
                stop = end if row == last - 1 else len(text[row])
                tags[row][start:stop] = [kind] * (stop - start)
        for line, tag in zip(text, tags, strict=True):
            length = len(line.rstrip("\n"))
            if 1 <= length <= LONGEST_LINE:
                characters.append(torch.tensor([min(ord(c), 127) for c in line[:length]]))
                kinds.append(torch.tensor(tag[:length]))
    return Lines(
        characters=pad_sequence(characters, batch_first=True),
        kinds=pad_sequence(kinds, batch_first=True, padding_value=IGNORED),
        lengths=torch.tensor([len(line) for line in characters]),
    )


class Tagger(nn.Module):
    """Character embedding, bidirectional LSTM over each line's own length, linear read-out."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.lstm = FusedLSTM(32, hidden_size, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden_size, len(KINDS))

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.lstm(self.embedding(characters), lengths=lengths)
        return self.head(output)


def train_epoch(
    model: Tagger, optimizer: torch.optim.Optimizer, lines: Lines, batch_size: int
) -> float:
    """One pass over the lines in random order; returns the mean loss."""
    losses = []
    for batch in torch.randperm(len(lines.lengths)).split(batch_size):
        optimizer.zero_grad()
        scores = model(lines.characters[batch], lines.lengths[batch])
        loss = nn.functional.cross_entropy(
            scores.flatten(0, 1), lines.kinds[batch].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.inference_mode()
def accuracy(model: Tagger, lines: Lines) -> float:
    """Share of characters that get the right kind."""
    guesses = model(lines.characters, lines.lengths).argmax(-1)
    return (guesses == lines.kinds)[lines.kinds != IGNORED].float().mean().item()


def show(model: Tagger, line: str) -> None:
    """Prints a line with the first letter of each character's kind below it."""
    characters = torch.tensor([[ord(c) for c in line]])
    with torch.inference_mode():
        guesses = model(characters, torch.tensor([len(line)])).argmax(-1)[0]
    print(line)
    print("".join(" " if kind == 0 else KINDS[kind][0] for kind in guesses.tolist()))


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Trains, prints and returns the test accuracies of the model and of the majority kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--modules", nargs="+", default=TRAINING_MODULES, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    training, test = load_lines(options.modules), load_lines(TEST_MODULES)
    model = Tagger(options.hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    print(f"{len(training.lengths)} lines to train on, {len(test.lengths)} to test on")
    start = time.perf_counter()
    for epoch in range(options.epochs):
        loss = train_epoch(model, optimizer, training, options.batch_size)
        print(f"epoch {epoch + 1}  loss {loss:.4f}  test accuracy {accuracy(model, test):.1%}")
    show(model, '    if name == "limit" and value > 2.5:  # too many')
    result, majority = accuracy(model, test), test.majority_accuracy()
    print(
        f"{result:.1%} of characters right, majority kind {majority:.1%} "
        f"({time.perf_counter() - start:.0f} s)"
    )
    return result, majority


if __name__ == "__main__":
    main()
