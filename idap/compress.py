"""Both stages of IDAP++ under one error budget: filters first, then whole blocks, then a last fine-tuning."""

from __future__ import annotations

import copy
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.util import find_spec
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from . import calibration, distributed
from .adapters import detection
from .complexity import count_macs, count_params
from .criteria import flow_divergence, layer_divergence
from .errors import ArtifactError, EmptyDataError, InvalidInputError, TargetUnreachableError, TrainingError
from .filters import prune_filters
from .groups import GroupScan, Ignore, Skipped, find_groups, is_head_group, resolve_ignore
from .heads import find_heads
from .inputs import call, device_of, evaluating, map_tensors, outputs_of, to_model
from .latency import compare_latency, layer_times, measure_latency
from .layers import ProjectionFit, block_filter_divergence, find_blocks, truncate_layers
from .plan import ChannelStep, Cost, PruningPlan
from .profile import ActivationProfile, profile
from .rundir import Journal, RunDirectory, fingerprint

STAGES = ("filters", "layers")
TARGETS = ("macs", "params", "latency")
_NAMES = {"macs": "MACs", "params": "parameters", "latency": "latency"}
_TARGET_REACHED = "target reached"
_SHARE_DONE = "its share of the way to the target is done"

_SIGNATURES = {
    "finetune": " of the model, such as lambda model: idap.finetune(model, batches, epochs=2), or None",
    "final_finetune": " of the model, such as lambda model: idap.finetune(model, batches, epochs=2), or None",
    "criterion": " of model and profile, such as idap.flow_divergence",
    "on_stage": " of the stage's name and the model, or None",
    "progress": " of a StepRecord, True or False",
}

Criterion = Callable[[nn.Module, ActivationProfile], dict[str, Tensor]]
Finetune = Callable[[nn.Module], Any]
T = TypeVar("T")


@dataclass(frozen=True)
class StepRecord:
    """One try of a stage: what was done, what came out, and whether it was kept.

    ``seconds`` is all the time since the record before: profile, plan, surgery, training and evaluation.
    Where the training failed (``note`` says how), ``metric`` and ``drift`` are NaN.
    """

    stage: str  # "base", "filters", "layers" or "final"
    action: str
    accepted: bool
    params: int
    macs: int
    metric: float
    drift: float
    seconds: float
    note: str = ""
    latency: float | None = None  # milliseconds a batch of the example's size; only where it is a target

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON holds it; numbers that are not finite become None."""
        return {key: _json_number(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepRecord:
        """The inverse of :meth:`to_dict`: a metric or drift of None becomes NaN.

        Raises:
            InvalidInputError: an entry is missing or unknown.
        """
        values = dict(data)
        for name in ("metric", "drift"):
            if values.get(name) is None:
                values[name] = math.nan
        try:
            return cls(**values)
        except TypeError as error:
            known = sorted(f.name for f in fields(cls))
            raise InvalidInputError(f"not the record of a step ({error}); it has {known}") from error


@dataclass(frozen=True)
class CompressionResult:
    """The smallest model that kept within the budget, and how it was found.

    ``plan`` replays the structure on a fresh original (:meth:`PruningPlan.apply`); the fine-tuned weights are
    those of ``model``, which is in eval mode. ``history`` begins with the record of the original model (stage
    ``"base"``).
    """

    model: nn.Module = field(repr=False)
    plan: PruningPlan = field(repr=False)
    history: tuple[StepRecord, ...] = field(repr=False)
    params: int
    macs: int
    metric: float
    drift: float
    budget: float
    target: dict[str, float]  # counts and milliseconds, whatever form it was given in
    reached_target: bool
    stopped: dict[str, str]  # why each stage ended
    latency: float | None = None

    @property
    def baseline(self) -> StepRecord:
        return self.history[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as JSON holds it; numbers that are not finite become None."""
        return {
            "baseline": self.baseline.to_dict(),
            "params": self.params,
            "macs": self.macs,
            "metric": self.metric,
            "drift": _json_number(self.drift),
            "latency_ms": self.latency,
            "budget": self.budget,
            "target": self.target,
            "reached_target": self.reached_target,
            "stopped": self.stopped,
            "history": [step.to_dict() for step in self.history],
            "plan": self.plan.to_dict(),
        }


