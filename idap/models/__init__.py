"""Models by name: torchvision's, timm's and the user's own, built the same way every time."""

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
    "ModelFactory",
    "UserCodeError",
    "a_kind",
    "import_object",
    "load_weights",
    "resolve",
    "users_code",
]
