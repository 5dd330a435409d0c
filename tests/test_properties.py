"""Equalities that hold for any sizes: batches, splits, lengths, resets, layouts."""

import itertools

import torch
from helpers import Problem, assert_accurate, call, close, gradients, make
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33])
HIDDEN = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 47, 64, 65])


@st.composite
def problems(draw: st.DrawFn, **fixed: object) -> Problem:
    values: dict[str, object] = {
        "T": draw(st.integers(1, 9)),
        "B": draw(SIZES),
        "I": draw(SIZES),
        "H": draw(HIDDEN),
        "L": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "hx": draw(st.booleans()),
        "lengths": draw(st.booleans()),
        "reset": draw(st.booleans()),
    } | fixed
    if not values["bidirectional"]:
        values["reverse"] = draw(st.booleans())
    H = values["H"]
    assert isinstance(H, int)
    if H > 1 and draw(st.booleans()):
        values["P"] = draw(st.integers(1, H - 1))
    return Problem(**values)  # type: ignore[arg-type]


# The same examples in every run: float32's bound is not for inputs that saturate every gate.
quick = settings(max_examples=60, deadline=None, derandomize=True)


@given(problems(), st.sampled_from([torch.float64, torch.float32]))
@quick
def test_accuracy(p: Problem, dtype: torch.dtype) -> None:
    assert_accurate(p, make(p), dtype)


@given(problems(), st.randoms(use_true_random=False))
@quick
def test_rows_may_be_permuted(p: Problem, random: object) -> None:
    d = make(p).to(torch.float64)
    order = list(range(p.B))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = make(p).to(torch.float64)
    shuffled.x = d.x.detach()[:, order].requires_grad_()
    if d.hx is not None:
        shuffled.hx = tuple(t.detach()[:, order].requires_grad_() for t in d.hx)
    shuffled.lengths = None if d.lengths is None else d.lengths[order]
    shuffled.reset = None if d.reset is None else d.reset[:, order]
    shuffled.cotangents = {name: t[:, order] for name, t in d.cotangents.items()}
    a, b = call(p, d), call(p, shuffled)
    for name in a:
        close(b[name], a[name][:, order])
    a, b = gradients(a, d), gradients(b, shuffled)
    for name in a:
        by_row = name in ("dx", "dh0", "dc0")
        close(b[name], a[name][:, order] if by_row else a[name])


@given(problems(bidirectional=False, lengths=False, reset=False), st.integers(0, 9))
@quick
def test_two_sequences_are_one_with_the_state_carried(p: Problem, cut: int) -> None:
    cut = min(cut, p.T)
    d = make(p)
    whole = call(p, d)
    first, last = make(p), make(p)
    first.x, last.x = d.x[:cut], d.x[cut:]
    if p.reverse:
        first, last = last, first
    a = call(p, first)
    last.hx = (a["h_n"], a["c_n"])
    b = call(p, last)
    order = (b, a) if p.reverse else (a, b)
    for name in ("y", "cells"):
        close(torch.cat([part[name] for part in order]), whole[name])
    close(b["h_n"], whole["h_n"])
    close(b["c_n"], whole["c_n"])


@given(problems(lengths=True))
@quick
def test_lengths_run_each_row_alone(p: Problem) -> None:
    d = make(p)
    together = call(p, d)
    for b in range(0, p.B, 4):
        n, row = int(d.lengths[b]), slice(b, b + 1)
        alone = make(p)
        alone.x, alone.lengths = d.x[:n, row], None
        alone.hx = None if d.hx is None else (d.hx[0][:, row], d.hx[1][:, row])
        alone.reset = None if d.reset is None else d.reset[:n, row]
        expected = call(p, alone)
        for name in ("y", "cells"):
            close(together[name][:n, row], expected[name])
            assert (together[name][n:, row] == 0).all()
        for name in ("h_n", "c_n"):
            close(together[name][:, row], expected[name])


@given(problems(lengths=False, reset=True, L=1, bidirectional=False))
@quick
def test_resets_split_each_row(p: Problem) -> None:
    d = make(p)
    y = call(p, d)["y"]
    for b in range(0, p.B, 4):
        row = slice(b, b + 1)
        starts = [0, *(t for t in range(1, p.T) if d.reset[t, b]), p.T]
        for start, end in itertools.pairwise(starts):
            part = make(p)
            part.x, part.reset, part.hx = d.x[start:end, row], None, None
            # hx reaches the part that runs first, unless a reset stands right before it.
            first = end == p.T if p.reverse else start == 0 and not d.reset[0, b]
            if first and d.hx is not None:
                part.hx = (d.hx[0][:, row], d.hx[1][:, row])
            close(y[start:end, row], call(p, part)["y"])


@given(problems(), st.data())
@quick
def test_nan_stays_in_its_row(p: Problem, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, p.B - 1))
    clean, dirty = make(p).to(torch.float64), make(p).to(torch.float64)
    with torch.no_grad():
        dirty.x[data.draw(st.integers(0, p.T - 1)), bad] = float("nan")
    others = [b for b in range(p.B) if b != bad]
    a, b = call(p, clean), call(p, dirty)
    for name in a:
        close(b[name][:, others], a[name][:, others])
    a, b = gradients(a, clean), gradients(b, dirty)
    for name in ("dx", "dh0", "dc0"):
        if name in a:
            close(b[name][:, others], a[name][:, others])
