"""Two processes over gloo see what one process sees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import idap
from idap_kernels import channel_stats, pair_stats


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def _data() -> torch.Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = _data()[:2] if rank == 0 else _data()[2:]  # shares of different size
    stats = channel_stats(part).all_reduce()
    pairs = pair_stats(part, part * 1.5).all_reduce()
    shared = idap.profile(_model(), [part], blocks=(), progress=False).all_reduce()
    torch.save(
        {"stats": stats.state, "pairs": pairs.state, "profile": shared.state_dict()}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_equal_one(tmp_path: Path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["stats"], second["stats"])
    torch.testing.assert_close(first["stats"], channel_stats(_data()).state)
    assert torch.equal(first["pairs"], second["pairs"])
    torch.testing.assert_close(first["pairs"], pair_stats(_data(), _data() * 1.5).state)
    alone = idap.profile(_model(), [_data()], blocks=(), progress=False)
    for result in (first, second):
        shared = idap.ActivationProfile.from_state_dict(result["profile"])
        assert (shared.samples, shared.batches) == (5, 2)
        for name, stats in alone.layers.items():
            torch.testing.assert_close(shared.layers[name].state, stats.state)
