"""The step of a profile, captured as a CUDA graph and replayed: one launch by the host in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from idap_kernels import PairStats

from . import inputs as _inputs
from .errors import ForwardError, InvalidInputError
from .fusion import Stop

if TYPE_CHECKING:
    from .profile import _Recorder


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture what ``step`` launches on ``device``, without running it; the function returned runs it again."""
    graph = torch.cuda.CUDAGraph()
    # A stream of this device: torch's own for captures belongs to the device of the first one. Other threads, such as
    # those that pin batches, may go on meanwhile.
    stream = torch.cuda.Stream(device)
    with (
        torch.cuda.device(device),
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        step()
    return graph.replay


class GraphedSteps:
    """Runs the steps of a profile; those of shapes that came before, by replaying one capture.

    One graph is kept, of the first shapes that come twice. Their first step runs as usual: by then libraries have
    chosen their algorithms, kernels are compiled, and every layer has the statistics that the graph adds to. A step
    that shows what can be fused does not count: the next one runs other kernels.

    Raises:
        InvalidInputError: the model is not on a GPU.
    """

    def __init__(self, model: nn.Module, recorder: _Recorder) -> None:
        device = _inputs.device_of(model)
        if device is None or not self.supports(device):
            raise InvalidInputError(
                f"cuda_graph: the model is on {device or 'no device'}; wanted a model on a CUDA GPU"
            )
        self.device = device
        self.recorder = recorder
        self.seen: list[Any] = []  # forms of the batches that ran as usual
        self.form: Any = None  # of the batches that are replayed
        self.replay: Callable[[], None] | None = None
        self.static: list[Tensor] = []  # what the graph reads
        self.made: list[tuple[list[Any], Any]] = []  # what it writes, and where that is gathered

    @staticmethod
    def supports(device: torch.device) -> bool:
        return device.type == "cuda"

    def run(self, step: Callable[[Any], None], batch: Any) -> None:
        """Run ``step`` on a batch that is on the device.

        Raises:
            Stop: with a ForwardError, the step cannot be captured.
        """
        form = _form(batch)
        if self.replay is None and form in self.seen:
            self._capture(step, batch)
            self.form = form
        if self.replay is None or form != self.form:
            fusion = self.recorder.fusion
            learning = fusion is not None and fusion.learning
            step(batch)
            if not learning:
                self.seen.append(form)
            return
        for static, given in zip(self.static, _flat(batch)):
            static.copy_(given)
        self.replay()
        for gathered, made in self.made:
            gathered.append(made.clone() if isinstance(made, Tensor) else PairStats(made.state.clone()))

    def _capture(self, step: Callable[[Any], None], batch: Any) -> None:
        recorder = self.recorder
        batch = _inputs.map_tensors(batch, torch.clone)
        gathered: list[list[Any]] = [recorder.finite, *recorder.blocks.values()]
        lengths = [len(made) for made in gathered]
        known = recorder.names()
        try:
            self.replay = capture(lambda: step(batch), self.device)
        except RuntimeError as error:
            cause = error.__context__ or error  # the first one; the second only says that there was one
            raise Stop(
                ForwardError(
                    "the forward pass cannot be captured as a CUDA graph (it may read values of tensors): profile "
                    f"without cuda_graph, in a new process. {type(cause).__name__}: {cause}"
                )
            ) from error
        if new := recorder.names() - known:
            raise Stop(
                ForwardError(
                    f"the model did not call {min(new)!r} for an earlier batch of the same shapes: one capture cannot "
                    "stand for all batches; profile without cuda_graph"
                )
            )
        self.static = _flat(batch)
        for made, length in zip(gathered, lengths):
            self.made += [(made, item) for item in made[length:]]
            del made[length:]


def _flat(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in the order of ``map_tensors``."""
    tensors: list[Tensor] = []
    _inputs.map_tensors(batch, lambda t: tensors.append(t) or t)  # type: ignore[func-returns-value]
    return tensors


def _form(value: Any) -> Any:
    """What has to be equal of two batches for one capture to serve both."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, Mapping):
        return [(key, _form(item)) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return [type(value), *(_form(item) for item in value)]
    if value is None or isinstance(value, (str, int, float, bool)):
        return type(value), value
    return object()  # equal to nothing: may hold anything
