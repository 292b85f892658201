"""Models by name: the paper's, those of torchvision, timm and transformers, and the user's own.

:data:`ARCHITECTURES` has the 22 networks of the paper; :func:`resolve` makes a factory of any name, and
:func:`load_weights` reads a state dictionary into what it builds.
"""

from .architectures import Architecture, PaperFigures
from .registry import ARCHITECTURES
from .resolve import (
    ModelFactory,
    UserCodeError,
    a_kind,
    import_object,
    load_weights,
    resolve,
    users_code,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ModelFactory",
    "PaperFigures",
    "UserCodeError",
    "a_kind",
    "import_object",
    "load_weights",
    "resolve",
    "users_code",
]
