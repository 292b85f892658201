"""One pass over data: hooks in, statistics out, no activation kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from idap_kernels import ChannelStats, PairStats, bn_act_stats, channel_stats, pair_stats
from idap_kernels.bn_act_stats import fused_pass, prepared
from idap_kernels.dispatch import (
    ACTIVATION_CODES,
    BatchNorm,
    backend_module,
    check_backend_name,
    is_plain,
    select,
)

from . import inputs as _inputs
from .adapters import multihead as _multihead
from .cuda_graph import GraphedSteps
from .errors import EmptyDataError, ForwardError, GraphError, IdapError, InvalidInputError, NonFiniteError
from .fusion import NormFusion
from .fusion import Stop as _Stop
from .fusion import version as _version
from .inputs import Inputs

if TYPE_CHECKING:
    import torch.distributed as dist

    from .heads import AttentionHeads
    from .layers import Block

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


_SUMS = slice(3, 6)  # rows of ChannelStats.state: M2, sum |y|, sum of act(y)^2


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that stores its weight as (in, out), as GPT-2's ``Conv1D``."""
    nf = vars(module).get("nf")
    weight = getattr(module, "weight", None) if isinstance(nf, int) else None
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == nf


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, whichever way round it stores its weight."""
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def is_scored(module: nn.Module) -> bool:
    """Whether a module is a layer whose filters or neurons are scored: convolutions and linear layers."""
    return isinstance(module, CONVOLUTIONS) or is_linear(module)


@dataclass(eq=False)
class ActivationProfile:
    """What a pass over data left: one small buffer per layer, one row per sample and block.

    Attributes:
        layers: statistics of the outputs of each layer, by module name, in the order of their calls.
            A layer that was never called is missing.
        blocks: input and output of each removable block, compared sample by sample; by the name of the block.
        samples: samples seen.
        batches: batches seen.
        inputs: statistics of what enters each layer asked for, per input channel, without an activation.
        heads: where the heads of each attention are, by module name; what enters their output projections
            is in ``inputs``.
    """

    layers: dict[str, ChannelStats] = field(default_factory=dict)
    blocks: dict[str, PairStats] = field(default_factory=dict)
    samples: int = 0
    batches: int = 0
    inputs: dict[str, ChannelStats] = field(default_factory=dict)
    heads: dict[str, AttentionHeads] = field(default_factory=dict)

    def merge(self, other: ActivationProfile) -> ActivationProfile:
        """The profile of both parts of the data, as a new object; equal to one pass over all of it.

        Raises:
            InvalidInputError: the profiles are of different layers, blocks or heads.
        """
        if not isinstance(other, ActivationProfile):
            raise InvalidInputError(f"merge needs an ActivationProfile, got {type(other).__name__}")
        for what, mine, theirs in (
            ("layers", self.layers.keys(), other.layers.keys()),
            ("blocks", self.blocks.keys(), other.blocks.keys()),
            ("inputs", self.inputs.keys(), other.inputs.keys()),
        ):
            if mine != theirs:
                raise InvalidInputError(
                    f"the profiles have different {what}: only one has {sorted(mine ^ theirs)[:5]}"
                )
        if self.heads != other.heads:
            raise InvalidInputError("the profiles have different heads: profile with the same heads=")
        return ActivationProfile(
            {name: stats.merge(other.layers[name]) for name, stats in self.layers.items()},
            {name: stats.merge(other.blocks[name]) for name, stats in self.blocks.items()},
            self.samples + other.samples,
            self.batches + other.batches,
            {name: stats.merge(other.inputs[name]) for name, stats in self.inputs.items()},
            dict(self.heads),
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> ActivationProfile:
        """The profile of the data of all processes, the same bits on each.

        Raises:
            InvalidInputError: torch.distributed is not initialised.
        """
        import torch.distributed as dist

        layers = {name: stats.all_reduce(group) for name, stats in self.layers.items()}
        blocks = {name: stats.all_reduce(group) for name, stats in self.blocks.items()}
        inputs = {name: stats.all_reduce(group) for name, stats in self.inputs.items()}
        states = [stats.state for part in (layers, blocks, inputs) for stats in part.values()]  # type: ignore[attr-defined]
        device = states[0].device if states else None
        counts = torch.tensor([self.samples, self.batches], device=device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=group)
        return ActivationProfile(layers, blocks, int(counts[0]), int(counts[1]), inputs, dict(self.heads))

    def state_dict(self) -> dict[str, Any]:
        """The profile as data: tensors, strings and numbers only."""
        return {
            "layers": {name: stats.state_dict() for name, stats in self.layers.items()},
            "blocks": {name: stats.state_dict() for name, stats in self.blocks.items()},
            "samples": self.samples,
            "batches": self.batches,
            "inputs": {name: stats.state_dict() for name, stats in self.inputs.items()},
            "heads": {name: heads.to_dict() for name, heads in self.heads.items()},
        }

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> ActivationProfile:
        """The inverse of :meth:`state_dict`.

        Raises:
            InvalidInputError: an entry is missing or malformed.
        """
        from .heads import AttentionHeads

        missing = {"layers", "blocks", "samples", "batches"} - state_dict.keys()
        if missing:
            raise InvalidInputError(f"the state dictionary lacks {', '.join(sorted(missing))}")
        return cls(
            {name: ChannelStats.from_state_dict(d) for name, d in state_dict["layers"].items()},
            {name: PairStats.from_state_dict(d) for name, d in state_dict["blocks"].items()},
            int(state_dict["samples"]),
            int(state_dict["batches"]),
            {name: ChannelStats.from_state_dict(d) for name, d in state_dict.get("inputs", {}).items()},
            {name: AttentionHeads.from_dict(d) for name, d in state_dict.get("heads", {}).items()},
        )

    def __repr__(self) -> str:
        return (
            f"ActivationProfile(layers={len(self.layers)}, blocks={len(self.blocks)}, "
            f"samples={self.samples}, batches={self.batches})"
        )


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    blocks: Sequence[str | Block] | None = None,
    inputs: Sequence[str] = (),
    heads: Mapping[str, AttentionHeads] | Sequence[AttentionHeads] | None = None,
    activation: str = "relu",
    backend: str = "auto",
    progress: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    fuse: bool | None = None,
    cuda_graph: bool = False,
) -> ActivationProfile:
    """Run the model over batches, once each, and keep the statistics of its layers and blocks.

    The model runs in evaluation mode without gradients. Its mode, its gradients and its hooks are left as
    they were, also when something raises.

    Args:
        model: any module; batches are moved to its device.
        batches: iterable of model inputs: a tensor, a tuple or list (positional arguments) or a mapping
            (keyword arguments). For batches of another form, such as ``(images, labels)``, give ``forward``.
        layers: names of the layers to measure; ``None`` for every convolution and linear layer, ``()`` for
            none. A convolution gives ``(B, C, *)``, a linear layer ``(B, *, C)``: one sample per item of the
            first dimension, every other dimension a position. ``(T, B, C)`` is known by its second dimension
            being the batch's size and its first no multiple of it.
        blocks: the blocks to measure, as :func:`idap.find_blocks` gives them, or names of modules that give
            what has the shape of their input; ``None`` for every removable block, found by running a copy of
            the model on one sample of the first batch; ``()`` for none. Of a unit, the input of its convolution
            is compared with the output of its last module; of a block that is cut out, all that it is given
            with the same and its output beside it, so that the change is its output's norm over theirs.
        inputs: names of layers whose inputs are measured too, without an activation; what mean compensation
            needs (:func:`idap.calibration.compensate`).
        heads: the attention heads to measure, as :func:`idap.heads.find_heads` gives them; ``None`` for those
            of every attention, found by running a copy of the model on one sample of the first batch (none if
            its channels cannot be followed, or with ``forward``); ``()`` for none.
        activation: the ``σ`` of the flow norm: ``relu``, ``identity``, ``gelu`` or ``silu``.
        backend: passed to the kernels; see :func:`idap_kernels.available_backends`.
        progress: show a progress bar on a terminal.
        forward: called as ``forward(model, batch)`` in place of ``model(batch)``.
        fuse: run a batch norm behind a measured layer, and from the second batch on the activation behind that,
            in the pass that takes the layer's statistics (:func:`idap_kernels.bn_act_stats`). Their results, and
            with them the statistics of later layers, differ from torch's own by rounding. Functions compiled by
            ``torch.compile`` within the model run eagerly meanwhile, and what other threads of the model do to its
            maps is not followed. ``None``: for models on a GPU, unless ``IDAP_FUSE=0`` is set; on a CPU it takes
            about as long as the passes that it saves.
        cuda_graph: capture the forward pass with all statistics once, and replay it for every further batch of
            the same shapes; for models on a GPU whose host is the bottleneck. The first batch or two run as usual,
            and so does a batch of other shapes. The model must do the same for every batch and never wait for a
            value: its Python code, ``forward`` and hooks of others do not run when it is replayed. The capture
            holds memory for a second set of activations.

    Raises:
        InvalidInputError: an unknown layer or block, a wrong activation or backend, batches of no known form,
            ``cuda_graph`` for a model that is not on a GPU.
        EmptyDataError: no batches, or one without samples.
        NonFiniteError: activations became NaN or infinite; names the layer and the batch.
        ForwardError: the model raised; names the batch, and has the model's own error as its cause.
        BackendUnavailable: the backend asked for cannot run here.
    """
    if activation not in ACTIVATION_CODES:
        raise InvalidInputError(f"activation is {activation!r}; known are {', '.join(ACTIVATION_CODES)}")
    check_backend_name(backend)
    _check_model(model)
    modules = dict(model.named_modules())
    scored = [name for name, module in modules.items() if is_scored(module)]
    layer_names = scored if layers is None else _known(layers, modules)
    input_names = _known(inputs, modules)
    unscored = [name for name in (*layer_names, *input_names) if name not in scored]
    if unscored:
        kind = type(modules[unscored[0]]).__name__
        raise InvalidInputError(
            f"layer {unscored[0]!r} is a {kind}; only convolutions and linear layers have filters to measure"
        )
    targets = None if blocks is None else _known_blocks(blocks, modules)
    # Without batch norms there is nothing to fuse, and torch is left as it is.
    norms = any(isinstance(module, nn.modules.batchnorm._NormBase) for module in modules.values())
    fuses = norms and (fuse if fuse is not None else _fuses_by_itself(model))
    recorder = _Recorder(activation, backend, NormFusion() if fuses else None)
    graphs = GraphedSteps(model, recorder) if cuda_graph else None
    iterator = iter(_iterable(batches))
    try:
        batch = next(iterator)
    except StopIteration:
        raise EmptyDataError("batches is empty: at least one batch is needed") from None
    batch = _inputs.without_inference(batch)
    if targets is None:
        targets = [_Target(b) for b in _discover_blocks(model, batch)] if forward is None else []
    if heads is not None:
        attention = _known_heads(heads, modules)
    else:
        attention = _discover_heads(model, batch) if forward is None else {}
    input_names = list(dict.fromkeys((*input_names, *(own.output.layer for own in attention.values()))))
    run = forward or _inputs.call
    index = 0
    with (
        torch.inference_mode(False),  # versions tell which blocks write into their input
        torch.no_grad(),
        _inputs.evaluating(model),
        _multihead.projections_called(model, input_names),
        recorder.attached(modules, layer_names, targets, input_names),
        _progress_bar(batches, progress) as advance,
    ):
        while True:
            recorder.begin(_batch_size(batch, forward is not None, index))
            try:
                moved = _inputs.to_model(batch, model)
                if graphs is not None:
                    graphs.run(lambda given: recorder.step(run, model, given), moved)
                else:
                    recorder.step(run, model, moved)
            except _Stop as stop:
                raise stop.error from stop.error.__cause__
            except Exception as error:
                raise ForwardError(_forward_message(model, batch, index, error)) from error
            recorder.end()
            index += 1
            advance()
            try:
                batch = _inputs.without_inference(next(iterator))
            except StopIteration:
                break
    result = recorder.result()
    result.heads = {name: own for name, own in attention.items() if own.output.layer in result.inputs}
    return result


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if hasattr(model, "_orig_mod"):
        raise InvalidInputError("model is compiled: hooks do not see its layers; pass model._orig_mod")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInputError(
            "model is a ScriptModule, whose layers take no hooks; pass the module it came from"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidInputError("model is on the meta device and has no weights; load it first")


def _fuses_by_itself(model: nn.Module) -> bool:
    device = _inputs.device_of(model)
    return device is not None and device.type == "cuda" and os.environ.get("IDAP_FUSE", "") != "0"


def _known(names: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    if isinstance(names, str):
        raise InvalidInputError(f"got the string {names!r} for a list of names: write [{names!r}]")
    unknown = [n for n in names if n not in modules]
    if unknown:
        raise InvalidInputError(f"the model has no module named {', '.join(map(repr, unknown[:5]))}")
    return list(names)


def _iterable(batches: Any) -> Iterable[Any]:
    if isinstance(batches, Tensor):
        raise InvalidInputError("batches is one tensor; it must be an iterable of batches: pass [tensor]")
    if isinstance(batches, Mapping):
        raise InvalidInputError("batches is one mapping; it must be an iterable of batches: pass [mapping]")
    if not isinstance(batches, Iterable):
        raise InvalidInputError(f"batches is a {type(batches).__name__}; it must be an iterable of batches")
    return batches


def _batch_size(batch: Any, custom: bool, index: int) -> int:
    if not custom:
        return _inputs.batch_size_of(batch)
    first = _inputs.first_tensor(batch)
    if first is not None and first.dim() > 0 and first.shape[0] == 0:
        raise EmptyDataError(f"batch {index} has no samples")
    return 0 if first is None or first.dim() == 0 else int(first.shape[0])


class _Target:
    """A block to measure: where it begins and ends, and whether it is compared with what it adds to."""

    def __init__(self, block: str | Block) -> None:
        self.name = self.first = self.last = block if isinstance(block, str) else block.name
        self.adds = False
        if not isinstance(block, str):
            self.last, self.adds = block.last, bool(block.channels)


def _known_blocks(blocks: Sequence[str | Block], modules: Mapping[str, nn.Module]) -> list[_Target]:
    from .layers import Block

    if isinstance(blocks, (str, Block)):
        raise InvalidInputError(f"blocks: got one {type(blocks).__name__}, wanted a list of blocks or names")
    targets = [_Target(block) for block in blocks]
    _known([name for target in targets for name in (target.first, target.last)], modules)
    return targets


def _discover_blocks(model: nn.Module, batch: Any) -> list[Block]:
    from .layers import find_blocks

    try:
        return find_blocks(model, _one_sample(batch))
    except InvalidInputError:
        raise
    except Exception as error:
        raise ForwardError(_forward_message(model, batch, 0, error)) from error


def _known_heads(heads: Any, modules: Mapping[str, nn.Module]) -> dict[str, AttentionHeads]:
    from .heads import AttentionHeads

    given = list(heads.values() if isinstance(heads, Mapping) else heads)
    bad = next((own for own in given if not isinstance(own, AttentionHeads)), None)
    if bad is not None:
        raise InvalidInputError(
            f"heads: got {type(bad).__name__}, wanted what idap.heads.find_heads(model, scan) gives"
        )
    _known([name for own in given for name in (own.name, own.output.layer)], modules)
    return {own.name: own for own in given}


def _discover_heads(model: nn.Module, batch: Any) -> dict[str, AttentionHeads]:
    from .adapters.attention import attention_modules
    from .groups import find_groups
    from .heads import find_heads

    if not attention_modules(model):
        return {}
    try:
        return find_heads(model, find_groups(model, _one_sample(batch)))
    except GraphError:
        return {}  # the pass itself tells what is wrong with the model, if anything is


def _one_sample(batch: Any) -> Any:
    if (images := _inputs.images_of(batch)) is not None:
        return ([images[0]],)  # what comes with them, such as targets, is of no use in evaluation mode
    size = _inputs.batch_size_of(batch)
    return _inputs.map_tensors(batch, lambda t: t[:1] if t.dim() > 0 and t.shape[0] == size else t)


def _forward_message(model: nn.Module, batch: Any, index: int, error: Exception) -> str:
    message = f"{type(model).__name__} raised {type(error).__name__} on batch {index}: {error}"
    if isinstance(batch, (tuple, list)) and isinstance(error, TypeError):
        message += (
            f". The batch is a {type(batch).__name__} of {len(batch)}, and its items were passed as positional "
            "arguments; for batches such as (images, labels) give forward=lambda model, batch: model(batch[0])"
        )
    return message


@contextmanager
def _progress_bar(batches: Any, shown: bool) -> Iterator[Callable[[], None]]:
    if not (shown and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    try:
        total = len(batches)
    except TypeError:
        total = None
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("profile", total=total)
        yield lambda: bar.advance(task)


class _Recorder:
    """The hooks and what they have gathered."""

    def __init__(self, activation: str, backend: str, fusion: NormFusion | None):
        self.activation = activation
        self.backend = backend
        self.fusion = fusion
        self.order: dict[str, None] = {}  # layers as they are called
        self.fusing: dict[tuple[torch.device, torch.dtype, int], bool] = {}
        self.layers: dict[str, ChannelStats] = {}
        self.blocks: dict[str, list[PairStats]] = {}
        self.inputs: dict[str, ChannelStats] = {}
        self.samples = 0
        self.batches = 0
        self.batch_size = 0
        # Inputs of the blocks that are running now; a block that writes into its input is given a copy.
        self.pending: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
        self.writes_input: set[str] = set()
        self.finite: list[Tensor] = []

    @contextmanager
    def attached(
        self,
        modules: Mapping[str, nn.Module],
        layers: Sequence[str],
        blocks: Sequence[_Target],
        inputs: Sequence[str],
    ) -> Iterator[None]:
        handles = []
        try:
            for name in layers:
                handles.append(modules[name].register_forward_hook(self.layer_hook(name, modules[name])))
            for name in inputs:
                hook = self.input_hook(name, modules[name])
                handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
            for block in blocks:
                before, after = self.added_hooks(block.name) if block.adds else self.block_hooks(block.name)
                handles.append(modules[block.first].register_forward_pre_hook(before, with_kwargs=True))
                handles.append(modules[block.last].register_forward_hook(after, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.pending.clear()

    def sequence_first(self, y: Tensor) -> bool:
        """Whether a tensor is (T, B, C). Windows of a batch, (B·W, T, C), are not, whatever their T."""
        return y.dim() == 3 and y.shape[1] == self.batch_size and y.shape[0] % self.batch_size != 0

    def step(self, run: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any) -> None:
        """The forward pass with its statistics, and whether they are finite."""
        with self.fusion.batch() if self.fusion is not None else nullcontext():
            run(model, batch)
        self.note_finite()

    def layer_hook(self, name: str, module: nn.Module) -> Callable[..., None]:
        measure = self.measure(name, module, self.layers, self.activation)
        fused = self.fused(name)
        weight = module.weight
        # What a batch norm takes as it is: (B, C, *) of a convolution, (B, C) of a linear layer.
        rank = weight.dim() if isinstance(weight, Tensor) else 2

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            y = _inputs.first_tensor(output)
            self.order.setdefault(name)
            if self.fusion is not None and y is not None and y.dim() == rank and self.fuses(y):
                self.fusion.wait(name, y, measure, fused)
            else:
                measure(y)

        return hook

    def fuses(self, y: Tensor) -> bool:
        """Whether a kernel fuses: the reference, in several passes and float64, would only cost more."""
        key = y.device, y.dtype, y.dim()
        if key not in self.fusing:
            try:
                self.fusing[key] = select(y, self.backend) is not backend_module("reference")
            except IdapError:
                self.fusing[key] = False
        return self.fusing[key] and y.numel() > 0

    def fused(self, name: str) -> Callable[[Tensor, dict[str, Any]], Tensor]:
        """A function that adds the output of a layer to its statistics and gives it behind its batch norm."""
        known: tuple[Any, tuple[Tensor | None, ...], BatchNorm | None] = None, (), None

        def prepare(y: Tensor, parameters: tuple[Tensor | None, ...], eps: float) -> BatchNorm | None:
            nonlocal known
            states = [None if t is None else (id(t), t.data_ptr(), _version(t)) for t in parameters]
            key = (y.device, eps, states)
            if known[0] != key:
                known = key, parameters, prepared(y, parameters, eps)
            return known[2]

        def add(y: Tensor, norm: dict[str, Any]) -> Tensor:
            stats = self.layers.get(name)
            try:
                if stats is not None and stats.state.device == y.device and is_plain(y):
                    # From the second batch on, what was checked stays checked: the host is to keep ahead.
                    mean, var, weight, bias, eps, act = norm.values()
                    ready = prepare(y, (mean, var, weight, bias), eps)
                    if ready is not None:
                        return fused_pass(
                            y, ready, act, 1, 0, self.activation, self.backend, stats.state, True
                        )
                z, self.layers[name] = bn_act_stats(
                    y, **norm, activation=self.activation, out=stats, backend=self.backend
                )
            except Exception as error:
                raise _Stop(error) from error
            return z

        return add

    def input_hook(self, name: str, module: nn.Module) -> Callable[..., None]:
        measure = self.measure(name, module, self.inputs, "identity")

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            measure(_inputs.first_tensor((args, kwargs)))

        return hook

    def measure(
        self, name: str, module: nn.Module, into: dict[str, ChannelStats], activation: str
    ) -> Callable[[Tensor | None], None]:
        """A function that adds one tensor, an input or an output of the layer, to its statistics."""
        convolution = isinstance(module, CONVOLUTIONS)
        weight = module.weight
        rank = weight.dim() if convolution and isinstance(weight, Tensor) else 2

        def add(y: Tensor | None) -> None:
            if y is None or y.numel() == 0:
                return
            if y.dim() < rank:
                y = y[None]  # an unbatched call is one sample
            sample_dim = 0
            if not convolution and self.sequence_first(y):
                sample_dim = 1
            try:
                into[name] = channel_stats(
                    y,
                    channel_dim=1 if convolution else -1,
                    sample_dim=sample_dim,
                    activation=activation,
                    out=into.get(name),
                    backend=self.backend,
                )
            except Exception as error:
                raise _Stop(error) from error

        return add

    def block_hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = _inputs.first_tensor((args, kwargs))
            if x is not None:
                # In the first batch every input is copied, to see which blocks write into theirs.
                # So is an inference tensor, whose changes torch does not count.
                keep = self.batches == 0 or name in self.writes_input or x.is_inference()
                version = -1 if x.is_inference() else x._version
                self.pending.setdefault(name, []).append((x.clone() if keep else x, x, version))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stack = self.pending.get(name)
            y = _inputs.first_tensor(output)
            if not stack or y is None:
                return
            kept, x, version = stack.pop()
            if version >= 0 and x._version != version:
                self.writes_input.add(name)
            if y.shape != kept.shape:
                shapes = f"takes {tuple(kept.shape)} and gives {tuple(y.shape)}"
                raise _Stop(InvalidInputError(f"block {name!r} {shapes}: there is no difference to measure"))
            if self.sequence_first(kept):
                kept, y = kept.transpose(0, 1), y.transpose(0, 1)
            try:
                stats = pair_stats(kept, y.to(kept.dtype), backend=self.backend)
            except Exception as error:
                raise _Stop(error) from error
            self.blocks.setdefault(name, []).append(stats)

        return before, after

    def added_hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """Of a block whose output goes beside what it is given: with zeros in its place, and with it."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [tensor for _, tensor in _inputs.named_tensors((args, kwargs)) if tensor.dim() > 1]
            if given:
                x = torch.cat([tensor.flatten(1) for tensor in given], 1)
                self.pending.setdefault(name, []).append((x, x, -1))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stack, made = self.pending.get(name), _inputs.first_tensor(output)
            if not stack or made is None:
                return
            x, y = stack.pop()[0], made.flatten(1)
            try:
                pair = torch.cat([x, torch.zeros_like(y)], 1), torch.cat([x, y], 1)
                stats = pair_stats(*pair, backend=self.backend)
            except Exception as error:
                raise _Stop(error) from error
            self.blocks.setdefault(name, []).append(stats)

        return before, after

    def names(self) -> set[str]:
        """The layers and blocks that have statistics."""
        return self.layers.keys() | self.inputs.keys() | self.blocks.keys()

    def note_finite(self) -> None:
        """Note whether every statistic is finite; on a GPU nothing waits for the answer."""
        if not self.layers:
            return
        # The sums are infinite or NaN once a value was, or its square.
        sums: dict[torch.device, list[Tensor]] = {}
        for stats in self.layers.values():
            sums.setdefault(stats.state.device, []).append(stats.state[_SUMS].flatten())
        flags = [torch.cat(parts).isfinite().all() for parts in sums.values()]
        self.finite.append(torch.stack([flag.to(flags[0].device) for flag in flags]).all())

    def end(self) -> None:
        """Close a batch: count it, and stop at statistics that are not finite."""
        self.samples += self.batch_size
        self.batches += 1
        self.pending.clear()
        if self.finite and self.finite[-1].device.type == "cpu" and not self.finite[-1]:
            self.check_finite()

    def check_finite(self) -> None:
        if not self.finite or bool(torch.stack(self.finite).all()):
            return
        batch = next(i for i, finite in enumerate(self.finite) if not finite)
        called = (name for name in self.order if name in self.layers)
        name = next(n for n in called if not self.layers[n].state[_SUMS].isfinite().all())
        raise NonFiniteError(
            f"the output of layer {name!r}, or its square, became NaN or infinite in batch {batch}: look at the "
            "inputs and weights; in float16, try bfloat16 or float32"
        )

    def result(self) -> ActivationProfile:
        self.check_finite()
        blocks = {
            name: PairStats(torch.cat([part.state for part in parts], dim=1))
            for name, parts in self.blocks.items()
        }
        layers = {name: self.layers[name] for name in self.order if name in self.layers}
        return ActivationProfile(layers, blocks, self.samples, self.batches, dict(self.inputs))


__all__ = ["ActivationProfile", "Inputs", "is_scored", "profile"]
