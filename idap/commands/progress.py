"""Progress of a pruning run for people: a line a step, a bar on a terminal, and how long it may still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ..compress import StepRecord
from ..training import EpochReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Estimate:
    """The time that a run may still take, from its steps so far.

    The first stage ends at the target or after ``steps`` steps, whichever comes first, and the second ends at
    the target; so the share of the way that is behind tells the rest, if it goes on as fast. Without a target
    the end of the second stage is not known.

    Args:
        target: as given to :func:`idap.compress`.
        steps: most steps of the filter stage.
        final_epochs: epochs of the last fine-tuning.
    """

    def __init__(self, target: Mapping[str, float] | None, steps: int, final_epochs: int) -> None:
        self.target = dict(target or {})
        self.steps, self.final_epochs = steps, final_epochs
        self.base: StepRecord | None = None
        self.seconds = 0.0
        self.kept = 0
        self.done = 0.0
        self.stage = "base"
        self.epoch_seconds = 0.0

    def add(self, record: StepRecord) -> None:
        """Take a step into account."""
        if self.base is None:
            self.base = record
            return
        self.seconds += record.seconds
        self.stage = record.stage
        if record.accepted:
            self.kept += record.stage == "filters"
            self.done = self._share(record)

    def left(self) -> float | None:
        """Seconds; None where nothing can be said."""
        done = self.done
        if self.stage == "filters":
            done = max(done, self.kept / self.steps)
        if self.stage == "final":
            return 0.0
        if done <= 0:
            return None
        return self.seconds * (1 - done) / done + self.final_epochs * self.epoch_seconds

    def _share(self, record: StepRecord) -> float:
        """Share of the way to the target: that of the part of it which is furthest."""
        shares = []
        for name, goal in self.target.items():
            full, now = getattr(self.base, name), getattr(record, name)
            if full is None or now is None:
                continue
            absolute = goal * full if goal <= 1 else goal
            shares.append((full - now) / (full - absolute) if absolute < full else 1.0)
        return min(max(min(shares), 0.0), 1.0) if shares else 0.0


class StepDisplay:
    """Prints every step, and on a terminal shows what is being done below the steps.

    Use it as a context manager; :meth:`step` and :meth:`epoch` are the callbacks of :func:`idap.compress` and
    :func:`idap.finetune`.
    """

    def __init__(
        self, console: Console, estimate: Estimate, format_metric: Callable[[float], str], *, quiet: bool
    ) -> None:
        self.console, self.estimate, self.format_metric, self.quiet = console, estimate, format_metric, quiet
        self._bar: Progress | nullcontext[None] = nullcontext()
        self._epoch_start = time.perf_counter()
        self._headed = False
        if not quiet and console.is_terminal:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("measuring the original", total=1.0, left="")

    def __enter__(self) -> StepDisplay:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def say(self, text: str) -> None:
        """A line, unless quiet."""
        if not self.quiet:
            self.console.print(text, soft_wrap=True, markup=False)

    def doing(self, text: str) -> None:
        """What comes next, beside the bar."""
        self._epoch_start = time.perf_counter()
        self._update(description=text)

    def epoch(self, report: EpochReport) -> None:
        """An epoch of training has ended."""
        now = time.perf_counter()
        self.estimate.epoch_seconds, self._epoch_start = now - self._epoch_start, now
        coming = min(report.epoch + 1, report.epochs)
        self._update(description=f"fine-tuning, epoch {coming} of {report.epochs}, loss {report.loss:.3g}")

    def past(self, records: list[StepRecord]) -> None:
        """Steps of a run that is taken up again."""
        for record in records:
            self._line(record)
        if records:
            steps = len(records) - 1
            self.say(f"going on after {steps} step{'s' * (steps != 1)}")

    def step(self, record: StepRecord) -> None:
        """A step has been decided."""
        self._line(record, with_rest=True)
        self._update(completed=self.estimate.done, left=self._rest())
        self.doing("profiling")

    def _line(self, record: StepRecord, with_rest: bool = False) -> None:
        self.estimate.add(record)
        base = self.estimate.base or record
        if not self._headed:
            self._headed = True
            self.say(
                f"{'stage':<7} {'step':<44} {'':<6} {'MACs':>6} {'params':>6}  {'validation':>10}  {'drift':>8}  "
                f"{'time':>8}"
            )
        rest = self._rest() if with_rest and isinstance(self._bar, nullcontext) else ""
        self.say(
            f"{record.stage:<7} {record.action:<44} {'kept' if record.accepted else 'undone':<6} "
            f"{record.macs / max(base.macs, 1):6.1%} {record.params / max(base.params, 1):6.1%}  "
            f"{self.format_metric(record.metric):>10}  {record.drift:8.2g}  {record.seconds:6.1f} s"
            + (f"  {rest}" if rest else "")
            + (f"  {record.note}" if record.note else "")
        )

    def _rest(self) -> str:
        left = self.estimate.left()
        return f"{duration(left)} left" if left else ""

    def _update(self, **fields: Any) -> None:
        if not isinstance(self._bar, nullcontext):
            self._bar.update(self._task, **fields)


def duration(seconds: float) -> str:
    """Seconds in words of two digits' worth: ``"about 40 s"``, ``"about 12 min"``, ``"about 3.5 h"``."""
    if seconds < 90:
        return f"about {max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
