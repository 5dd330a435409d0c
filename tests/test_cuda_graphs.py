"""CUDA graphs of layers, of training and of decoding, replayed with new inputs, against eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import pytest
import torch
from conftest import cuda_missing
from helpers import BOUNDS, assert_equal, close
from torch import Tensor, nn

from lstm_cuda import FusedLSTM, FusedLSTMCell, ops

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
T, B, I, H = 12, 5, 7, 32  # noqa: E741
Result = TypeVar("Result")
State = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _device() -> None:
    if missing := cuda_missing():
        pytest.skip(missing)


@pytest.fixture(params=["rec_cta", "rec_cluster", "rec_step"])
def family(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each that is used while a graph is captured, for eager calls as well."""
    name = str(request.param)
    if name == "rec_cluster" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("this device has no clusters")
    with ops.force_kernel(name):
        yield name


def capture(
    call: Callable[[], Result], begin: Callable[[], object] = lambda: None
) -> tuple[Callable[[], None], Result]:
    """What replays a call, and its results, which each replay writes anew.

    Args:
        call: made some times before it is captured, as libraries set themselves up in the first.
        begin: puts things back as they were before these calls.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    begin()
    return graph.replay, results


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def draw_lengths() -> Tensor:
    return torch.randint(0, T + 1, (B,), device=DEVICE)


def spoil(results: Sequence[Tensor]) -> None:
    """What a replay does not write must not look right."""
    with torch.no_grad():
        for t in results:
            t.fill_(float("nan"))


def kept(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def put(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for t, v in zip(to, values, strict=True):
            t.copy_(v)


LAYERS: list[dict[str, Any]] = [{}, {"bidirectional": True}, {"proj_size": 9, "num_layers": 2}]


@pytest.mark.parametrize("options", LAYERS, ids=["plain", "bidirectional", "stacked-projected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
def test_replays_are_eager_calls(
    training: bool, dtype: torch.dtype, options: dict[str, Any], family: str
) -> None:
    """With other inputs, states, lengths, resets and gradients in the captured ones' place."""
    lstm = FusedLSTM(I, H, device=DEVICE, dtype=dtype, **options)
    x, lengths = draw(T, B, I, dtype=dtype).requires_grad_(training), draw_lengths()
    reset = torch.rand(T, B, device=DEVICE) < 0.2
    D = 2 if lstm.bidirectional else 1
    rows, out = lstm.num_layers * D, lstm.proj_size or H
    h, c = (draw(rows, B, n, dtype=dtype).requires_grad_(training) for n in (out, H))
    dy, dh_n, dc_n = (torch.empty(s, device=DEVICE, dtype=dtype) for s in (
        (T, B, D * out), (rows, B, out), (rows, B, H)
    ))  # fmt: skip

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(training):
            y, state = lstm(x, (h, c), lengths=lengths, reset=reset)
        if not training:
            return [y, *state]
        wanted = [x, h, c, *lstm.parameters()]
        grads = torch.autograd.grad([y, *state], wanted, [dy, dh_n, dc_n])
        return [y.detach(), *(t.detach() for t in state), *grads]

    put([dy, dh_n, dc_n], [draw(*t.shape) for t in (dy, dh_n, dc_n)])
    replay, found = capture(call)
    seen = []
    for _ in range(3):
        put(
            [x, h, c, dy, dh_n, dc_n, lengths, reset],
            [*(draw(*t.shape) for t in (x, h, c, dy, dh_n, dc_n)), draw_lengths(), ~reset],
        )
        put([lstm.weight_hh_l0], [lstm.weight_hh_l0 * 1.1])
        spoil(found)
        replay()
        assert_equal(found, call())
        seen.append(kept(found))
    assert all(not torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))


def test_a_layer_that_groups_run_may_be_captured() -> None:
    """By kernels of another family, as nobody has shown that cooperative launches can be."""
    dtype = torch.bfloat16
    with ops.force_kernel(""):
        lstm = FusedLSTM(I, 1024, device=DEVICE, dtype=dtype)
        x = draw(T, B, I, dtype=dtype).requires_grad_()

        def call() -> list[Tensor]:
            y, _ = lstm(x)
            return [y.detach(), *torch.autograd.grad(y, [x, *lstm.parameters()], y.detach())]

        replay, found = capture(call)
        for _ in range(2):
            put([x], [draw(T, B, I)])
            spoil(found)
            replay()
            for a, b in zip(found, call(), strict=True):
                close(a, b, BOUNDS[dtype][0])


