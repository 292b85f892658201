"""``idap prune``: compress a model on the user's data, measure both, and say where everything is."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import criteria, distributed, rundir
from ..complexity import count_macs, count_params
from ..compress import STAGES, TARGETS, CompressionResult, Criterion, StepRecord, compress
from ..data import DataSplits, accuracy, batches, inputs_of
from ..errors import ArtifactError, InvalidInputError
from ..latency import compare_latency, torch_threads
from ..models import ModelFactory, UserCodeError, a_kind, import_object, users_code
from ..report import TABLE, StageSummary, stage_table
from ..training import finetune
from .progress import Estimate, StepDisplay
from .subject import (
    Subject,
    add_data_options,
    add_model_options,
    calibration_inputs,
    check_fit,
    check_numbers,
    first_sample,
    open_data,
    path_of,
)
from .tables import models_table

if TYPE_CHECKING:
    from rich.console import Console

SETTINGS = "settings.json"
EXPORTS = {"onnx": "model.onnx", "pt2": "model.pt2"}
INTERRUPTED = 130
_DEFAULTS = {name: p.default for name, p in inspect.signature(compress).parameters.items()}
# Where and how a run is shown may change when it is taken up again; what it does may not.
_FREE = (
    "run",
    "argv",
    "output",
    "resume",
    "quiet",
    "json",
    "workers",
    "threads",
    "device",
    "download",
    "export",
    "latency_runs",
)


def add_parser(commands: Any) -> None:
    """The parser of ``idap prune``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "prune",
        help="compress a model on your data: filters, then layers, with fine-tuning after every step",
        description="Prune MODEL by flow divergence: filters and attention heads, then whole blocks, with "
        "fine-tuning after every step, as long as validation accuracy keeps the budget. Writes the pruned "
        "model and a record of the run to --output, and prints what came of it on the test part, which no "
        "decision reads. Interrupted runs go on with --resume.",
        epilog="example: idap prune resnet50 --data imagefolder:flowers --weights flowers.pt --output run "
        "--target-macs 0.4 --budget 0.01",
    )
    add_model_options(parser)
    add_data_options(parser, required=True, batches=100)
    add = parser.add_argument
    add("--output", type=path_of, required=True, metavar="DIR", help="where the run is kept")
    add("--resume", action="store_true", help="go on with the run in DIR, with the same arguments")
    add(
        "--export",
        action="append",
        default=[],
        choices=sorted(EXPORTS),
        help="also write DIR/model.onnx or .pt2",
    )

    goals = parser.add_argument_group("goal")
    for name, unit in (("macs", "MACs"), ("params", "parameters"), ("latency", "latency at batch 1")):
        text = f"{unit} to reach: up to 1 a fraction of the original, above 1 "
        text += "milliseconds" if name == "latency" else "a number"
        goals.add_argument(f"--target-{name}", type=float, metavar="X", help=text)

    def option(group: Any, name: str, kind: type, metavar: str, text: str) -> None:
        default = _DEFAULTS[name.replace("-", "_")]
        group.add_argument(
            f"--{name}", type=kind, default=default, metavar=metavar, help=f"{text} (default: {default})"
        )

    def switch(group: Any, name: str, text: str) -> None:
        group.add_argument(f"--no-{name}", dest=name.replace("-", "_"), action="store_false", help=text)

    option(goals, "budget", float, "X", "how much of the validation metric may be lost; 0.02: two points")

    how = parser.add_argument_group("pruning")
    how.add_argument(
        "--stages",
        type=_stages,
        default=STAGES,
        metavar="A,B",
        help="filters,layers, layers,filters, filters or layers (default: filters,layers)",
    )
    option(how, "steps", int, "N", "most steps of the filter stage")
    option(how, "initial-ratio", float, "X", "share of the filters that the first step removes")
    option(how, "alpha", float, "X", "how fast that share grows")
    how.add_argument(
        "--scope",
        choices=("global", "local"),
        default=_DEFAULTS["scope"],
        help="one ranking, or one a layer (default: global)",
    )
    how.add_argument(
        "--normalize",
        choices=("mean", "none"),
        default="mean",
        help="mean: the scores of a group count as shares of their mean; none: as they are (default: mean)",
    )
    how.add_argument(
        "--reduction",
        choices=("mean", "sum", "max"),
        default=_DEFAULTS["reduction"],
        help="how the scores of coupled layers are joined (default: mean)",
    )
    how.add_argument(
        "--by-latency",
        action="store_true",
        help="rank filters by divergence per millisecond that they take on this machine",
    )
    option(how, "round-to", int, "N", "widths left are multiples of it")
    option(how, "min-width", int, "N", "channels that every layer keeps at least")
    how.add_argument(
        "--max-blocks", type=int, metavar="N", help="most blocks that may go (default: no limit)"
    )
    how.add_argument(
        "--ignore",
        nargs="+",
        default=[],
        metavar="NAME",
        help="layers and blocks that stay: names or patterns",
    )
    how.add_argument(
        "--criterion",
        default="flow_divergence",
        metavar="NAME",
        help=f"one of {', '.join(criterion_names())} (default: flow_divergence)",
    )
    switch(how, "compensate", "do not move the mean of what is removed into the next bias")
    switch(how, "recalibrate", "do not estimate batch-norm statistics anew after surgery")
    switch(
        how,
        "project",
        "put no projection in the place of a block: only those go for which the identity can stand",
    )
    switch(how, "heads", "do not remove attention heads")

    training = parser.add_argument_group("evaluation and fine-tuning")
    training.add_argument(
        "--epochs", type=int, default=1, metavar="N", help="after every step, 0 for none (default: 1)"
    )
    training.add_argument(
        "--final-epochs", type=int, default=10, metavar="N", help="at the end, 0 for none (default: 10)"
    )
    training.add_argument("--lr", type=float, default=0.01, metavar="X", help="learning rate (default: 0.01)")
    training.add_argument(
        "--distill",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="learn from the original's outputs too (default: yes)",
    )
    training.add_argument(
        "--no-augment", dest="augment", action="store_false", help="train on the images as they are"
    )
    training.add_argument(
        "--mixed-precision", choices=("no", "fp16", "bf16"), help="of the fine-tuning (default: no)"
    )
    training.add_argument(
        "--evaluate",
        metavar="FUNCTION",
        help="package.module:function of (model) or (model, batches), larger is better, instead of accuracy",
    )
    training.add_argument(
        "--train",
        metavar="FUNCTION",
        help="package.module:function of (model) or (model, batches) that trains in place, instead of ours",
    )
    training.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of new weights and of training (default: 0)"
    )

    show = parser.add_argument_group("output")
    show.add_argument(
        "--latency-runs",
        type=int,
        default=100,
        metavar="N",
        help="rounds of the latency measurement (default: 100)",
    )
    show.add_argument("--quiet", action="store_true", help="no progress, only the table and what follows")
    show.add_argument("--json", action="store_true", help="print the result as JSON, and all else to stderr")
    parser.set_defaults(run=run)


