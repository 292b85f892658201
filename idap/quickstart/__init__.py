"""The embedded default of ``idap quickstart``: digits, a small residual network, its trained weights."""

from .data import Split, TrainingBatches, load_digits
from .network import DigitsResNet, load_network

__all__ = ["DigitsResNet", "Split", "TrainingBatches", "load_digits", "load_network"]
