"""Both stages of IDAP++ under one error budget: filters first, then whole blocks, then a last fine-tuning."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .complexity import count_macs, count_params
from .criteria import flow_divergence, layer_divergence
from .errors import EmptyDataError, InvalidInputError, TargetUnreachableError, TrainingError
from .filters import prune_filters
from .groups import Ignore, resolve_ignore
from .inputs import call, device_of, evaluating, map_tensors, outputs_of, to_model
from .layers import find_blocks, truncate_layers
from .plan import Cost, PruningPlan
from .profile import ActivationProfile, profile

STAGES = ("filters", "layers")
TARGETS = ("macs", "params")
_NAMES = {"macs": "MACs", "params": "parameters"}
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

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON holds it; numbers that are not finite become None."""
        return {key: _json_number(value) for key, value in asdict(self).items()}


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
    target: dict[str, int]  # in parameters or multiply-accumulates, whatever form it was given in
    reached_target: bool
    stopped: dict[str, str]  # why each stage ended

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
            "budget": self.budget,
            "target": self.target,
            "reached_target": self.reached_target,
            "stopped": self.stopped,
            "history": [step.to_dict() for step in self.history],
            "plan": self.plan.to_dict(),
        }


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    evaluate: Callable[[nn.Module], float],
    finetune: Finetune | None = None,
    final_finetune: Finetune | None = None,
    target: Mapping[str, float] | None = None,
    budget: float = 0.05,
    steps: int = 20,
    initial_ratio: float = 0.10,
    alpha: float = 1.5,
    halvings: int = 2,
    stages: Sequence[str] = STAGES,
    first_share: float = 0.7,
    max_blocks: int | None = None,
    example_inputs: Any = None,
    round_to: int = 8,
    ignore: Ignore = (),
    criterion: Criterion = flow_divergence,
    backend: str = "auto",
    progress: bool | Callable[[StepRecord], None] = True,
    on_stage: Callable[[str, nn.Module], None] | None = None,
    seed: int = 0,
) -> CompressionResult:
    """Prune filters, then remove blocks, fine-tuning after every step, while the metric keeps the budget.

    Stage ``"filters"``: step ``t`` of ``T = steps`` profiles the current model, scores its filters with
    ``criterion`` and removes the share ``initial_ratio * (1 + t / T) ** alpha`` of what is left. A step after
    which the metric has fallen by more than the budget is undone and tried again with half the share,
    ``halvings`` times in a row at most.

    Stage ``"layers"``: removable blocks are ranked by block divergence, the lowest is replaced by the
    identity, and the change is kept if the metric stays within the budget; otherwise the block is put back
    and marked essential. The divergences are computed anew after every removal that was kept.

    Both stages share one budget and one target. While another stage follows, the first may use the share
    ``first_share`` of the budget and of the way to the target. If the target is still out of reach at the
    end, the first stage goes on with all that is left. ``final_finetune`` then runs once; its result is
    undone if the metric is lower than before it and lower than that of the original.

    Args:
        model: left as it is; all work is done on copies.
        batches: what the profile reads: a re-iterable of model inputs (tensors, tuples of positional
            arguments, or dicts of keyword arguments), without targets. It is read several times a step.
        evaluate: gets a model in eval mode and returns a finite number, larger is better.
        finetune: trains the model in place after every step, or returns the trained one (anything returned
            that is no module is ignored); :func:`idap.training.finetune` does for both.
        final_finetune: the last training; ``finetune`` if not given.
        target: ``{"macs": x}`` and/or ``{"params": x}``, where ``x`` up to 1 is a fraction of the original
            and above 1 an absolute count. Without a target the stages go on until the budget or their steps
            are used up.
        budget: by how much the metric may fall, in the metric's own units.
        max_blocks: how many blocks the second stage may remove; no limit if not given.
        example_inputs: one input for tracing and counting; the first sample of the first batch if not given.
        round_to: widths left are multiples of it.
        ignore: layers whose width must stay, and blocks that must not be removed: names, patterns, classes or
            modules, as in :func:`idap.prune_filters`.
        criterion: function of ``(model, profile)`` giving scores per layer, such as
            :func:`idap.flow_divergence`.
        progress: True prints a line a step; a function gets each :class:`StepRecord` instead.
        on_stage: called with ``"filters"``, ``"layers"`` or ``"final"`` and the model kept at the end of that
            stage, which must not be changed; after the final training only if its result was kept.
        seed: seeds torch before every training; the caller's random state is put back afterwards.

    Raises:
        InvalidInputError: an argument is wrong, ``batches`` cannot be read more than once or holds nothing,
            ``evaluate`` returns something else than a finite number.
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
        optional = function is None or (name == "progress" and isinstance(function, bool))
        if not callable(function) and not (optional and name != "criterion"):
            raise InvalidInputError(f"{name}: got {function!r}, wanted a function{_SIGNATURES.get(name, '')}")
    _check_settings(budget, steps, initial_ratio, alpha, halvings, stages, first_share, max_blocks)
    first = _first_batch(batches)
    device = device_of(model)
    if example_inputs is None:
        example_inputs = _first_sample(first)
    example_inputs = to_model(example_inputs, model)
    report = _printer() if progress is True else progress or (lambda record: None)

    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        start = time.perf_counter()
        original = copy.deepcopy(model).eval()
        try:
            with torch.no_grad():
                call(original, to_model(first, original))
        except Exception as error:
            raise InvalidInputError(
                f"the model cannot run on the first batch, a {_describe(first)}: {error}. Batches hold model "
                "inputs alone; for a loader of (input, target) pairs pass [x for x, _ in loader]"
            ) from error
        params, macs = count_params(original), count_macs(original, example_inputs)
        metric = _evaluate(evaluate, original)
        if metric > 0 and budget >= metric:
            raise InvalidInputError(
                f"the budget {budget:g} allows the metric to fall from {metric:g} to nothing; it is counted "
                "in the metric's own units, so give 0.05 for five points of an accuracy between 0 and 1"
            )
        base = StepRecord("base", "original", True, params, macs, metric, 0.0, time.perf_counter() - start)
        run = _Run(
            original=original,
            batches=batches,
            evaluate=evaluate,
            finetune=finetune,
            example_inputs=example_inputs,
            target=_absolute(target, params, macs),
            budget=budget,
            steps=steps,
            initial_ratio=initial_ratio,
            alpha=alpha,
            halvings=halvings,
            max_blocks=max_blocks,
            round_to=round_to,
            ignored=resolve_ignore(original, ignore),
            criterion=criterion,
            backend=backend,
            seed=seed,
            report=report,
            model=original,
            plan=PruningPlan(type(model).__name__, before=Cost(params, macs), after=Cost(params, macs)),
            current=base,
            history=[base],
        )
        report(base)
        run.stages(tuple(stages), first_share, on_stage)
        run.finish(final_finetune or finetune)
        if on_stage is not None and run.current.stage == "final":
            on_stage("final", run.model)

    current = run.current
    return CompressionResult(
        model=run.model if run.model is not original else copy.deepcopy(original),
        plan=run.plan,
        history=tuple(run.history),
        params=current.params,
        macs=current.macs,
        metric=current.metric,
        drift=current.drift,
        budget=budget,
        target=run.target,
        reached_target=run.reached(1.0),
        stopped=run.stopped,
    )


@torch.no_grad()
def drift(original: nn.Module, pruned: nn.Module, batches: Iterable[Any]) -> float:
    """``sum ||N0(x) - N*(x)||^2 / sum ||N0(x)||^2`` over the batches: the left side of the paper's bound.

    Both models run in eval mode, which is put back; outputs are compared in float64. Of an output with
    several tensors, all that float are taken.

    Raises:
        EmptyDataError: there is no batch.
        InvalidInputError: the outputs of the two models differ in shape.
    """
    difference = scale = 0.0
    count = 0
    with evaluating(original), evaluating(pruned):
        for batch in batches:
            count += 1
            wanted, got = _outputs(original, batch), _outputs(pruned, batch)
            shapes = [[tuple(t.shape) for _, t in tensors] for tensors in (wanted, got)]
            if shapes[0] != shapes[1]:
                raise InvalidInputError(
                    f"the outputs differ in shape: original {shapes[0]}, pruned {shapes[1]}"
                )
            for (_, a), (_, b) in zip(wanted, got, strict=True):
                difference += float((a.double() - b.to(a.device).double()).square().sum())
                scale += float(a.double().square().sum())
    if not count:
        raise EmptyDataError("there is no batch to measure the drift on")
    if scale == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / scale


@dataclass
class _Run:
    """The state of one call of :func:`compress`: the model kept so far, and the settings."""

    original: nn.Module
    batches: Iterable[Any]
    evaluate: Callable[[nn.Module], float]
    finetune: Finetune | None
    example_inputs: Any
    target: dict[str, int]
    budget: float
    steps: int
    initial_ratio: float
    alpha: float
    halvings: int
    max_blocks: int | None
    round_to: int
    ignored: set[str]
    criterion: Criterion
    backend: str
    seed: int
    report: Callable[[StepRecord], None]
    model: nn.Module
    plan: PruningPlan
    current: StepRecord
    history: list[StepRecord]
    clock: float = field(default_factory=time.perf_counter)
    stopped: dict[str, str] = field(default_factory=dict)

    def stages(
        self, names: tuple[str, ...], first_share: float, on_stage: Callable[[str, nn.Module], None] | None
    ) -> None:
        turns = [(name, 1.0) for name in names]
        if len(names) > 1 and find_blocks(self.model, self.example_inputs):
            turns[0] = (names[0], first_share)
            if self.target:
                # A second turn for the first stage, in case the other one cannot go the rest of the way.
                turns.append((names[0], 1.0))
        for turn, (name, share) in enumerate(turns):
            if self.reached(1.0):
                self.stopped.setdefault(name, "the target was reached before")
                continue
            before = self.current
            self.stopped[name] = self._filters(share) if name == "filters" else self._layers(share)
            is_repeat = turn >= len(names)
            if on_stage is not None and not (is_repeat and self.current is before):
                on_stage(name, self.model)

    def finish(self, finetune: Finetune | None) -> None:
        """The last fine-tuning: undone if the metric falls by it, to below the original's."""
        if finetune is None or self.current is self.history[0]:
            return
        # Among many steps one is lucky: to beat the original as well is not asked of the last.
        floor = min(self.current.metric, self.history[0].metric)
        self._try("final", "fine-tune", copy.deepcopy(self.model), None, finetune, floor)

    def reached(self, share: float) -> bool:
        return bool(self.target) and all(
            getattr(self.current, name) <= self._goal(name, share) for name in self.target
        )

    def _goal(self, name: str, share: float) -> float:
        full = getattr(self.history[0], name)
        return full - share * (full - self.target[name])

    def _floor(self, share: float) -> float:
        return self.history[0].metric - share * self.budget

    def _filters(self, share: float) -> str:
        scale, failures, t = 1.0, 0, 0
        scores = self._scores()
        rejected: list[tuple[Any, ...]] = []
        while t < self.steps:
            if self.reached(share):
                return _TARGET_REACHED if share == 1 else _SHARE_DONE
            ratio = min(self.initial_ratio * (1 + t / self.steps) ** self.alpha * scale, 0.95)
            plan, action = self._plan_filters(scores, ratio, share)
            if plan is None:
                return "no filter is left that may go"
            kept = False
            # Coarse widths can make a smaller ratio the same plan; it need not be trained twice.
            if plan.steps not in rejected:
                pruned = plan.apply(self.model, self.example_inputs)
                kept = self._try("filters", action, pruned, plan, self.finetune, self._floor(share))
            if kept:
                failures, t = 0, t + 1
                rejected.clear()
                if t < self.steps and not self.reached(share):
                    scores = self._scores()
                continue
            rejected.append(plan.steps)
            failures += 1
            scale /= 2
            if failures > self.halvings:
                return f"{failures} steps in a row went beyond the budget"
        return f"all {self.steps} steps were taken"

    def _scores(self) -> dict[str, Tensor]:
        stats = profile(self.model, self.batches, blocks=(), backend=self.backend, progress=False)
        return self.criterion(self.model, stats)

    def _plan_filters(
        self, scores: dict[str, Tensor], ratio: float, share: float
    ) -> tuple[PruningPlan | None, str]:
        """The plan that removes ``ratio`` of the filters, or just enough for the target; None if none can go.

        A ratio that the widths do not allow is halved if it is too much, and doubled if it comes to nothing.
        """
        names = self._ignored()

        def plan_for(**goal: Any) -> PruningPlan | None:
            try:
                plan = prune_filters(
                    self.model, scores, self.example_inputs, round_to=self.round_to, ignore=names, **goal
                )
            except TargetUnreachableError:
                return None
            return plan

        plan = plan_for(ratio=ratio)
        while plan is None and ratio > 1e-3:
            ratio /= 2
            plan = plan_for(ratio=ratio)
        while plan is not None and not plan.steps and ratio < 0.475:
            ratio *= 2
            plan = plan_for(ratio=ratio)
        if plan is None or not plan.steps:
            return None, ""
        goals = {name: int(self._goal(name, share)) for name in self.target}
        if goals and _meets(plan, goals):
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

    def _ignored(self) -> list[str]:
        """The protected layers by name: patterns of the user may name layers of blocks that are gone."""
        present = {name for name, _ in self.model.named_modules()} | {
            n for n, _ in self.model.named_parameters()
        }
        return sorted(self.ignored & present)

    def _layers(self, share: float) -> str:
        essential: set[str] = set()
        removed = 0
        while True:
            if self.reached(share):
                return _TARGET_REACHED if share == 1 else _SHARE_DONE
            if self.max_blocks is not None and removed >= self.max_blocks:
                return f"{removed} blocks were removed, the most allowed"
            stats = profile(self.model, self.batches, layers=(), backend=self.backend, progress=False)
            divergences = layer_divergence(self.model, stats)
            protected = essential | self.ignored
            candidates = sorted((d, name) for name, d in divergences.items() if name not in protected)
            if not candidates:
                return "every block left is essential" if essential else "no removable block is left"
            for divergence, name in candidates:
                plan = truncate_layers(self.model, {name: divergence}, self.example_inputs, count=1)
                pruned = plan.apply(self.model, self.example_inputs)
                action = f"remove {name} (divergence {divergence:.3g})"
                if self._try("layers", action, pruned, plan, self.finetune, self._floor(share)):
                    removed += 1
                    break
                essential.add(name)

    def _try(
        self,
        stage: str,
        action: str,
        candidate: nn.Module,
        plan: PruningPlan | None,
        finetune: Finetune | None,
        floor: float,
    ) -> bool:
        """Fine-tune and evaluate a candidate; keep it if its metric is at least ``floor``."""
        note = ""
        if finetune is not None:
            # A seed a step: what one step draws does not depend on what the steps before it have drawn.
            torch.manual_seed(self.seed + len(self.history))
            try:
                candidate = _trained(finetune, candidate)
            except TrainingError as error:
                note = str(error)
        candidate.eval()
        metric = math.nan if note else _evaluate(self.evaluate, candidate)
        # One part in 10^12 keeps a fall of exactly the budget inside it, however the subtraction rounds.
        accepted = metric >= floor - 1e-12 * max(1.0, abs(floor))
        record = StepRecord(
            stage=stage,
            action=action,
            accepted=accepted,
            params=count_params(candidate),
            macs=count_macs(candidate, self.example_inputs),
            metric=metric,
            drift=math.nan if note else drift(self.original, candidate, self.batches),
            seconds=time.perf_counter() - self.clock,
            note=note,
        )
        self.clock = time.perf_counter()
        self.history.append(record)
        self.report(record)
        if accepted:
            self.model, self.current = candidate, record
            if plan is not None:
                self.plan = self.plan + plan
        return accepted