def criterion_names() -> list[str]:
    """What ``--criterion`` takes."""
    return ["flow_divergence", "taylor", "bn_scale", *criteria.RIVALS]


def run(args: argparse.Namespace) -> int:
    """Prune, measure, print; 130 after Ctrl-C, with the words that take the run up again.

    Raises:
        IdapError: of any kind, for wrong input.
    """
    from rich.console import Console

    _check(args)
    _join_processes(args)
    leads = distributed.world()[0] == 0
    args.quiet = args.quiet or not leads
    console = Console(highlight=False, stderr=args.json)
    try:
        with torch_threads(args.threads):
            outcome = _Pruning(args, console).go()
            if leads:
                _finish(args, console, outcome)
    except UserCodeError as error:
        if not rundir.has_steps(args.output):
            raise
        raise UserCodeError(f"{error}; to go on with the run: {_resuming(args)}", error.frames) from error
    except KeyboardInterrupt:
        if leads:
            print(_how_to_go_on(args), file=sys.stderr)
        return INTERRUPTED
    return 0


@dataclass(frozen=True)
class _Outcome:
    subject: Subject
    data: DataSplits
    example: Any
    result: CompressionResult
    rows: list[StageSummary]
    format_metric: Callable[[float], str]


class _Pruning:
    """One run: what the options say, as the arguments of :func:`idap.compress`."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args = args
        begun = rundir.has_steps(args.output)
        if begun:
            _compare_settings(args)
        self.fresh = not (begun and args.resume)
        self.target = {
            name: value for name in TARGETS if (value := getattr(args, f"target_{name}")) is not None
        }
        self.evaluate = _function(args.evaluate, "evaluate")
        self.train = _function(args.train, "train")
        # A metric of the user's own has a scale that we do not know.
        self.format_metric: Callable[[float], str] = "{:.6g}".format if args.evaluate else "{:.2%}".format
        self.display = StepDisplay(
            console,
            Estimate(self.target, args.steps, 0 if self.train else args.final_epochs),
            self.format_metric,
            quiet=args.quiet,
        )

    def go(self) -> _Outcome:
        args, display = self.args, self.display
        subject, data = open_data(args, seed=args.seed, augment=args.augment)
        sizes = ", ".join(f"{len(getattr(data, n)):,} {n}" for n in ("train", "validation", "test"))
        display.say(f"{args.model}: {count_params(subject.model):,} parameters, on {subject.device}")
        display.say(f"{data.name.removesuffix(':')}: {sizes} samples ({data.note})")
        for note in subject.notes:
            display.say(f"Note: {note}")
        loaders = {name: self._loader(getattr(data, name), subject) for name in ("validation", "test")}
        self.training = self._loader(data.train, subject, shuffle=True)
        example = first_sample(inputs_of(next(iter(loaders["validation"]))), subject.model)
        check_fit(args.model, subject.model, data.name, example)
        self._check_targets(subject.model, example)
        calibration = calibration_inputs(args, data)
        with display:
            # Now rather than at the end, so that data that cannot be read costs no run.
            before = self._measure(subject.model, loaders["test"])
            self._show_past()
            trains = self.train is not None or args.epochs > 0
            result = compress(
                subject.model,
                calibration,
                evaluate=lambda model: self._validate(model, loaders["validation"]),
                finetune=(lambda model: self._finetune(model, subject, args.epochs)) if trains else None,
                final_finetune=(lambda model: self._finetune(model, subject, args.final_epochs))
                if self.train is not None or args.final_epochs
                else False,
                target=self.target or None,
                budget=args.budget,
                stages=args.stages,
                steps=args.steps,
                initial_ratio=args.initial_ratio,
                alpha=args.alpha,
                max_blocks=args.max_blocks,
                example_inputs=example,
                validation=_InputsOf(loaders["validation"]),
                criterion=_criterion(args.criterion, calibration, example),
                scope=args.scope,
                normalize=None if args.normalize == "none" else args.normalize,
                reduction=args.reduction,
                by_latency=args.by_latency,
                round_to=args.round_to,
                min_width=args.min_width,
                ignore=args.ignore,
                heads=args.heads,
                compensate=args.compensate,
                recalibrate=args.recalibrate,
                project=args.project,
                seed=args.seed,
                directory=args.output,
                resume=args.resume,
                progress=self._step,
            )
            rows: list[StageSummary] = []
            if distributed.world()[0] == 0:
                display.doing("measuring original and result on the test part")
                after = self._measure(result.model, loaders["test"])
                rows = self._rows(
                    {"original": (subject.model, before), "pruned": (result.model, after)},
                    example,
                )
        return _Outcome(subject, data, example, result, rows, self.format_metric)

    def _loader(self, dataset: Any, subject: Subject, shuffle: bool = False) -> DataLoader[Any]:
        args = self.args
        pinned = subject.device.type == "cuda"
        return batches(dataset, args.batch_size, shuffle=shuffle, workers=args.workers, pin_memory=pinned)

    def _measure(self, model: nn.Module, loader: DataLoader[Any]) -> float:
        if self.evaluate is None:
            return accuracy(model, loader)
        model.eval()
        value: float = self.evaluate(model, loader)
        return value

    def _validate(self, model: nn.Module, loader: DataLoader[Any]) -> float:
        metric = self._measure(model, loader)
        if self.fresh:
            # The original is the first that compress asks for, once the directory is there.
            self.fresh = False
            if self.evaluate is None and metric == 0:
                raise InvalidInputError(
                    "the model classifies no validation sample rightly, so it has no accuracy to lose; train it "
                    "first, or give its weights with --weights"
                )
            _write_json(self.args.output / SETTINGS, _settings(self.args))
        return metric

    def _check_targets(self, model: nn.Module, example: Any) -> None:
        """Refuse targets that the original meets."""
        full: dict[str, int | None] = {
            "macs": count_macs(model, example),
            "params": count_params(model),
            "latency": None,
        }
        units = {
            "macs": "number of MACs",
            "params": "number of parameters",
            "latency": "time in milliseconds",
        }
        for name, goal in self.target.items():
            size = full[name]
            if goal == 1 or (size is not None and goal >= size):
                text = f"{goal:g}".replace("e+", "e")
                text = text if float(text) == goal else f"{goal:,.10g}"
                own = "own" if size is None else f"{size:,}"
                raise InvalidInputError(
                    f"target-{name} {text} is not below the model's {own}; up to 1 is a fraction, above 1 a "
                    f"{units[name]}"
                )

    def _finetune(self, model: nn.Module, subject: Subject, epochs: int) -> Any:
        args = self.args
        if self.train is not None:
            self.display.doing("fine-tuning")
            return self.train(model, self.training)
        self.display.doing(f"fine-tuning, epoch 1 of {epochs}")
        options: dict[str, Any] = {}
        if args.mixed_precision is not None:
            options["mixed_precision"] = args.mixed_precision
        finetune(
            model,
            self.training,
            epochs=epochs,
            lr=args.lr,
            teacher=subject.model if args.distill else None,
            # compress seeds torch before every training, so that this differs from step to step.
            seed=int(torch.randint(2**31, ())),
            progress=self.display.epoch,
            **options,
        )
        self.display.doing("evaluating")
        return model

    def _step(self, record: StepRecord) -> None:
        if not (self.args.output / SETTINGS).exists():
            _write_json(self.args.output / SETTINGS, _settings(self.args))
        self.display.step(record)

    def _show_past(self) -> None:
        if not self.args.resume or not (self.args.output / rundir.JOURNAL).exists():
            return
        if self.fresh:
            return
        events = rundir.read_events(self.args.output)
        self.display.past(
            [StepRecord.from_dict(event["record"]) for event in events if event["event"] == "step"]
        )

    def _rows(self, models: dict[str, tuple[nn.Module, float]], example: Any) -> list[StageSummary]:
        comparison = compare_latency(
            {name: model for name, (model, _) in models.items()}, example, runs=self.args.latency_runs
        )
        return [
            StageSummary(
                name=name,
                params=count_params(model),
                macs=count_macs(model, example),
                accuracy=float(metric),
                latency=comparison.stats[name],
                speedup=comparison.speedup(name, over="original"),
            )
            for name, (model, metric) in models.items()
        ]


class _InputsOf:
    """The inputs of a loader of pairs, again at every pass."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return (inputs_of(batch) for batch in self.loader)