def compress(
    model: nn.Module,
    data: Iterable[Any],
    *,
    evaluate: Callable[[nn.Module], float],
    finetune: Finetune | None = None,
    final_finetune: Finetune | bool | None = None,
    target: Mapping[str, float] | None = None,
    budget: float = 0.05,
    stages: Sequence[str] = STAGES,
    steps: int = 20,
    initial_ratio: float = 0.10,
    alpha: float = 1.5,
    halvings: int = 2,
    first_share: float = 0.7,
    max_blocks: int | None = None,
    example_inputs: Any = None,
    validation: Iterable[Any] | None = None,
    criterion: Criterion = flow_divergence,
    scope: str = "global",
    normalize: str | None = "mean",
    reduction: str = "mean",
    by_latency: bool = False,
    round_to: int = 8,
    min_width: int = 1,
    ignore: Ignore = (),
    heads: bool = True,
    compensate: bool = True,
    recalibrate: bool = True,
    project: bool = True,
    backend: str = "auto",
    seed: int = 0,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | Callable[[StepRecord], None] = True,
    on_stage: Callable[[str, nn.Module], None] | None = None,
) -> CompressionResult:
    """Prune filters, then remove blocks, fine-tuning after every step, while the metric keeps the budget.

    Stage ``"filters"``: step ``t`` of ``T = steps`` profiles the current model, scores its filters and
    attention heads with ``criterion`` and removes the share ``initial_ratio * (1 + t / T) ** alpha`` of what
    is left. A step after which the metric has fallen by more than the budget is undone and tried again with
    half the share, ``halvings`` times in a row at most.

    Stage ``"layers"``: removable blocks are ranked by block divergence, the lowest is replaced by the
    identity, or cut out with its channels if they are only concatenated to others (DenseNet), and the change
    is kept if the metric stays within the budget; otherwise the block is put back and marked essential. Blocks
    that change the shape, and units of plain stacks (VGG), come last, by the mean divergence of their filters,
    and get a projection fitted by least squares. The divergences are computed anew after every removal that
    was kept.

    After every surgery, before the fine-tuning, the next layers' biases take over what the removed channels
    gave on average (``compensate``), and the statistics of the batch norms are estimated anew
    (``recalibrate``).

    Both stages share one budget and one target. While another stage follows, the first may use the share
    ``first_share`` of the budget and of the way to the target. If the target is still out of reach at the
    end, the first stage goes on with all that is left. ``final_finetune`` then runs once; its result is
    undone if the metric is lower than before it and lower than that of the original.

    With ``torch.distributed`` initialised every process calls this alike: each profiles its share of
    ``data``, the statistics are merged, rank 0 decides, and only rank 0 writes.

    Args:
        model: left as it is; all work is done on copies.
        data: what the profile reads: a re-iterable of model inputs (tensors, tuples of positional
            arguments, or dicts of keyword arguments), without targets. It is read several times a step; the
            same data each time makes a run repeatable.
        evaluate: gets a model in eval mode and returns a finite number, larger is better.
        finetune: trains the model in place after every step, or returns the trained one (anything returned
            that is no module is ignored); :func:`idap.training.finetune` does for both.
        final_finetune: the last training; ``finetune`` if not given, none with False.
        target: ``{"macs": x}``, ``{"params": x}``, ``{"latency": x}`` or several of them, where ``x`` up to 1
            is a fraction of the original and above 1 an absolute number: multiply-accumulates, parameters,
            milliseconds of a forward pass on ``example_inputs``, measured in turns with the original's.
            Without a target the stages go on until the budget or their steps are used up.
        budget: by how much the metric may fall, in the metric's own units.
        stages: the stages in their order, or one of them alone.
        max_blocks: how many blocks the second stage may remove; no limit if not given.
        example_inputs: one input for tracing, counting and timing; the first sample of the first batch if not
            given.
        validation: batches of model inputs on which the drift is measured; ``data`` if not given.
        criterion: function of ``(model, profile)`` giving scores per layer, such as
            :func:`idap.flow_divergence`.
        scope: ``"global"`` ranks all groups together, ``"local"`` takes the same share of each.
        normalize, reduction: how the scores of coupled layers become those of a group, and groups comparable;
            see :func:`idap.prune_filters`.
        by_latency: rank filters by score per millisecond that they take, from times of the layers measured at
            every step (:func:`idap.layer_times`), so that what is slow and carries little goes first. The
            decisions, and so the result, then depend on the machine.
        round_to: widths left are multiples of it.
        min_width: channels that every layer keeps at least.
        ignore: layers whose width must stay, and blocks that must not be removed: names, patterns, classes or
            modules, as in :func:`idap.prune_filters`.
        heads: whether attention heads are pruned too.
        compensate: whether biases take over the mean of what goes.
        recalibrate: whether batch norms get new running statistics after each surgery.
        project: whether blocks that change the shape may be replaced by a projection, and units are; without
            it the identity takes the place of units that keep the shape.
        seed: seeds torch, numpy and random before every training; the caller's random states are put back
            afterwards.
        directory: where the run is kept: every decision as it falls, the model accepted last, and at the end
            the pruned model (``model/``, for :func:`idap.load`) and ``result.json``.
        resume: go on with the run in ``directory``, if there is one, from where it was interrupted. With a
            repeatable ``finetune`` it ends at the same model.
        progress: True prints a line a step; a function gets each new :class:`StepRecord` instead.
        on_stage: called with ``"filters"``, ``"layers"`` or ``"final"`` and the model kept at the end of that
            stage, which must not be changed; after the final training only if its result was kept. In a run
            that was resumed it has been called for the stages that were over before.

    Raises:
        InvalidInputError: an argument is wrong, ``data`` cannot be read more than once or holds nothing,
            ``evaluate`` returns something else than a finite number.
        ArtifactError: ``directory`` cannot be written or read, holds something else, or a run with another
            model or other settings.
    """
    if not isinstance(model, nn.Module) or not callable(evaluate):
        raise InvalidInputError(
            f"got model of type {type(model).__name__} and evaluate of type {type(evaluate).__name__}, "
            "wanted a torch.nn.Module and a function"
        )
    for name, function in (
        ("finetune", finetune),
        ("final_finetune", final_finetune),
        ("criterion", criterion),
        ("on_stage", on_stage),
        ("progress", progress),
    ):
        optional = function is None or (
            isinstance(function, bool) and (name == "progress" or (name == "final_finetune" and not function))
        )
        if not callable(function) and not (optional and name != "criterion"):
            raise InvalidInputError(f"{name}: got {function!r}, wanted a function{_SIGNATURES.get(name, '')}")
    _check_settings(budget, steps, initial_ratio, alpha, halvings, stages, first_share, max_blocks)
    _check_target(target)
    if resume and directory is None:
        raise InvalidInputError("resume=True needs the directory of the run to go on with")
    first = _first_batch(data, "data")
    check = first if validation is None else _first_batch(validation, "validation")
    processes = distributed.world()[1]
    if processes > 1 and isinstance(data, Sized) and len(data) < processes:
        raise InvalidInputError(
            f"data holds {len(data)} batches for {processes} processes: every one needs at least one; make the "
            "batches smaller"
        )
    if example_inputs is None:
        example_inputs = _first_sample(first)
    example_inputs = to_model(example_inputs, model)
    last = finetune if final_finetune is None else final_finetune
    last = last if callable(last) else None
    report = progress if callable(progress) else (lambda record: None)
    if progress is True and distributed.world()[0] == 0:
        report = _printer()

    with _random_states(device_of(model)):
        start = time.perf_counter()
        original = copy.deepcopy(model).eval()
        for name, batch in {"data": first, "validation": check}.items():
            try:
                with torch.no_grad():
                    call(original, to_model(batch, original))
            except Exception as error:
                raise InvalidInputError(
                    f"{name}: the model cannot run on the first batch, a {_describe(batch)}: {error}. Batches "
                    "hold model inputs alone; for a loader of (input, target) pairs pass [x for x, _ in loader]"
                ) from error
        options = _Options(
            data=data,
            validation=data if validation is None else validation,
            evaluate=evaluate,
            finetune=finetune,
            example_inputs=example_inputs,
            budget=float(budget),
            steps=steps,
            initial_ratio=initial_ratio,
            alpha=alpha,
            halvings=halvings,
            max_blocks=max_blocks,
            first_share=first_share,
            ignored=resolve_ignore(original, ignore),
            criterion=criterion,
            scope=scope,
            normalize=normalize,
            reduction=reduction,
            by_latency=by_latency,
            round_to=round_to,
            min_width=min_width,
            heads=heads,
            compensate=compensate,
            recalibrate=recalibrate,
            project=project,
            backend=backend,
            seed=seed,
        )
        journal = Journal()
        with ExitStack() as stack:
            if directory is not None:
                settings = options.settings(original, stages, target, last)
                journal = RunDirectory(directory, settings, resume=resume)
                stack.callback(journal.close)
                report = _also_to_tensorboard(report, journal, stack)
            run = _Run(original, options, journal, report)
            run.begin(target, start)
            run.stages(tuple(stages), on_stage)
            run.finish(last)
            if run.current.stage == "final":
                run.end_of("final", on_stage)
            result = run.result()
            if isinstance(journal, RunDirectory):
                journal.finish(result, run.report(result))
            distributed.wait()
    return result


