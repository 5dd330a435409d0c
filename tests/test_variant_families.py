"""Options of the cell in the kernel families that keep their weights, under emulation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import assert_equal
from test_variants import ACTIVATIONS, PAIRS, SINGLE, STRUCTURES, name, pair, run
from torch import Tensor

from lstm_cuda import FusedLSTM, explain, ops, variant

H200 = ops.CudaDevice(90, 132, 232448)
KERNELS = {"rec_cta": "variant_cta", "rec_cluster": "variant_cluster"}
UNPROJECTED = [s for s in STRUCTURES if "proj_size" not in s]
OPTIONS = SINGLE + PAIRS + ACTIVATIONS
# Without those whose h may be too large for the operands of a cluster's float32 products.
SMALL_H = [
    o
    for o in OPTIONS
    if "recurrent_dropout" not in o and not {"relu", "identity"} & {*map(str, o.values())}
]


def plan(
    dtype: torch.dtype,
    H: int,
    kind: str,
    large_h: bool = False,
    *,
    backward: bool = False,
    T: int = 500,
    B: int = 16,
    P: int | None = None,
    device: ops.CudaDevice = H200,
) -> dict[str, Any]:
    sizes = T, B, 1, 16, H, P or H
    return ops.plan_cuda(*sizes, dtype, backward, True, device, kind, large_h)


@contextmanager
def forced(emulated_ops: Any, family: str) -> Iterator[None]:
    """Every layer on the family, or an error; its kernels for other cells have run, both ways."""
    emulated_ops.take_launches()
    assert emulated_ops.force_kernel(family)
    try:
        yield
    finally:
        emulated_ops.force_kernel("")
    launched = {k for k in emulated_ops.take_launches() if k.startswith("variant_")}
    assert launched <= {f"{KERNELS[family]}_forward", f"{KERNELS[family]}_backward"}
    assert launched


def inputs(T: int, B: int, H: int, states: int) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    x, *hx = (torch.randn(size, dtype=torch.float64) for size in ((T, B, 6), *2 * [(states, B, H)]))
    call = {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.2}
    return x, hx, call


def states_of(structure: dict[str, Any]) -> int:
    return structure.get("num_layers", 1) * (2 if "bidirectional" in structure else 1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("structure", UNPROJECTED, ids=name)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize(("H", "B"), [(17, 3), (32, 9)])
def test_reference_in_one_block(
    emulated_ops: Any,
    H: int,
    B: int,
    options: dict[str, Any],
    structure: dict[str, Any],
    training: bool,
) -> None:
    fused, reference = pair(6, H, "cpu", training, **options, **structure)
    x, hx, call = inputs(7, B, H, states_of(structure))
    with forced(emulated_ops, "rec_cta"):
        results = run(fused, x, hx, **call)
    for a, b in zip(results, run(reference, x, hx, **call), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "options", "H"),
    [("rec_cta", o, H) for o in OPTIONS for H in (21, 64)]
    + [("rec_cluster", o, H) for o in SMALL_H for H in (40, 130)],
)
def test_float32(emulated_ops: Any, family: str, options: dict[str, Any], H: int) -> None:
    """As far from float64 as the reference is, times a few: norms amplify roundings."""
    fused, reference = pair(6, H, **options, bidirectional=True)
    if "layer_norm" in options:
        quieten(fused, reference)
    x, hx, call = inputs(5, 9, H, 2)
    if "weight_dropout" in options or "recurrent_dropout" in options:
        fused.eval(), reference.eval()  # in float64, torch would draw other masks
    truth = run(reference, x, hx, **call)
    hx = [t.float() for t in hx]
    own = run(reference.float(), x.float(), hx, **call)
    with forced(emulated_ops, family):
        results = run(fused.float(), x.float(), hx, **call)
    for k, (a, b, c) in enumerate(zip(results, own, truth, strict=True)):
        allowed = 4 * (b - c).norm() + 8 * torch.finfo(torch.float32).eps * c.norm()
        assert (a - c).norm() <= allowed, (k, (a - c).norm() / c.norm(), (b - c).norm() / c.norm())


def quieten(*modules: FusedLSTM) -> None:
    """Gains far below 1: with larger ones, roundings grow from step to step."""
    for module in modules:
        for key, p in module.named_parameters():
            if "norm" in key and key.startswith("weight"):
                torch.nn.init.constant_(p, 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize(
    ("family", "H"), [("rec_cta", 40), ("rec_cta", 100), ("rec_cluster", 70), ("rec_cluster", 200)]
)
def test_rounded_products(
    emulated_ops: Any,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    H: int,
    options: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """In 16 bits and in TF32: a few roundings from the reference in float32.

    A clipped cell has no gradient: where a rounding decides which are, gradients tell nothing.
    """
    monkeypatch.setattr(variant, "tf32_allowed", lambda *_: dtype == torch.float32)
    kind = "norm" if "layer_norm" in options else "options"
    large = options not in SMALL_H
    fused = FusedLSTM(16, H, dtype=dtype, **options)
    reference = FusedLSTM(16, H, backend="torch", **options)
    quieten(fused, reference)
    reference.load_state_dict({k: v.float() for k, v in fused.state_dict().items()})
    x = torch.randn(9, 4, 16).to(dtype)
    with ops.force_kernel(family):
        plans = [plan(dtype, H, kind, large, backward=b) for b in (False, True)]
    if not all(p["possible"] for p in plans):
        pytest.skip(str(plans[0]["because"]))
    with forced(emulated_ops, family):
        results = run(fused, x, None)
    eps = 2**-10 if dtype == torch.float32 else torch.finfo(dtype).eps
    expected = run(reference, x.float(), None)
    compared = 4 if "cell_clip" in options else len(expected)
    for k, (a, b) in enumerate(zip(results[:compared], expected[:compared], strict=True)):
        assert a.dtype == dtype
        assert (a.float() - b).norm() <= 8 * eps * b.norm(), (k, (a.float() - b).norm() / b.norm())


EVERYTHING: dict[str, Any] = {
    "peephole": True,
    "cell_clip": 0.8,
    "zoneout": (0.2, 0.3),
    "layer_norm": True,
    "output_activation": "softsign",
}


@pytest.mark.parametrize(("family", "H"), [("rec_cta", 29), ("rec_cluster", 61)])
@pytest.mark.parametrize("options", [EVERYTHING, {**EVERYTHING, "layer_norm": False}], ids=name)
def test_the_order_of_threads_changes_nothing(
    emulated_ops: Any, family: str, options: dict[str, Any], H: int
) -> None:
    fused = FusedLSTM(6, H, bidirectional=True, **options)
    x, hx, call = inputs(5, 11, H, 2)
    hx = [t.float() for t in hx]
    first: list[Tensor] | None = None
    try:
        for order in (("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(1, 5))):
            emulated_ops.set_order(*order)
            with forced(emulated_ops, family):
                results = run(fused, x.float(), hx, **call)
            first = first or results
            assert_equal(results, first)
    finally:
        emulated_ops.set_order("forward", 0)


@pytest.mark.parametrize(("family", "H"), [("rec_cta", 20), ("rec_cluster", 40)])
def test_a_nan_stays_in_its_row(emulated_ops: Any, family: str, H: int) -> None:
    fused = FusedLSTM(6, H, **EVERYTHING)
    x, hx, _ = inputs(5, 11, H, 1)
    given = [x.float(), *(t.float() for t in hx)]
    spoiled = [t.clone() for t in given]
    spoiled[0][1, 3] = float("nan")
    spoiled[2][:, 3] = float("inf")
    rows = [b for b in range(11) if b != 3]
    with forced(emulated_ops, family):
        good, bad = (run(fused, t[0], t[1:]) for t in (given, spoiled))
    for a, b in zip(good[:7], bad[:7], strict=True):  # outputs, dx, dh0, dc0
        assert_equal(a[:, rows], b[:, rows])
    assert bad[0][1:, 3].isnan().any()


def test_a_refused_launch_leaves_nothing_behind(emulated_ops: Any) -> None:
    """Of the product of h0, which a norm has apart, nor of memory for gates."""
    fused, reference = (m.half() for m in pair(6, 200, **EVERYTHING))
    quieten(fused, reference)
    x, hx, call = inputs(40, 3, 200, 1)
    emulated_ops.use_device(20)
    emulated_ops.refuse("variant_cluster")
    emulated_ops.take_launches()
    try:
        results = run(fused, x.half(), [t.half() for t in hx], **call)
        launches = emulated_ops.take_launches()
    finally:
        emulated_ops.refuse("")
        emulated_ops.use_device(0)
    assert launches.count("variant_cluster_forward") == 1
    assert launches.count("variant_forward_row") == launches.count("variant_backward_row") == 40
    for a, b in zip(
        results[:4], run(reference, x.half(), [t.half() for t in hx], **call)[:4], strict=True
    ):
        assert (a - b).norm() <= 2e-2 * b.norm()


def test_what_each_family_runs() -> None:
    half, single = torch.bfloat16, torch.float32
    for backward in (False, True):
        chosen = {
            (dtype, H, kind): plan(dtype, H, kind, backward=backward)["kernel"]
            for dtype in (half, single)
            for H in (64, 250, 500, 1000)
            for kind in ("options", "norm")
        }
        for (dtype, H, kind), kernel in chosen.items():
            expected = "rec_cta" if H == 64 else "rec_cluster" if H <= 500 else "rec_step"
            assert kernel == expected, (dtype, H, kind, backward)
    a100 = ops.CudaDevice(80, 108, 166912)
    assert plan(half, 250, "options", device=a100)["kernel"] == "rec_step"
    assert plan(half, 100, "options", device=a100)["kernel"] == "rec_cta"
    assert plan(half, 100, "norm", device=a100)["kernel"] == "rec_step"
    assert plan(half, 100, "norm", device=a100, backward=True)["kernel"] == "rec_cta"
    assert plan(half, 100, "options", P=30)["kernel"] == "rec_step"
    assert plan(single, 250, "options", True)["kernel"] == "rec_step"


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("rec_group", {"peephole": True}, "rec_group has no other cells"),
        ("rec_cta", {"coupled": True, "proj_size": 4}, "only rec_step has projections of other"),
        ("rec_cluster", {"recurrent_dropout": 0.5}, "no room for a large h"),
        ("rec_cluster", {"recurrent_activation": "relu"}, "no room for a large h"),
    ],
)
def test_what_no_family_but_one_runs_is_an_error_when_forced(
    emulated_ops: Any, family: str, options: dict[str, Any], message: str
) -> None:
    fused = FusedLSTM(3, 40, **options)
    with pytest.raises(RuntimeError, match=message), forced(emulated_ops, family):
        fused(torch.randn(2, 2, 3))
    with ops.force_kernel(family):
        assert message in explain(fused, torch.randn(2, 2, 3), H200)
