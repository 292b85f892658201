"""Models by name: torchvision's, timm's and the user's own, built the same way every time."""

from .resolve import ModelFactory, import_object, load_weights, resolve

__all__ = ["ModelFactory", "import_object", "load_weights", "resolve"]