@torch.no_grad()
def drift(original: nn.Module, pruned: nn.Module, batches: Iterable[Any]) -> float:
    """``sum ||N0(x) - N*(x)||^2 / sum ||N0(x)||^2`` over the batches: the left side of the paper's bound.

    Both models run in eval mode, which is put back; outputs are compared in float64. Of an output with
    several tensors, all that float are taken. Of a detector that selects boxes, it is what the heads of both
    say before that, of the regions that the original looks into.

    Raises:
        EmptyDataError: there is no batch.
        InvalidInputError: the outputs of the two models differ in shape.
    """
    return _ratio(*_differences(original, pruned, batches))


def _differences(original: nn.Module, pruned: nn.Module, batches: Iterable[Any]) -> tuple[float, float, int]:
    """The two sums of the drift, and the number of batches."""
    difference = scale = 0.0
    count = 0
    with evaluating(original), evaluating(pruned), torch.no_grad():
        for batch in batches:
            count += 1
            wanted = _outputs(original, batch)
            with detection.same_regions(pruned, wanted):
                got = _outputs(pruned, batch)
            selected = detection.selections(wanted)
            wanted, got = ([own for own in side if own[0] not in selected] for side in (wanted, got))
            shapes = [[tuple(t.shape) for _, t in tensors] for tensors in (wanted, got)]
            if shapes[0] != shapes[1]:
                raise InvalidInputError(
                    f"the outputs differ in shape: original {shapes[0]}, pruned {shapes[1]}"
                )
            for (_, a), (_, b) in zip(wanted, got, strict=True):
                difference += float((a.double() - b.to(a.device).double()).square().sum())
                scale += float(a.double().square().sum())
    return difference, scale, count


def _ratio(difference: float, scale: float, count: float) -> float:
    if not count:
        raise EmptyDataError("there is no batch to measure the drift on")
    if scale == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / scale