def loading_code(directory: Path, factory: ModelFactory) -> str:
    """Python that loads the pruned model of a run."""
    return (
        "import idap\n"
        "from idap.models import ModelFactory\n"
        f"model = idap.load({str(directory / rundir.MODEL)!r}, {factory.code()})"
    )


def _finish(args: argparse.Namespace, console: Console, outcome: _Outcome) -> None:
    result, subject = outcome.result, outcome.subject
    _write_json(
        args.output / TABLE,
        {
            "data": outcome.data.name,
            "metric": args.evaluate or "accuracy",
            "factory": vars(subject.factory),
            "input": _shape(outcome.example),
            "rows": [row.to_dict() for row in outcome.rows],
        },
    )
    code = loading_code(args.output, subject.factory)
    console.print(_table(args, outcome))

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    _say_how_it_ended(say, args, outcome)
    written = [f"{rundir.MODEL}/", rundir.RESULT, rundir.RUN, rundir.JOURNAL, SETTINGS, TABLE]
    written += ["tensorboard/"] if (args.output / "tensorboard").is_dir() else []
    say(f"Written to {args.output}: {', '.join(written)}")
    say(f"A page with figures and pictures: idap report {shlex.quote(str(args.output))}")
    say("To load the pruned model:\n")
    for line in code.splitlines():
        say(f"    {line}")
    # Last, so that a model that cannot be exported costs nothing else.
    exported = _export(args, outcome)
    if exported:
        say(f"\nExported and checked: {', '.join(str(args.output / name) for name in exported)}")
    if args.json:
        print(
            json.dumps(
                {
                    "directory": str(args.output),
                    "rows": [row.to_dict() for row in outcome.rows],
                    "result": {k: v for k, v in result.to_dict().items() if k != "plan"},
                    "exported": exported,
                    "load": code,
                },
                indent=1,
            )
        )


