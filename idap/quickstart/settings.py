"""What the quickstart can be told, and the one place of its defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What ``idap quickstart`` can be told; see ``idap quickstart --help``."""

    output: Path = Path("idap-quickstart")
    target_macs: float = 0.3
    budget: float = 0.02
    steps: int = 12
    initial_ratio: float = 0.12
    epochs: int = 2
    final_epochs: int = 10
    lr: float = 0.02
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"
    latency_runs: int = 200
    plots: bool = True
    quiet: bool = False
