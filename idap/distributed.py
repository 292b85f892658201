"""Many processes: who am I, which batches are mine, and the same decision everywhere.

Without an initialised process group every function is that of a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


class Shard:
    """A re-iterable of this process's share of ``batches``: every n-th of them, in order."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        rank, size = world()
        return islice(iter(self.batches), rank, None, size)


def shard(batches: Iterable[T]) -> Iterable[T]:
    """This process's share of ``batches``; with one process, ``batches`` itself."""
    return batches if world()[1] == 1 else Shard(batches)


def _device() -> torch.device:
    """Where tensors have to be to travel."""
    import torch.distributed as dist

    if dist.get_backend() != "nccl":
        return torch.device("cpu")
    # Not the current device, which is the first GPU on every process that has not chosen one.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def from_first(value: T) -> T:
    """The value of rank 0, on every rank. It travels pickled, between processes of one run."""
    if world()[1] == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def any_of(text: str) -> str:
    """The first of all processes' texts that is not empty, on every rank; empty if all are."""
    size = world()[1]
    if size == 1:
        return text
    import torch.distributed as dist

    found = [""] * size
    with torch.cuda.device(_device()) if _device().type == "cuda" else nullcontext():
        dist.all_gather_object(found, text)
    return next((other for other in found if other), "")


def total(values: Iterable[float]) -> list[float]:
    """The sums of float64 numbers over all processes."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if world()[1] > 1:
        import torch.distributed as dist

        tensor = tensor.to(_device())
        dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def same_weights(model: nn.Module) -> None:
    """Give every process the parameters and buffers of rank 0, in place."""
    if world()[1] == 1:
        return
    import torch.distributed as dist

    for tensor in (*model.parameters(), *model.buffers()):
        data = tensor.detach()
        if data.numel():
            # As bytes, since not every backend knows every type.
            moved = data.to(_device(), copy=True).contiguous()
            dist.broadcast(moved.flatten().view(torch.uint8), src=0)
            data.copy_(moved)


def wait() -> None:
    """Until every process is here."""
    if world()[1] > 1:
        import torch.distributed as dist

        dist.barrier()
