"""Options of the cell in the kernel families that keep their weights, emulated, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import assert_equal
from test_variants import ACTIVATIONS, PAIRS, SINGLE, STRUCTURES, name, pair, run
from torch import Tensor

from lstm_cuda import FusedLSTM, ops, variant

H200 = ops.CudaDevice(90, 132, 232448)
KERNELS = {"rec_cta": "variant_cta", "rec_cluster": "variant_cluster"}
UNPROJECTED = [s for s in STRUCTURES if "proj_size" not in s]
OPTIONS = SINGLE + PAIRS + ACTIVATIONS
# Of the options, those whose h has no place in the float16 operands of a cluster's float32 products.
SMALL_H = [
    o
    for o in OPTIONS
    if "recurrent_dropout" not in o and not {"relu", "identity"} & {*map(str, o.values())}
]


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
    x, *hx = (
        torch.randn(size, dtype=torch.float64) for size in ((T, B, 6), *2 * [(states, B, H)])
    )
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
    """Gains far below 1: with larger ones a net of random weights has little to do with its inputs."""
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
    """In 16 bits and in TF32: a few roundings from the reference in float32."""
    monkeypatch.setattr(variant, "tf32_allowed", lambda *_: dtype == torch.float32)
    kind = "norm" if "layer_norm" in options else "options"
    large = options not in SMALL_H
    fused = FusedLSTM(16, H, dtype=dtype, **options)
    reference = FusedLSTM(16, H, backend="torch", **options)
    quieten(fused, reference)
    reference.load_state_dict({k: v.float() for k, v in fused.state_dict().items()})
    x = torch.randn(9, 4, 16).to(dtype)
    with ops.force_kernel(family):
        plan = [
            ops.plan_cuda(9, 4, 1, 16, H, H, dtype, b, True, H200, kind, large)
            for b in (False, True)
        ]
    if not all(p["possible"] for p in plan):
        pytest.skip(str(plan[0].get("because")))
    with forced(emulated_ops, family):
        results = run(fused, x, None)
    eps = 2**-10 if dtype == torch.float32 else torch.finfo(dtype).eps
    for k, (a, b) in enumerate(zip(results, run(reference, x.float(), None), strict=True)):
        assert a.dtype == dtype
        assert (a.float() - b).norm() <= 8 * eps * b.norm(), (k, (a.float() - b).norm() / b.norm())