@dataclass(frozen=True)
class _Options:
    """What a run was asked for."""

    data: Iterable[Any]
    validation: Iterable[Any]
    evaluate: Callable[[nn.Module], float]
    finetune: Finetune | None
    example_inputs: Any
    budget: float
    steps: int
    initial_ratio: float
    alpha: float
    halvings: int
    max_blocks: int | None
    first_share: float
    ignored: set[str]
    criterion: Criterion
    scope: str
    normalize: str | None
    reduction: str
    by_latency: bool
    round_to: int
    min_width: int
    heads: bool
    compensate: bool
    recalibrate: bool
    project: bool
    backend: str
    seed: int

    def settings(
        self,
        original: nn.Module,
        stages: Sequence[str],
        target: Mapping[str, float] | None,
        final_finetune: Finetune | None,
    ) -> dict[str, Any]:
        """All that the outcome depends on, as JSON data; functions are known by whether they are there."""
        left_out = ("data", "validation", "evaluate", "finetune", "example_inputs", "criterion", "backend")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        if not self.by_latency:
            del plain["by_latency"]  # runs that began before there was a choice go on
        name = getattr(self.criterion, "__qualname__", type(self.criterion).__name__)
        return plain | {
            "model": f"{type(original).__name__} {fingerprint(original)[:16]}",
            "stages": list(stages),
            "target": dict(target or {}),
            "ignored": sorted(self.ignored),
            "criterion": name,
            "finetune": self.finetune is not None,
            "final_finetune": final_finetune is not None,
            "processes": distributed.world()[1],
        }