class Tagger(nn.Module):
    """A stack and a linear layer: the loss of a batch of rows of different length."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = FusedLSTM(I, H, num_layers=2, device=DEVICE)
        self.head = nn.Linear(H, 1, device=DEVICE)

    def forward(self, x: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        y, _ = self.lstm(x, lengths=lengths)
        inside = torch.arange(T, device=DEVICE)[:, None] < lengths
        wrong = (self.head(y).squeeze(2) - target).square() * inside
        return wrong.sum() / inside.sum().clamp(min=1)


class Training:
    """A model and its optimizer, whose state may be put back in place."""

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        self.model, self.autocast = model, autocast
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.01, capturable=True)

    def step(self, *batch: Tensor) -> Tensor:
        # What autocast casts and keeps for other calls would be in the graph's memory.
        sixteen = torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False)
        self.optimizer.zero_grad(set_to_none=True)
        with sixteen if self.autocast else nullcontext():
            loss: Tensor = self.model(*batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self) -> list[Tensor]:
        of_optimizer = (t for s in self.optimizer.state.values() for t in s.values())
        return [*self.model.parameters(), *of_optimizer]

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """With these parameters, and an optimizer that has done nothing."""
        state = self.state()
        put(state, [*parameters, *map(torch.zeros_like, state[len(parameters) :])])


@pytest.mark.parametrize("autocast", [False, True], ids=["f32", "autocast"])
def test_a_whole_step_of_training(autocast: bool, family: str) -> None:
    model = Tagger()
    start = kept([*model.parameters()])
    eager = Training(copy.deepcopy(model), autocast)
    x, target, lengths = draw(T, B, I), draw(T, B), draw_lengths()
    trained = Training(model, autocast)
    replay, loss = capture(
        lambda: trained.step(x, lengths, target), begin=lambda: trained.begin(start)
    )
    losses = []
    for _ in range(5):
        put([x, target, lengths], [draw(T, B, I), draw(T, B), draw_lengths()])
        spoil([loss])
        replay()
        assert_equal(loss, eager.step(x, lengths, target))
        assert_equal(trained.state(), eager.state())
        losses.append(float(loss))
    assert len(set(losses)) == 5
    for before, after in zip(start, model.parameters(), strict=True):
        assert not torch.equal(before, after)


def test_dropout_draws_anew_in_each_replay(family: str) -> None:
    """As eager calls from the same state of torch's generator, which then is the same again."""
    lstm = FusedLSTM(I, H, num_layers=3, dropout=0.5, device=DEVICE)
    x = draw(T, B, I)

    def call() -> list[Tensor]:
        y, (h_n, c_n) = lstm(x)
        grads = torch.autograd.grad(y.square().sum(), [*lstm.parameters()])
        return [y.detach(), h_n.detach(), c_n.detach(), *grads]

    replay, found = capture(call)
    seen = []
    for _ in range(3):
        before = torch.cuda.get_rng_state()
        spoil(found)
        replay()
        after = torch.cuda.get_rng_state()
        torch.cuda.set_rng_state(before)
        assert_equal(found, call())
        assert torch.equal(torch.cuda.get_rng_state(), after) and not torch.equal(before, after)
        seen.append(kept(found))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(seen[one][0], seen[other][0])

    torch.cuda.manual_seed(7)
    replay()
    seven = kept(found)
    replay()
    torch.cuda.manual_seed(7)
    replay()
    assert_equal(found, seven)


def decode(
    step: Callable[[Tensor, State], tuple[Tensor, State]], x: Tensor, state: State
) -> Callable[[], Tensor]:
    """A call of one step, which leaves its state where the next call finds it."""

    def call() -> Tensor:
        with torch.no_grad():
            y, new = step(x, state)
            put(state, new)
        return y

    return call