def _shape(example: Any) -> list[int] | None:
    """The shape of one image or the like, with the batch; noise can stand in for nothing else."""
    return list(example.shape) if isinstance(example, Tensor) and example.is_floating_point() else None


def _table(args: argparse.Namespace, outcome: _Outcome) -> Any:
    stats = outcome.rows[0].latency
    assert stats is not None
    title = f"{args.model} on {outcome.data.name.removesuffix(':')}"
    samples = len(outcome.data.test)  # type: ignore[arg-type]
    caption = (
        f"{samples:,} test samples, read by no decision. Latency: batch 1, {stats.device}, {stats.threads} "
        f"thread{'s' * (stats.threads != 1)}, median and p10-p90 of {stats.runs} rounds with the models in turns."
    )
    if args.evaluate:
        return models_table(outcome.rows, title=title, caption=caption, format_metric=outcome.format_metric)
    return stage_table(outcome.rows, title=title, caption=f"Accuracy: {caption}")


def _say_how_it_ended(say: Callable[[str], None], args: argparse.Namespace, outcome: _Outcome) -> None:
    result, show = outcome.result, outcome.format_metric
    reasons = "; ".join(f"{stage}: {reason}" for stage, reason in result.stopped.items())
    if result.target:
        verdict = "reached" if result.reached_target else "not reached"
        say(f"The target was {verdict}, at {result.macs / result.baseline.macs:.1%} of the MACs ({reasons}).")
    else:
        say(f"{result.macs / result.baseline.macs:.1%} of the MACs are left ({reasons}).")
    say(
        f"Validation: {show(result.baseline.metric)} before, {show(result.metric)} after; the budget allowed "
        f"{show(result.baseline.metric - args.budget)}."
    )
    last = result.history[-1]
    if last.stage == "final" and not last.accepted:
        say(f"The final fine-tuning was undone: it gave {show(last.metric)}.")