class _Run:
    """The state of one call of :func:`compress`: the model kept so far, and how it came about.

    The course of a run depends on nothing but the values that went through ``journal``, so that a run that
    was interrupted gets to the same point without computing anything.
    """

    def __init__(
        self,
        original: nn.Module,
        options: _Options,
        journal: Journal,
        report: Callable[[StepRecord], None],
    ) -> None:
        self.original = original
        self.options = options
        self.journal = journal
        self.report_step = report
        self.plan = PruningPlan(type(original).__name__)
        self.history: list[StepRecord] = []
        self.stopped: dict[str, str] = {}
        self.target: dict[str, float] = {}
        self.clock = time.perf_counter()
        self._model: nn.Module | None = original
        self._checkpoint: Mapping[str, Any] | None = None
        self._scan: GroupScan | None = None
        self._measured: tuple[dict[str, Tensor], ActivationProfile] | None = None

    # ----------------------------------------------------------------------------------- the model

    @property
    def current(self) -> StepRecord:
        """The record of the model kept so far."""
        return next(record for record in reversed(self.history) if record.accepted)

    @property
    def model(self) -> nn.Module:
        """The model kept so far; after an interruption it comes from the directory, once it is needed."""
        if self._model is None:
            assert isinstance(self.journal, RunDirectory)
            assert self._checkpoint is not None
            if self.journal.leads:
                self._model = self.journal.restore(self._checkpoint, self.original, device_of(self.original))
            else:
                self._model = self.plan.apply(self.original)
            distributed.same_weights(self._model)
            parameters = list(self._model.parameters())
            flags = distributed.from_first([parameter.requires_grad for parameter in parameters])
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
        return self._model

    def _accept(self, model: nn.Module | None, plan: PruningPlan | None) -> None:
        self._model, self._scan, self._measured = model, None, None
        if plan is not None:
            self.plan = self.plan + plan

    def begin(self, target: Mapping[str, float] | None, start: float) -> None:
        """The record of the original, and the target in absolute numbers."""
        original, options = self.original, self.options

        def base() -> StepRecord:
            params, macs = count_params(original), count_macs(original, options.example_inputs)
            metric = _evaluate(options.evaluate, original)
            latency = None
            if target is not None and "latency" in target and distributed.world()[0] == 0:
                latency = measure_latency(original, options.example_inputs, warmup=3, runs=20).median
            seconds = time.perf_counter() - start
            return StepRecord("base", "original", True, params, macs, metric, 0.0, seconds, latency=latency)

        self._record(base, None, None)
        record = self.history[0]
        if record.metric > 0 and options.budget >= record.metric:
            raise InvalidInputError(
                f"the budget {options.budget:g} allows the metric to fall from {record.metric:g} to nothing; it "
                "is counted in the metric's own units, so give 0.05 for five points of an accuracy between 0 "
                "and 1"
            )
        for name, value in (target or {}).items():
            absolute = float(value) * getattr(record, name) if value <= 1 else float(value)
            self.target[name] = absolute if name == "latency" else int(absolute)
        cost = Cost(record.params, record.macs)
        self.plan = PruningPlan(type(original).__name__, before=cost, after=cost)

    def _profile(self, model: nn.Module, **what: Any) -> ActivationProfile:
        """A profile of all the data, the same on every process."""
        own = distributed.shard(self.options.data)
        self._same_draws()
        stats = profile(model, own, backend=self.options.backend, progress=False, **what)
        return stats.all_reduce() if distributed.world()[1] > 1 else stats

    def _same_draws(self) -> None:
        """What reads the data next draws the same numbers on every process, and after an interruption."""
        _seed(self.options.seed)

    # ----------------------------------------------------------------------------------- the course

    def stages(self, names: tuple[str, ...], on_stage: Callable[[str, nn.Module], None] | None) -> None:
        """Every stage in its turn."""
        turns = [(name, 1.0) for name in names]
        if len(names) > 1 and self.journal.decide("blocks", self._has_blocks):
            turns[0] = (names[0], self.options.first_share)
            # A second turn for the first stage, for what the other one has left of the way and of the budget.
            turns.append((names[0], 1.0))
        for turn, (name, share) in enumerate(turns):
            if self.reached(1.0):
                self.stopped.setdefault(name, "the target was reached before")
                continue
            before = self.current
            self.stopped[name] = self._filters(share) if name == "filters" else self._layers(share)
            is_repeat = turn >= len(names)
            if not (is_repeat and self.current is before):
                self.end_of(name, on_stage)

    def end_of(self, name: str, on_stage: Callable[[str, nn.Module], None] | None) -> None:
        """Tell of the end of a stage, once over all processes that worked on the run."""

        def tell() -> str:
            if on_stage is not None:
                on_stage(name, self.model)
            return name

        self.journal.decide("stage", tell)

    def finish(self, finetune: Finetune | None) -> None:
        """The last fine-tuning: undone if the metric falls by it, to below the original's."""
        if finetune is None or self.current is self.history[0]:
            return
        # Among many steps one is lucky: to beat the original as well is not asked of the last.
        floor = min(self.current.metric, self.history[0].metric)
        self._try("final", "fine-tune", lambda: copy.deepcopy(self.model), None, finetune, floor)

    def reached(self, share: float) -> bool:
        return bool(self.target) and all(
            getattr(self.current, name) <= self._goal(name, share) for name in self.target
        )

    def _goal(self, name: str, share: float) -> float:
        full = getattr(self.history[0], name)
        return float(full - share * (full - self.target[name]))

    def _floor(self, share: float) -> float:
        return self.history[0].metric - share * self.options.budget

    # ----------------------------------------------------------------------------- stage 1: filters

    def _filters(self, share: float) -> str:
        options = self.options
        scale, failures, t = 1.0, 0, 0
        rejected: list[tuple[Any, ...]] = []
        while t < options.steps:
            if self.reached(share):
                return _TARGET_REACHED if share == 1 else _SHARE_DONE
            ratio = min(options.initial_ratio * (1 + t / options.steps) ** options.alpha * scale, 0.95)
            decision = self.journal.decide("plan", partial(self._decide_filters, ratio, share))
            if decision["plan"] is None:
                return str(decision["action"])
            plan = self._read_back(PruningPlan.from_dict, decision["plan"])
            # Coarse widths can make a smaller ratio the same plan; it need not be trained twice.
            if plan.steps not in rejected and self._try(
                "filters",
                decision["action"],
                partial(self._without_filters, plan),
                plan,
                options.finetune,
                self._floor(share),
            ):
                failures, t = 0, t + 1
                rejected.clear()
                continue
            rejected.append(plan.steps)
            failures += 1
            scale /= 2
            if failures > options.halvings:
                return f"{failures} steps in a row went beyond the budget"
        return "all steps were taken"

    def _groups(self) -> GroupScan:
        """The coupled channels of the model kept so far, found once."""
        if self._scan is None:
            scan = find_groups(self.model, self.options.example_inputs, ignore=self._ignored())
            if not self.options.heads:
                units = [group for group in scan.groups if is_head_group(group)]
                scan = GroupScan(
                    [group for group in scan.groups if not is_head_group(group)],
                    [
                        *scan.skipped,
                        *(Skipped(g.root, g.size, "attention heads: heads=False") for g in units),
                    ],
                )
            self._scan = scan
        return self._scan

    def _scores(self) -> tuple[dict[str, Tensor], ActivationProfile]:
        """Scores of the model kept so far, and the profile that they come from."""
        if self._measured is None:
            readers = {
                member.layer: None
                for group in self._groups().groups
                for member in group.members
                if member.kind in ("conv_in", "linear_in")
            }
            stats = self._profile(
                self.model,
                blocks=(),
                inputs=tuple(readers) if self.options.compensate else (),
                heads=find_heads(self.model, self._groups()),
            )
            self._measured = self.options.criterion(self.model, stats), stats
        return self._measured

    def _decide_filters(self, ratio: float, share: float) -> dict[str, Any]:
        plan, action = self._plan_filters(ratio, share)
        return {"plan": None if plan is None else plan.to_dict(), "action": action}

    def _plan_filters(self, ratio: float, share: float) -> tuple[PruningPlan | None, str]:
        """The plan that removes ``ratio`` of the filters, or just enough for the target; None if none can go.

        A ratio that the widths do not allow is halved if it is too much, and doubled if it comes to nothing.
        """
        options, scan = self.options, self._groups()
        if not scan.groups:
            return None, _nothing_to_prune(scan)
        scores, _ = self._scores()
        times = layer_times(self.model, options.example_inputs) if options.by_latency else None

        def plan_for(**goal: Any) -> PruningPlan | None:
            try:
                return prune_filters(
                    self.model,
                    scores,
                    options.example_inputs,
                    scope=options.scope,
                    normalize=options.normalize,
                    reduction=options.reduction,
                    round_to=options.round_to,
                    min_width=options.min_width,
                    groups=scan,
                    times=times,
                    **goal,
                )
            except TargetUnreachableError:
                return None

        plan = plan_for(ratio=ratio)
        while plan is None and ratio > 1e-3:
            ratio /= 2
            plan = plan_for(ratio=ratio)
        while plan is not None and not plan.steps and ratio < 0.475:
            ratio *= 2
            plan = plan_for(ratio=ratio)
        if plan is None or not plan.steps:
            return None, "no filter is left that may go"
        goals = {name: int(self._goal(name, share)) for name in self.target if name != "latency"}
        if goals and len(goals) == len(self.target) and _meets(plan, goals):
            exact = [
                plan_for(**{name: goal}) for name, goal in goals.items() if goal < getattr(self.current, name)
            ]
            enough = [p for p in exact if p is not None and p.steps and _meets(p, goals)]
            if enough:
                aims = " and ".join(
                    f"{goal / getattr(self.history[0], n):.0%} {_NAMES[n]}" for n, goal in goals.items()
                )
                return min(enough, key=lambda p: p.removed_units), f"down to {aims}"
        return plan, f"ratio {ratio:.3f}"

    def _without_filters(self, plan: PruningPlan) -> nn.Module:
        """The model after surgery, with the means of what went in its biases and fresh batch norms."""
        options, source = self.options, self.model
        if options.compensate:
            _, stats = self._scores()
            source = calibration.compensate(source, plan, stats.inputs, options.example_inputs)
        return self._recalibrated(plan.apply(source))  # prune_filters has run what comes out of this plan

    def _recalibrated(self, pruned: nn.Module) -> nn.Module:
        if self.options.recalibrate:
            self._same_draws()
            calibration.recalibrate(pruned, self.options.data)
        return pruned

    def _ignored(self) -> list[str]:
        """The protected layers by name: patterns of the user may name layers of blocks that are gone."""
        present = {name for name, _ in self.model.named_modules()} | {
            n for n, _ in self.model.named_parameters()
        }
        return sorted(self.options.ignored & present)

    # ------------------------------------------------------------------------------ stage 2: layers

    def _layers(self, share: float) -> str:
        options = self.options
        essential: set[str] = set()
        while True:
            if self.reached(share):
                return _TARGET_REACHED if share == 1 else _SHARE_DONE
            removed = sum(record.accepted and record.stage == "layers" for record in self.history)
            if options.max_blocks is not None and removed >= options.max_blocks:
                return f"{removed} block{'' if removed == 1 else 's'} removed, the most allowed"
            ranking = self.journal.decide("ranking", self._rank_blocks)
            candidates = [(name, d) for name, d in ranking if name not in essential]
            if not candidates:
                return "every block left is essential" if essential else "no removable block is left"
            for name, divergence in candidates:
                decision = self.journal.decide("plan", partial(self._decide_block, name, divergence))
                if decision["plan"] is not None:
                    plan = self._read_back(PruningPlan.from_dict, decision["plan"])
                    if self._try(
                        "layers",
                        decision["action"],
                        partial(self._without_block, plan),
                        plan,
                        options.finetune,
                        self._floor(share),
                    ):
                        break
                essential.add(name)

    def _has_blocks(self) -> bool:
        return bool(find_blocks(self.model, self.options.example_inputs, projections=self.options.project))

    def _rank_blocks(self) -> list[tuple[str, float]]:
        """Blocks that keep the shape by their divergence, then those that change it by their filters'."""
        options = self.options
        blocks = find_blocks(self.model, options.example_inputs, projections=options.project)
        same = [block for block in blocks if block.projection is None]
        changing = [block for block in blocks if block.projection is not None]
        stats = self._profile(self.model, layers=None if changing else (), blocks=same, heads=())
        divergences = layer_divergence(self.model, stats)
        order = {block.name: i for i, block in enumerate(blocks)}
        ranked = sorted(divergences.items(), key=lambda item: (item[1], order[item[0]]))
        if changing:
            means = block_filter_divergence(self.model, flow_divergence(self.model, stats), changing)
            ranked += sorted(means.items(), key=lambda item: (item[1], order[item[0]]))
        free = {b.name for b in blocks if not any(name in options.ignored for name in b.names)}
        return [(name, float(d)) for name, d in ranked if name in free]

    def _decide_block(self, name: str, divergence: float) -> dict[str, Any]:
        action = f"remove {name} (divergence {divergence:.3g})"
        try:
            plan = truncate_layers(
                self.model,
                {name: divergence},
                self.options.example_inputs,
                count=1,
                projections=self.options.project,
            )
        except TargetUnreachableError:  # the model does not run without it
            return {"plan": None, "action": action}
        # What the plan says of the other blocks holds for this step alone.
        return {"plan": replace(plan, skipped=()).to_dict(), "action": action}

    def _without_block(self, plan: PruningPlan) -> nn.Module:
        """The model without a block: a projection fitted, what a layer that is cut out gave in the biases."""
        source = self.model
        readers = {
            removal.layer: None
            for step in plan.steps
            if isinstance(step, ChannelStep)
            for removal in step.removals
            if removal.kind in ("conv_in", "linear_in")
        }
        if readers and self.options.compensate:
            stats = self._profile(source, layers=(), blocks=(), inputs=tuple(readers), heads=())
            source = calibration.compensate(source, plan, stats.inputs, self.options.example_inputs)
        pruned = plan.apply(source)
        fit = ProjectionFit(plan)
        if fit.blocks:
            self._same_draws()
            for batch in distributed.shard(self.options.data):
                fit.update(self.model, batch)
            if distributed.world()[1] > 1:
                fit = fit.all_reduce()
            fit.write(pruned)
        return self._recalibrated(pruned)

    # -------------------------------------------------------------------------------------- one step

    def _try(
        self,
        stage: str,
        action: str,
        make: Callable[[], nn.Module],
        plan: PruningPlan | None,
        finetune: Finetune | None,
        floor: float,
    ) -> bool:
        """Make a candidate, fine-tune and evaluate it; keep it if its metric is at least ``floor``."""
        candidate: nn.Module | None = None

        def step() -> StepRecord:
            nonlocal candidate
            candidate, note = make(), ""
            if finetune is not None:
                # A seed a step: what one step draws does not depend on what the steps before it have drawn.
                _seed(self.options.seed + len(self.history))
                try:
                    candidate = _trained(finetune, candidate)
                except TrainingError as error:
                    note = str(error) or "the training failed"
                note = distributed.any_of(note)
                distributed.same_weights(candidate)
            candidate.eval()
            self._same_draws()
            metric = math.nan if note else _evaluate(self.options.evaluate, candidate)
            return StepRecord(
                stage=stage,
                action=action,
                # One part in 10^12 keeps a fall of exactly the budget inside it, however the subtraction rounds.
                accepted=metric >= floor - 1e-12 * max(1.0, abs(floor)),
                params=count_params(candidate),
                macs=count_macs(candidate, self.options.example_inputs),
                metric=metric,
                drift=math.nan if note else self._drift(candidate),
                seconds=time.perf_counter() - self.clock,
                note=note,
                latency=self._latency(candidate),
            )

        return self._record(step, plan, lambda: candidate).accepted

    def _record(
        self,
        compute: Callable[[], StepRecord],
        plan: PruningPlan | None,
        candidate: Callable[[], nn.Module | None] | None,
    ) -> StepRecord:
        """The outcome of a step, from the journal or computed now; an accepted model is kept."""
        if self.journal.replaying:
            event = self.journal.read("step")
            record = self._read_back(StepRecord.from_dict, event["record"])
            self.history.append(record)
            if record.accepted and candidate is not None:
                self._checkpoint = event["checkpoint"]
                self._accept(None, plan)
            return record
        record = distributed.from_first(compute())
        checkpoint = None
        if record.accepted and candidate is not None:
            model = candidate()
            assert model is not None
            self._accept(model, plan)
            checkpoint = self.journal.keep(model, self.plan)
        self.journal.write({"event": "step", "record": record.to_dict(), "checkpoint": checkpoint})
        if checkpoint is not None:
            self.journal.drop_old()
        self.history.append(record)
        self.clock = time.perf_counter()
        self.report_step(record)
        return record

    def _read_back(self, make: Callable[[Any], T], data: Any) -> T:
        """A plan or record as the journal holds it."""
        try:
            return make(data)
        except InvalidInputError as error:
            raise ArtifactError(f"line {self.journal.position} of the journal is damaged: {error}") from error

    def _drift(self, candidate: nn.Module) -> float:
        batches = distributed.shard(self.options.validation)
        sums = _differences(self.original, candidate, batches)
        return _ratio(*distributed.total(sums))

    def _latency(self, candidate: nn.Module) -> float | None:
        base = self.history[0].latency if self.history else None
        if base is None or distributed.world()[0]:
            return None
        # Against the original in the same rounds, so that a slow moment of the machine is not the model's.
        models = {"original": self.original, "pruned": candidate}
        comparison = compare_latency(models, self.options.example_inputs, warmup=3, runs=20)
        return base / comparison.speedup("pruned", over="original")

    # ---------------------------------------------------------------------------------------- the end

    def result(self) -> CompressionResult:
        current = self.current
        model = self.model
        return CompressionResult(
            model=model if model is not self.original else copy.deepcopy(model),
            plan=self.plan,
            history=tuple(self.history),
            params=current.params,
            macs=current.macs,
            metric=current.metric,
            drift=current.drift,
            budget=self.options.budget,
            target=self.target,
            reached_target=self.reached(1.0),
            stopped=self.stopped,
            latency=current.latency,
        )

    def report(self, result: CompressionResult) -> dict[str, Any]:
        """What ``result.json`` holds: the result, and what a report shows of both models."""
        from .artifact import versions
        from .report import layer_widths, mean_divergence

        models = {"before": self.original, "after": result.model}
        widths: dict[str, dict[str, int]] = {}
        layers: dict[str, dict[str, float | None]] = {}
        blocks: dict[str, dict[str, float]] = {}
        for when, model in models.items():
            found = find_blocks(model, self.options.example_inputs)
            stats = self._profile(model, blocks=found, heads=())
            widths[when] = layer_widths(model)
            means = mean_divergence(flow_divergence(model, stats))
            layers[when] = {name: _json_number(mean) for name, mean in means.items()}
            blocks[when] = layer_divergence(model, stats)
        latency = None
        if distributed.world()[0] == 0:
            comparison = compare_latency(models, self.options.example_inputs, warmup=3, runs=30)
            latency = {when: stats.to_dict() for when, stats in comparison.stats.items()}
            latency["speedup"] = comparison.speedup("after", over="before")  # type: ignore[assignment]
        described = {}
        if isinstance(self.journal, RunDirectory):
            described = self.journal.settings
        return {
            **result.to_dict(),
            "widths": widths,
            "divergence": {"filters": layers, "blocks": blocks},
            "latency": latency,
            "settings": described,
            "versions": versions(),
            "seconds": sum(step.seconds for step in result.history),
        }


