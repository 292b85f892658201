"""Exceptions of both packages: what came, what was wanted, what to do."""


class IdapError(Exception):
    """Base of every exception that idap and idap_kernels raise on purpose."""


class InvalidInputError(IdapError, ValueError):
    """An argument has the wrong rank, shape, dtype, device or value."""


class BackendUnavailable(IdapError, RuntimeError):
    """A backend that was asked for by name cannot run this call; the message says why."""
