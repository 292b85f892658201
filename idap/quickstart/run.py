"""The main job on the embedded default: prune, recover, measure, save, draw."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from idap_kernels.dispatch import BACKENDS

from .. import artifact
from ..complexity import count_macs, count_params
from ..compress import CompressionResult, StepRecord, compress, drift
from ..criteria import flow_divergence, layer_divergence
from ..errors import ArtifactError, InvalidInputError
from ..latency import compare_latency, torch_threads
from ..profile import profile
from ..report import (
    StageSummary,
    layer_widths,
    mean_divergence,
    plot_divergence,
    plot_steps,
    plot_widths,
    stage_table,
)
from ..training import EpochReport, finetune
from .data import TrainingBatches, load_digits
from .network import DigitsResNet, load_network
from .settings import Settings
from .train import accuracy

if TYPE_CHECKING:
    from rich.console import Console

COMMAND = "idap quickstart"
MODEL, RESULTS = "model", "results.json"
PICTURES = ("steps.png", "widths.png", "divergence.png")
STAGE_NAMES = {
    "filters": "1: filters",
    "layers": "2: layers",
    "final": "fine-tuned",
}


@dataclass(frozen=True)
class Outcome:
    """What a run of the quickstart gives back; the same figures are in its ``results.json``."""

    rows: tuple[StageSummary, ...]
    result: CompressionResult = field(repr=False)
    directory: Path
    seconds: float


def run(settings: Settings, console: Console | None = None) -> Outcome:
    """Compress the embedded network, print the table, and write model, pictures and results.

    The run decides by the validation split; the table shows the test split, which nothing else has read. The
    directory appears (or changes) only at the end, when everything in it is complete.

    Raises:
        InvalidInputError: a setting is out of range.
        ArtifactError: the output directory holds something else than an earlier run, or cannot be written.
    """
    if console is None:
        from rich.console import Console

        console = Console(highlight=False)
    _check(settings)
    check_output(settings.output)
    start = time.perf_counter()
    with torch_threads(settings.threads):
        return _run(settings, console, start)


def _run(settings: Settings, console: Console, start: float) -> Outcome:
    digits = load_digits()
    original = load_network()
    example = digits["train"].images[:1]
    calibration = digits["train"].inputs(128)
    show = _Display(console, settings)
    show.say(
        f"Digits: {len(digits['train'])} training, {len(digits['validation'])} validation and "
        f"{len(digits['test'])} test images of 8x8; DigitsResNet with {count_params(original):,} parameters."
    )
    stages: list[tuple[str, nn.Module]] = [("original", original)]

    def train(model: nn.Module, epochs: int) -> None:
        finetune(
            model,
            TrainingBatches(digits["train"]),
            epochs=epochs,
            lr=settings.lr,
            teacher=original,
            # compress seeds torch before every training, so that this differs from step to step.
            seed=int(torch.randint(2**31, ())),
            progress=show.epoch,
        )

    with _staging(settings.output) as staging, show:
        result = compress(
            original,
            calibration,
            evaluate=lambda model: accuracy(model, digits["validation"]),
            finetune=(lambda model: train(model, settings.epochs)) if settings.epochs else None,
            final_finetune=(lambda model: train(model, settings.final_epochs))
            if settings.final_epochs
            else False,
            target={"macs": settings.target_macs},
            budget=settings.budget,
            steps=settings.steps,
            initial_ratio=settings.initial_ratio,
            example_inputs=example,
            backend=settings.backend,
            progress=show.step,
            on_stage=lambda name, model: stages.append((STAGE_NAMES[name], model)),
            seed=settings.seed,
        )
        show.doing("timing the models in turns")
        rows = _rows(stages, digits["test"], example, settings.latency_runs)

        show.doing("saving, and loading again")
        artifact.save(result, staging / MODEL)
        _prove(staging / MODEL, result.model, digits["test"].images)
        if settings.plots:
            show.doing("drawing")
            _draw(result, original, calibration, example, settings.backend, staging)
        seconds = time.perf_counter() - start
        _write_results(
            staging / RESULTS,
            settings,
            rows,
            result,
            drift(original, result.model, digits["test"].inputs(256)),
            seconds,
        )
        _publish(staging, settings.output)

    console.print(
        stage_table(
            rows,
            title="IDAP++ on the embedded digits, before and after each stage",
            caption=f"Accuracy: {len(digits['test'])} test images, read by no decision. Latency: one image, "
            f"1 thread, median and p10-p90 of {settings.latency_runs} rounds with the models in turns.",
        )
    )
    _say_end(console, settings, result, seconds)
    return Outcome(tuple(rows), result, settings.output, seconds)


def loading_code(directory: Path) -> str:
    """Python that loads the pruned model of a run and uses it."""
    return (
        "import idap\n"
        "from idap.quickstart import DigitsResNet, load_digits\n"
        f"model = idap.load({str(directory / MODEL)!r}, DigitsResNet)\n"
        'print(model(load_digits()["test"].images[:5]).argmax(dim=1))'
    )


def check_output(directory: Path) -> None:
    """Refuse a path that is no directory, or a directory that holds anything but an earlier quickstart.

    Raises:
        ArtifactError: with the reason.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is a file; give a directory with --output")
    entries = sorted(entry.name for entry in directory.iterdir())
    if not entries:
        return
    try:
        command = json.loads((directory / RESULTS).read_text(encoding="utf-8")).get("command")
    except (OSError, ValueError, AttributeError):
        command = None
    if command != COMMAND:
        listing = ", ".join(entries[:3]) + (" ..." if len(entries) > 3 else "")
        raise ArtifactError(
            f"{directory} is not empty and was not written by {COMMAND} (it holds {listing}); "
            "give another directory with --output"
        )