def _also_to_tensorboard(
    report: Callable[[StepRecord], None], journal: RunDirectory, stack: ExitStack
) -> Callable[[StepRecord], None]:
    """``report``, and a log in the directory of the run where tensorboard is installed."""
    if not journal.leads or find_spec("tensorboard") is None:
        return report
    from .report import TensorBoardLog

    done = sum(event["event"] == "step" for event in journal.events)
    try:
        log = stack.enter_context(TensorBoardLog(journal.path / "tensorboard", first_step=done))
    except InvalidInputError:  # it is there and does not work, which is no reason to stop
        return report

    def both(record: StepRecord) -> None:
        log(record)
        report(record)

    return both


def _nothing_to_prune(scan: GroupScan) -> str:
    if not scan.skipped:
        return "the model has no convolution or linear layer whose channels could go"
    reasons: dict[str, int] = {}
    for skipped in scan.skipped:
        reasons[skipped.reason] = reasons.get(skipped.reason, 0) + 1
    most = max(reasons, key=lambda reason: reasons[reason])
    return f"no filter may go: all {len(scan.skipped)} groups are left alone, most of them because: {most}"


@contextmanager
def _random_states(device: torch.device | None) -> Iterator[None]:
    """The caller's random states of torch, numpy and random are as before afterwards."""
    legacy, plain = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(legacy)
            random.setstate(plain)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _meets(plan: PruningPlan, goals: Mapping[str, int]) -> bool:
    return plan.after is not None and all(getattr(plan.after, name) <= goal for name, goal in goals.items())


