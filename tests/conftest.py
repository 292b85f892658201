"""Two threads in every test, whatever the machine has: CI runners are small and shared."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(2)