def _check(settings: Settings) -> None:
    if not 0 < settings.target_macs <= 1:
        raise InvalidInputError(
            f"target-macs must be a fraction of the original, above 0 up to 1; got {settings.target_macs!r}"
        )
    if settings.backend not in ("auto", *BACKENDS):
        raise InvalidInputError(
            f"backend must be auto, {' or '.join(BACKENDS)}, got {settings.backend!r}; see idap doctor"
        )
    for name in ("budget", "lr"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and (value > 0 if name == "lr" else value >= 0)):
            raise InvalidInputError(
                f"{name} must be finite and {'above' if name == 'lr' else 'at least'} 0, got {value!r}"
            )
    for name in ("steps", "latency_runs"):
        if getattr(settings, name) < 1:
            raise InvalidInputError(
                f"{name.replace('_', '-')} must be at least 1, got {getattr(settings, name)}"
            )
    if not 0 < settings.initial_ratio < 1:
        raise InvalidInputError(f"initial-ratio must lie between 0 and 1, got {settings.initial_ratio!r}")
    for name in ("epochs", "final_epochs"):
        if getattr(settings, name) < 0:
            raise InvalidInputError(
                f"{name.replace('_', '-')} must be at least 0, got {getattr(settings, name)}"
            )
    if settings.threads is not None and settings.threads < 1:
        raise InvalidInputError(f"threads must be at least 1, got {settings.threads}")


def _rows(
    stages: list[tuple[str, nn.Module]], test: Any, example: torch.Tensor, runs: int
) -> list[StageSummary]:
    names = [name for name, _ in stages]
    # A stage that had to be taken up again appears twice.
    labels = [name if name not in names[:i] else f"{name}, again" for i, name in enumerate(names)]
    models = dict(zip(labels, (model for _, model in stages), strict=True))
    comparison = compare_latency(models, example, runs=runs, threads=1)
    return [
        StageSummary(
            name=label,
            params=count_params(model),
            macs=count_macs(model, example),
            accuracy=accuracy(model, test),
            latency=comparison.stats[label],
            speedup=comparison.speedup(label, over=labels[0]),
        )
        for label, model in models.items()
    ]


def _prove(directory: Path, model: nn.Module, images: torch.Tensor) -> None:
    """Load the saved model and compare its outputs with the one in memory, to the last bit."""
    loaded = artifact.load(directory, DigitsResNet).eval()
    with torch.inference_mode():
        if not torch.equal(loaded(images), model.eval()(images)):
            raise ArtifactError(f"the model loaded from {directory} gives other outputs than the one saved")


