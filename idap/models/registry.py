"""The architectures of the paper by name."""

from __future__ import annotations

from . import classification, detection, generation, language, segmentation
from .architectures import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    own.name: own
    for family in (classification, detection, segmentation, generation, language)
    for own in family.ARCHITECTURES
}