def _meets(plan: PruningPlan, goals: Mapping[str, int]) -> bool:
    return plan.after is not None and all(getattr(plan.after, name) <= goal for name, goal in goals.items())


def _trained(finetune: Finetune, model: nn.Module) -> nn.Module:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    trained = finetune(model)
    if not isinstance(trained, nn.Module):
        trained = model
    if {name: tensor.shape for name, tensor in trained.state_dict().items()} != shapes:
        raise InvalidInputError(
            "finetune changed the structure of the model, so that the plan no longer describes it; train in "
            "place, or return a module with the same names and shapes"
        )
    return trained


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


def _absolute(target: Mapping[str, float] | None, params: int, macs: int) -> dict[str, int]:
    if target is None:
        return {}
    full = {"params": params, "macs": macs}
    if not isinstance(target, Mapping) or not target or set(target) - set(TARGETS):
        raise InvalidInputError(f"target must be a dict with keys among {TARGETS}, got {target!r}")
    absolute = {}
    for name, value in target.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or value <= 0
        ):
            raise InvalidInputError(f"the target for {name} must be a number above 0, got {value!r}")
        absolute[name] = int(value * full[name]) if value <= 1 else int(value)
    return absolute


def _first_batch(batches: Iterable[Any]) -> Any:
    if isinstance(batches, Iterator):
        raise InvalidInputError(
            f"batches is a {type(batches).__name__}, which can be read only once, and compressing reads it "
            "many times: pass a list or a DataLoader, for example list(batches)"
        )
    if isinstance(batches, (Tensor, str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise InvalidInputError(
            f"batches must be an iterable of batches, got {type(batches).__name__}; put one batch in a list"
        )
    for batch in batches:
        return batch
    raise EmptyDataError("batches holds no batch; at least one is needed to profile the model")


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
    return [(path, t) for path, t in outputs_of(call(model, to_model(batch, model))) if t.is_floating_point()]


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
