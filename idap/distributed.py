"""Many processes: who am I, which batches are mine, and the same decision everywhere.

Without an initialised process group every function is that of a single process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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


def from_first(value: T) -> T:
    """The value of rank 0, on every rank. It travels pickled, between processes of one run."""
    if world()[1] == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total(values: Iterable[float], device: torch.device | None = None) -> list[float]:
    """The sums of float64 numbers over all processes."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if world()[1] > 1:
        import torch.distributed as dist

        on_gpu = dist.get_backend() == "nccl"
        tensor = tensor.to(device or "cuda") if on_gpu else tensor
        dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def same_weights(model: nn.Module) -> None:
    """Give every process the parameters and buffers of rank 0, in place."""
    if world()[1] == 1:
        return
    import torch.distributed as dist

    on_gpu = dist.get_backend() == "nccl"
    for tensor in (*model.parameters(), *model.buffers()):
        data = tensor.detach()
        moved: Tensor = data.cuda() if on_gpu and not data.is_cuda else data.contiguous()
        dist.broadcast(moved, src=0)
        if moved.data_ptr() != data.data_ptr():
            data.copy_(moved)


def wait() -> None:
    """Until every process is here."""
    if world()[1] > 1:
        import torch.distributed as dist

        dist.barrier()
