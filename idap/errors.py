"""Exceptions of the pruning package; all derive from :class:`IdapError`."""

from idap_kernels.errors import BackendUnavailable, IdapError, InvalidInputError

__all__ = [
    "ArtifactError",
    "BackendUnavailable",
    "EmptyDataError",
    "ExportError",
    "ForwardError",
    "GraphError",
    "GraphTimeoutError",
    "IdapError",
    "InvalidInputError",
    "NonFiniteError",
    "PlanMismatchError",
    "SurgeryError",
    "TargetUnreachableError",
    "TrainingError",
]


class EmptyDataError(InvalidInputError):
    """An iterable of batches had none, or a batch had no samples."""


class NonFiniteError(IdapError, ArithmeticError):
    """A NaN or an infinity where only finite numbers make sense; the message names the layer."""


class ForwardError(IdapError, RuntimeError):
    """The model raised in its forward pass; its own error is the cause of this one."""


class GraphError(IdapError, RuntimeError):
    """The channel dependencies of a model could not be found."""


class GraphTimeoutError(GraphError, TimeoutError):
    """Finding the channel dependencies took longer than the time limit."""


class PlanMismatchError(IdapError, ValueError):
    """A plan was made for another model; the message names the first layer that differs."""


class SurgeryError(IdapError, RuntimeError):
    """A pruned model failed its check; the original model is unharmed."""


class TargetUnreachableError(IdapError, ValueError):
    """A target cannot be met; the message says how far the removal could go."""


class TrainingError(IdapError, RuntimeError):
    """Training went wrong in a way that no further step can mend, such as a loss that is not finite."""


class ArtifactError(IdapError, OSError):
    """A saved model is missing, incomplete, damaged or of another format."""


class ExportError(IdapError, RuntimeError):
    """A model cannot be exported, or the exported file gives something else than the model."""