def _draw(
    result: CompressionResult,
    original: nn.Module,
    calibration: list[torch.Tensor],
    example: torch.Tensor,
    backend: str,
    directory: Path,
) -> None:
    steps, widths, divergence = (directory / name for name in PICTURES)
    plot_steps(result, steps, metric_name="Validation accuracy")
    plot_widths(layer_widths(original), layer_widths(result.model), widths)
    before = profile(original, calibration, backend=backend, progress=False)
    after = profile(result.model, calibration, backend=backend, progress=False)
    plot_divergence(
        mean_divergence(flow_divergence(original, before)),
        mean_divergence(flow_divergence(result.model, after)),
        layer_divergence(original, before),
        layer_divergence(result.model, after),
        divergence,
    )


def _write_results(
    path: Path,
    settings: Settings,
    rows: list[StageSummary],
    result: CompressionResult,
    test_drift: float,
    seconds: float,
) -> None:
    content = {
        "command": COMMAND,
        "torch": torch.__version__,
        "settings": {**asdict(settings), "output": str(settings.output)},
        "seconds": round(seconds, 1),
        "stages": [row.to_dict() for row in rows],
        "test_drift": test_drift,
        "compression": result.to_dict(),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A directory beside the output, gone afterwards whatever happens."""
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
    except OSError as error:
        raise ArtifactError(
            f"cannot write beside {output}: {error.strerror}; give another directory with --output"
        ) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, output: Path) -> None:
    """Move what is finished into the output directory; files of the user in it stay."""
    check_output(output)
    output.mkdir(exist_ok=True)
    for name in (MODEL, *PICTURES, RESULTS):
        old, new = output / name, staging / name
        if old.is_dir():
            shutil.rmtree(old)
        elif old.exists():
            old.unlink()
        if new.exists():
            os.replace(new, old)


def _say_end(console: Console, settings: Settings, result: CompressionResult, seconds: float) -> None:
    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    if not result.reached_target:
        reasons = "; ".join(f"{stage}: {reason}" for stage, reason in result.stopped.items())
        share = result.macs / result.baseline.macs
        say(
            f"The target of {settings.target_macs:.0%} MACs was not reached; {share:.0%} is left ({reasons})."
        )
    last = result.history[-1]
    if last.stage == "final" and not last.accepted:
        say(
            f"The final fine-tuning was undone: validation accuracy fell to {last.metric:.2%} "
            f"from {result.metric:.2%}."
        )
    written = [f"{MODEL}/", RESULTS, *(PICTURES if settings.plots else ())]
    say(f"{seconds:.0f} s. Written to {settings.output}: {', '.join(written)}")
    say("The saved model was loaded again and gives the same outputs to the last bit. To load it yourself:\n")
    for line in loading_code(settings.output).splitlines():
        say(f"    {line}")


class _Display:
    """Progress on the console: a line for every step, and a bar from the original to the target."""

    def __init__(self, console: Console, settings: Settings) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        self.console = console
        self.quiet = settings.quiet
        self.target = settings.target_macs
        self.full = 1
        self.bar: Progress | nullcontext[None] = nullcontext()
        if not settings.quiet:
            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task("profiling", total=1.0)

    def __enter__(self) -> _Display:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, soft_wrap=True)

    def doing(self, text: str) -> None:
        if not isinstance(self.bar, nullcontext):
            self.bar.update(self.task, description=text)

    def epoch(self, report: EpochReport) -> None:
        self.doing(f"fine-tuning, epoch {report.epoch} of {report.epochs}")

    def step(self, record: StepRecord) -> None:
        if record.stage == "base":
            self.full = record.macs
            self.say(f"\n{'stage':<7} {'step':<34} {'':<6} {'MACs':>6}  {'validation':>10}  {'time':>7}")
        self.say(
            f"{record.stage:<7} {record.action:<34} {'kept' if record.accepted else 'undone':<6} "
            f"{record.macs / self.full:6.1%}  {record.metric:10.2%}  {record.seconds:5.1f} s"
        )
        if record.accepted and not isinstance(self.bar, nullcontext):
            done = (1 - record.macs / self.full) / (1 - self.target) if self.target < 1 else 1.0
            self.bar.update(self.task, completed=min(done, 1.0))
        self.doing("profiling")