def _trained(finetune: Finetune, model: nn.Module) -> nn.Module:
    shapes = _shapes(model)
    trained = finetune(model)
    if not isinstance(trained, nn.Module):
        trained = model
    if _shapes(trained) != shapes:
        raise InvalidInputError(
            "finetune changed the structure of the model, so that the plan no longer describes it; train in "
            "place, or return a module with the same names and shapes"
        )
    return trained


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    state = model.state_dict().items()
    return {name: value.shape for name, value in state if isinstance(value, Tensor)}


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _evaluate(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    value = evaluate(model)
    model.eval()
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise InvalidInputError(
            f"evaluate must return a finite number, larger is better; it returned {value!r}"
        )
    return number


def _check_settings(
    budget: float,
    steps: int,
    initial_ratio: float,
    alpha: float,
    halvings: int,
    stages: Sequence[str],
    first_share: float,
    max_blocks: int | None,
) -> None:
    if not (math.isfinite(budget) and budget >= 0):
        raise InvalidInputError(f"budget must be finite and at least 0, got {budget!r}")
    if not isinstance(steps, int) or steps < 1:
        raise InvalidInputError(f"steps must be an integer of at least 1, got {steps!r}")
    if not 0 < initial_ratio < 1:
        raise InvalidInputError(f"initial_ratio must lie between 0 and 1, got {initial_ratio!r}")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise InvalidInputError(f"alpha must be finite and at least 0, got {alpha!r}")
    if not isinstance(halvings, int) or halvings < 0:
        raise InvalidInputError(f"halvings must be an integer of at least 0, got {halvings!r}")
    if not 0 < first_share <= 1:
        raise InvalidInputError(f"first_share must be above 0 and at most 1, got {first_share!r}")
    if max_blocks is not None and (not isinstance(max_blocks, int) or max_blocks < 0):
        raise InvalidInputError(f"max_blocks must be None or an integer of at least 0, got {max_blocks!r}")
    if isinstance(stages, str) or not stages or len(set(stages)) != len(stages) or set(stages) - set(STAGES):
        raise InvalidInputError(f"stages must hold some of {STAGES}, each once, got {stages!r}")


def _check_target(target: Mapping[str, float] | None) -> None:
    if target is None:
        return
    if not isinstance(target, Mapping) or not target or set(target) - set(TARGETS):
        raise InvalidInputError(f"target must be a dict with keys among {TARGETS}, got {target!r}")
    for name, value in target.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
            raise InvalidInputError(f"the target for {name} must be a number above 0, got {value!r}")


def _first_batch(batches: Iterable[Any], name: str) -> Any:
    if isinstance(batches, Iterator):
        raise InvalidInputError(
            f"{name} is a {type(batches).__name__}, which can be read only once, and compressing reads it "
            "many times: pass a list or a DataLoader, for example list(batches)"
        )
    if isinstance(batches, (Tensor, str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise InvalidInputError(
            f"{name} must be an iterable of batches, got {type(batches).__name__}; put one batch in a list"
        )
    for batch in batches:
        return batch
    raise EmptyDataError(f"{name} holds no batch; at least one is needed")


def _first_sample(batch: Any) -> Any:
    """The batch cut down to its first sample, along the first dimension of every tensor in it."""
    return map_tensors(batch, lambda tensor: tensor[:1] if tensor.dim() else tensor)


def _describe(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"tensor {tuple(batch.shape)}"
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of {len(batch)}"
    return type(batch).__name__


def _outputs(model: nn.Module, batch: Any) -> list[tuple[str, Tensor]]:
    with detection.predictions(model) as said:
        outputs = outputs_of(call(model, to_model(batch, model))) + said
    return [(path, tensor) for path, tensor in outputs if tensor.is_floating_point()]


def _printer() -> Callable[[StepRecord], None]:
    from rich.console import Console

    console = Console()

    def show(record: StepRecord) -> None:
        verdict = "kept" if record.accepted else "undone"
        console.print(
            f"{record.stage:>7}  {record.action:<40} {verdict:<6}  MACs {record.macs:,}  "
            f"parameters {record.params:,}  metric {record.metric:.4f}  drift {record.drift:.3g}  "
            f"{record.seconds:.1f} s",
            highlight=False,
        )

    return show
