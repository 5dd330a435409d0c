"""explain: which path, and why, in words."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lstm_cuda import CudaDevice, FusedLSTM, explain, force_kernel


def test_reference_and_why() -> None:
    x = torch.randn(5, 2, 3)
    assert explain(FusedLSTM(3, 4, backend="torch"), x).startswith("reference: backend=")
    lstm = FusedLSTM(3, 4, coupled=True, peephole=True)
    assert "a cell with coupled, peephole" in explain(lstm, x)
    lstm.truncate = 2
    text = explain(lstm, x)
    assert "a cell with coupled, peephole" in text and "gradients end every 2 steps" in text
    lstm.truncate = None
    h100 = CudaDevice(90, 132, 232448)
    text = explain(lstm, x, h100)
    assert "a cell with coupled, peephole" in text and "forward: rec_cta" in text
    text = explain(FusedLSTM(3, 4, coupled=True, proj_size=2), x, h100)
    assert "forward: rec_step" in text and "only rec_step has projections of other cells" in text


def test_each_layer_of_the_fused_op() -> None:
    lstm = FusedLSTM(3, 8, 2, bidirectional=True, proj_size=4, batch_first=True)
    lines = explain(lstm, torch.randn(2, 5, 3)).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == [
        "layer 0", "  forward", "  backward", "layer 1", "  forward", "  backward"
    ]  # fmt: skip
    assert "fused op on cpu, float32, T=5 B=2" in lines[0] and "saves for backward" in lines[0]
    assert lines[1] == "layer 0: 2 x LSTM 3 -> 8 -> 4"
    assert lines[4] == "layer 1: 2 x LSTM 8 -> 8 -> 4"
    assert "capability=" in lines[2] and "capability=" in lines[3]
    with torch.no_grad():
        assert "inference, saves nothing" in explain(lstm, torch.randn(2, 5, 3))
    assert "T=5 B=1" in explain(lstm, torch.randn(5, 3))
    packed = pack_sequence([torch.randn(6, 3), torch.randn(2, 3)])
    assert "T=6 B=2" in explain(lstm, packed)
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in explain(lstm, torch.randn(2, 5, 3))


def test_an_error_is_told_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lstm_cuda.ops.load_error", "there is no compiled part")
    text = explain(FusedLSTM(3, 4), torch.randn(5, 2, 3))
    assert text == "error: there is no compiled part"


def test_a_cuda_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = CudaDevice(architecture=90, multiprocessors=132, shared_bytes=232448)
    lstm = FusedLSTM(3, 64, 2, bidirectional=True)
    x = torch.randn(7, 20, 3)
    lines = explain(lstm, x, h100).splitlines()
    assert lines[0].startswith("fused op on cuda, float32, T=7 B=20")
    assert lines[2] == (
        "  forward: rec_cta, tf32 products, one launch for all steps, H padded to 64: "
        "the weights fit the registers of one block"
    )
    assert lines[3].startswith("  backward: rec_cta")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert "float32 products" in explain(lstm, x, h100)
    with force_kernel("rec_step"):
        assert "rec_step, float32" in explain(lstm, x, h100)
    projected = FusedLSTM(3, 64, proj_size=8)
    assert explain(projected, x, h100).splitlines()[2] == (
        "  forward: rec_cta, float32 products, one launch for all steps, H padded to 64, the "
        "projection folded into the weights: the weights fit the registers of one block"
    )
    with force_kernel("rec_step"):
        text = explain(projected, x, h100)
        assert "overlapping launches for each step, small tiles: forced" in text
    old = CudaDevice(architecture=75, multiprocessors=40, shared_bytes=65536)
    assert "error: rec_step cannot run it: the device is older" in explain(lstm, x, old)


def test_clusters_and_groups_in_words() -> None:
    h100 = CudaDevice(architecture=90, multiprocessors=132, shared_bytes=232448)
    lstm = FusedLSTM(3, 200, dtype=torch.bfloat16)
    x = torch.randn(100, 20, 3, dtype=torch.bfloat16)
    assert explain(lstm, x, h100).splitlines()[2] == (
        "  forward: rec_cluster, bfloat16 products, one launch for all steps, H padded to 256, "
        "8 batch rows to a cluster of 8 blocks: the weights fit the registers of a cluster"
    )
    with force_kernel("rec_group"):
        assert explain(lstm, x, h100).splitlines()[2] == (
            "  forward: rec_group, bfloat16 products, one launch for all steps, H padded to 512, "
            "8 batch rows to a group of 32 blocks, 3 groups at once: forced"
        )
        a100 = CudaDevice(architecture=80, multiprocessors=31, shared_bytes=166912)
        assert "error: rec_group cannot run it: a group has more blocks" in explain(lstm, x, a100)
