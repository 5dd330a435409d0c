"""One process of several: what test_distributed.py runs on every rank, and compares.

distributed_worker.py RANK WORLD DEVICE FOLDER
"""

import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lstm_cuda import FusedLSTM

LIMIT = timedelta(seconds=40)  # of one wait for the other processes
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

Batch = tuple[Tensor, Tensor]
Results = dict[str, Tensor]


class Tagger(nn.Module):
    """Two layers, both ways, and a head."""

    def __init__(self, lstm: Callable[..., nn.RNNBase] = FusedLSTM, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lstm = lstm(3, 5, 2, bidirectional=True, dtype=torch.float64)
        self.head = nn.Linear(10, 4, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.lstm(x, lengths=lengths)[0])


def batches() -> Iterator[Batch]:
    """Two batches of four rows: x [6, 4, 3] and lengths [4]."""
    for seed in (5, 6):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(6, 4, 3, generator=g, dtype=torch.float64)
        yield x, torch.randint(0, 7, (4,), generator=g)


def backward(model: nn.Module, batch: Batch) -> None:
    model(*batch).float().square().mean().backward()


def gradients(model: nn.Module) -> Results:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give each parameter a value of its own."""
    for k, p in enumerate(model.parameters()):
        p.fill_(0.1 * (k % 5 - 2))


def whole(tensors: Results) -> Results:
    """Sharded tensors put together, on the CPU, under the names that they have without DDP."""
    return {
        name.removeprefix("module."): (t.full_tensor() if isinstance(t, DTensor) else t).cpu()
        for name, t in tensors.items()
    }


class Rank:
    """One process: its share of the batches, and its models."""

    def __init__(self, rank: int, world: int, device: str, folder: Path) -> None:
        self.device = torch.device(device, rank) if device == "cuda" else torch.device(device)
        self.folder = folder
        self.mesh: DeviceMesh = init_device_mesh(device, (world,))
        self.batches = [
            (x.chunk(world, 1)[rank].to(self.device), n.chunk(world)[rank].to(self.device))
            for x, n in batches()
        ]

    def ddp(self, **options: Any) -> DistributedDataParallel:
        return DistributedDataParallel(Tagger().to(self.device), **options)

    def fsdp(self, model: nn.Module | None = None, **options: Any) -> Any:
        model = model or Tagger().to(self.device)
        fully_shard(model.lstm, mesh=self.mesh, **options)
        return fully_shard(model, mesh=self.mesh, **options)


def ddp(rank: Rank) -> Results:
    model = rank.ddp()
    backward(model, rank.batches[0])
    return gradients(model)


def ddp_static_graph(rank: Rank) -> Results:
    """Twice: from the second time on, buckets are in the order in which gradients came."""
    model = rank.ddp(static_graph=True, gradient_as_bucket_view=True, bucket_cap_mb=0.001)
    for _ in range(2):
        model.zero_grad()
        backward(model, rank.batches[0])
    return gradients(model)


def ddp_no_sync(rank: Rank) -> Results:
    model = rank.ddp()
    with model.no_sync():
        backward(model, rank.batches[0])
    backward(model, rank.batches[1])
    return gradients(model)


def fsdp(rank: Rank) -> Results:
    model = rank.fsdp()
    backward(model, rank.batches[0])
    return gradients(model)


def fsdp_no_sync(rank: Rank) -> Results:
    model = rank.fsdp(reshard_after_forward=False)
    model.set_requires_gradient_sync(False)
    backward(model, rank.batches[0])
    model.set_requires_gradient_sync(True)
    backward(model, rank.batches[1])
    return gradients(model)


def fsdp_mixed_precision(rank: Rank) -> Results:
    model = rank.fsdp(Tagger().float().to(rank.device), mp_policy=MIXED)
    output = model(rank.batches[0][0].float(), rank.batches[0][1])
    output.float().square().mean().backward()
    return {"output": output.detach(), **gradients(model)}


def fsdp_meta(rank: Rank) -> Results:
    """Sharded before there is memory for the parameters."""
    model = rank.fsdp(Tagger().to("meta"))
    model.to_empty(device=rank.device)
    fill(model)
    backward(model, rank.batches[0])
    return gradients(model)


def save(rank: Rank) -> Results:
    """After a step of training: parameters and the optimizer's state, in checkpoint "sharded"."""
    model = rank.fsdp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    backward(model, rank.batches[0])
    optimizer.step()
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=rank.folder / "sharded")
    return dict(model.named_parameters())


def load(rank: Rank) -> Results:
    """The checkpoint "single", which one process has written for a torch.nn.LSTM."""
    model = rank.fsdp()
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=rank.folder / "single")
    set_model_state_dict(model, state["model"])
    return dict(model.named_parameters())


CASES: list[Callable[[Rank], Results]] = [
    ddp, ddp_static_graph, ddp_no_sync, fsdp, fsdp_no_sync, fsdp_mixed_precision, fsdp_meta, save,
    load,
]  # fmt: skip


def main(number: int, world: int, device: str, folder: Path) -> None:
    """Runs all cases; the first process writes what they give, or that and why they failed."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(number)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store", rank=number, world_size=world, timeout=LIMIT,
    )  # fmt: skip
    rank = Rank(number, world, device, folder)
    found: dict[str, Results | str] = {}
    for case in CASES:
        try:
            found[case.__name__] = whole(case(rank))
        except Exception:
            found[case.__name__] = traceback.format_exc()
    torch.save(found, folder / f"rank{number}")
    dist.barrier()  # nobody leaves while another still needs it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