def _export(args: argparse.Namespace, outcome: _Outcome) -> list[str]:
    from ..export import export_onnx, export_program

    written = []
    test = inputs_of(next(iter(batches(outcome.data.test, 1))))
    for kind in dict.fromkeys(args.export):
        export = export_onnx if kind == "onnx" else export_program
        export(outcome.result.model, args.output / EXPORTS[kind], test)
        written.append(EXPORTS[kind])
    return written


def _check(args: argparse.Namespace) -> None:
    check_numbers(
        args,
        {
            "batch_size": 1,
            "calibration_batches": 1,
            "workers": 0,
            "epochs": 0,
            "final_epochs": 0,
            "lr": 0,
            "latency_runs": 1,
            "threads": 1,
            "budget": 0,
            "steps": 1,
            "alpha": 0,
            "round_to": 1,
            "min_width": 1,
            "max_blocks": 0,
            "num_classes": 1,
            "image_size": 1,
        },
    )
    if args.lr == 0:
        raise InvalidInputError("lr must be above 0")
    if not 0 < args.initial_ratio < 1:
        raise InvalidInputError(f"initial-ratio must lie between 0 and 1, got {args.initial_ratio:g}")
    for name in TARGETS:
        value = getattr(args, f"target_{name}")
        if value is not None and not (0 < value < float("inf")):
            raise InvalidInputError(f"target-{name} must be above 0, got {value:g}")
    if args.evaluate is None and args.budget >= 1:
        raise InvalidInputError(
            f"budget must be below 1, as accuracies lie between 0 and 1 (0.02: two points), got {args.budget:g}"
        )
    if args.criterion not in criterion_names():
        near = difflib.get_close_matches(args.criterion, criterion_names(), n=2)
        raise InvalidInputError(
            f"there is no criterion {args.criterion!r}"
            + (
                f"; did you mean {' or '.join(near)}?"
                if near
                else f"; there are {', '.join(criterion_names())}"
            )
        )