@pytest.mark.parametrize("of", ["module", "frozen", "cell"])
def test_one_step_at_a_time(of: str, family: str) -> None:
    layers = 1 if of == "cell" else 2
    shape = (B, I) if of == "cell" else (1, B, I)
    state = (B, H) if of == "cell" else (layers, B, H)
    if of == "cell":
        cell = FusedLSTMCell(I, H, device=DEVICE)

        def step(x: Tensor, state: State) -> tuple[Tensor, State]:
            h, c = cell(x, state)
            return h, (h, c)
    else:
        step = FusedLSTM(I, H, num_layers=2, device=DEVICE)
        step = step.freeze() if of == "frozen" else step.eval()

    x, h, c = draw(*shape), draw(*state), draw(*state)
    h_eager, c_eager = kept([h, c])
    start = kept([h, c])
    replay, y = capture(decode(step, x, (h, c)), begin=lambda: put([h, c], start))
    eager = decode(step, x, (h_eager, c_eager))
    for _ in range(6):
        put([x], [draw(*shape)])
        spoil([y])
        replay()
        assert_equal((y, h, c), (eager(), h_eager, c_eager))
    assert not torch.equal(h, start[0])


@torch.no_grad()
def test_a_graph_of_a_frozen_module_sees_its_weights(family: str) -> None:
    lstm = FusedLSTM(I, H, device=DEVICE).freeze()
    x = draw(T, B, I)
    replay, (y, _) = capture(lambda: lstm(x))
    for _ in range(2):
        lstm.weight_hh_l0.mul_(1.5)
        expected = lstm(x)[0]
        spoil([y])
        replay()
        assert_equal([y], [expected])


def test_gradients_through_steps_of_a_cell(family: str) -> None:
    cell = FusedLSTMCell(I, H, device=DEVICE)
    x, dh = draw(3, B, I).requires_grad_(), draw(B, H)

    def call() -> list[Tensor]:
        state = None
        for step in x.unbind():
            state = cell(step, state)
        assert state is not None
        return [*torch.autograd.grad(state, [x, *cell.parameters()], [dh, dh])]

    replay, found = capture(call)
    for _ in range(2):
        put([x, dh], [draw(3, B, I), draw(B, H)])
        spoil(found)
        replay()
        assert_equal(found, call())


# Of the second kind of layers, weights are packed on a stream beside the captured one.
@pytest.mark.parametrize("sizes", [(T, B, I, H), (8, 32, 11000, 512)], ids=["small", "wide"])
def test_several_graphs_of_a_process(sizes: tuple[int, int, int, int], family: str) -> None:
    """Captured one after the other, with eager calls between them, and replayed in any order."""
    steps, rows, features, hidden = sizes
    if hidden > 64 and family == "rec_cta":
        pytest.skip("rec_cta has no such layer")
    lstm = FusedLSTM(features, hidden, device=DEVICE)
    graphs = []
    for length in (steps, steps // 2, steps):
        x = draw(length, rows, features)

        def call(x: Tensor = x) -> list[Tensor]:
            y, (h_n, c_n) = lstm(x)
            grads = torch.autograd.grad([y, c_n], [*lstm.parameters()], [y.detach(), c_n.detach()])
            return [y.detach(), h_n.detach(), *grads]

        replay, found = capture(call)
        graphs.append((x, call, replay, found))
        call()
    for k in (0, 2, 1, 1, 0, 2):
        x, call, replay, found = graphs[k]
        put([x], [draw(*x.shape)])
        spoil(found)
        replay()
        assert_equal(found, call())


class Model(nn.Module):
    """Tensors in, tensors out, as make_graphed_callables wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = FusedLSTM(I, H, bidirectional=True, device=DEVICE)

    def forward(
        self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, (h_n, c_n) = self.lstm(x, (h, c), lengths=lengths)
        return y, h_n, c_n


def test_make_graphed_callables(family: str) -> None:
    model = Model()
    eager = copy.deepcopy(model)

    def arguments() -> tuple[Tensor, ...]:
        x, h, c = (draw(*s).requires_grad_() for s in ((T, B, I), (2, B, H), (2, B, H)))
        return x, h, c, draw_lengths()

    graphed = torch.cuda.make_graphed_callables(model, arguments())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, eager)]
    for _ in range(3):
        given = arguments()
        results = []
        for m, optimizer in zip((graphed, eager), optimizers, strict=True):
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in given]
            outputs = m(*leaves)
            optimizer.zero_grad()
            sum((t.square().sum() for t in outputs), torch.zeros((), device=DEVICE)).backward()
            grads = [t.grad for t in (*leaves[:3], *m.parameters())]
            assert all(g is not None for g in grads)
            results.append(kept([*outputs, *grads]))  # type: ignore[list-item]
            optimizer.step()
        assert_equal(results[0], results[1])
        assert_equal([*graphed.parameters()], [*eager.parameters()])