def _criterion(name: str, calibration: Any, example: Any) -> Criterion:
    made: dict[str, Callable[[], Criterion]] = {
        "taylor": lambda: criteria.taylor(calibration.pairs),
        "bn_scale": lambda: criteria.bn_scale(example),
    }
    if name in made:
        return made[name]()
    return criteria.RIVALS.get(name, criteria.flow_divergence)


def _function(spec: str | None, what: str) -> Callable[[nn.Module, Any], Any] | None:
    """The user's function as one of ``(model, batches)``; it may also be one of the model alone.

    Raises:
        InvalidInputError: it cannot be imported, or takes something else.
    """
    if spec is None:
        return None
    function = import_object(spec, what)
    if not callable(function):
        raise InvalidInputError(f"{what}: {spec} is {a_kind(function)}, wanted a function")

    def run(*arguments: Any) -> Any:
        with users_code(f"--{what} {spec}"):
            return function(*arguments)

    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built in
        return lambda model, loader: run(model)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional if p.default is p.empty]
    strange = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if len(needed) > 2 or not positional or strange:
        raise InvalidInputError(
            f"{what}: {spec}{inspect.signature(function)} must take (model) or (model, batches)"
        )
    if len(needed) == 2:
        return run
    return lambda model, loader: run(model)


def _join_processes(args: argparse.Namespace) -> None:
    """Form the process group of ``torchrun`` or ``accelerate launch``, if one of them started us."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or torch.distributed.is_initialized():
        return
    from accelerate import PartialState

    args.device = str(PartialState(cpu=args.device == "cpu").device)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    plain = {key: value for key, value in vars(args).items() if key not in _FREE}
    settings: dict[str, Any] = json.loads(json.dumps(plain, default=str))
    return {"command": "idap prune", "settings": settings}


def _compare_settings(args: argparse.Namespace) -> None:
    """Refuse to go on with a run by other settings than it began with."""
    path = args.output / SETTINGS
    if not args.resume or not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged ({error})") from error
    now = _settings(args)["settings"]
    # Filled in when the model is looked up.
    now["weights"] = now["weights"] or before.get("weights")
    for name in now:
        if name == "by_latency" and name not in before and not now[name]:
            continue  # begun before there was a choice
        if before.get(name) != now[name]:
            raise InvalidInputError(
                f"{args.output} holds a run with {name}={before.get(name)!r}, now it is {now[name]!r}; go on with "
                "the arguments it began with, or give another --output"
            )


def _how_to_go_on(args: argparse.Namespace) -> str:
    if not (args.output / rundir.RUN).exists():
        return "\ninterrupted: nothing was written"
    return f"\ninterrupted: {args.output} holds every step so far; to go on: {_resuming(args)}"


def _resuming(args: argparse.Namespace) -> str:
    return shlex.join(["idap", *args.argv, *([] if args.resume else ["--resume"])])


def _write_json(path: Path, content: Any) -> None:
    if distributed.world()[0]:
        return
    try:
        rundir.write_atomically(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror})") from error


def _stages(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not set(names) <= set(STAGES) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted filters,layers or layers,filters or one of both")
    return names
