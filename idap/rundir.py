"""The directory of a run: every decision in a journal, the accepted model beside it, so that a run can go on.

``run.json`` says what was asked for, ``journal.jsonl`` holds one decision a line, ``checkpoint-NNNN`` the model
of the last accepted step, until ``model`` holds that of the end. A run is a function of its decisions: to
resume, they are read back instead of being made again, and the work goes on where the journal ends. A line
counts once it is complete; what a crash left behind half written is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from . import artifact, distributed
from .errors import ArtifactError
from .plan import PruningPlan

T = TypeVar("T")
FORMAT = "idap-run"
FORMAT_VERSION = 1
RUN, JOURNAL, RESULT, MODEL = "run.json", "journal.jsonl", "result.json", "model"
_CHECKPOINT = "checkpoint-"


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers())):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().tobytes())
    return digest.hexdigest()


class Journal:
    """The decisions of a run in memory; :class:`RunDirectory` keeps them on disk too."""

    def __init__(self, events: list[dict[str, Any]] | None = None) -> None:
        self.events = events or []
        self.position = 0

    @property
    def replaying(self) -> bool:
        """Whether the next decision is read rather than made."""
        return self.position < len(self.events)

    def decide(self, kind: str, compute: Callable[[], T]) -> T:
        """What was decided here before, or else what ``compute`` gives now, the same on every process.

        ``compute`` must return plain JSON data.
        """
        if self.replaying:
            return self.read(kind)["value"]  # type: ignore[no-any-return]
        value = distributed.from_first(compute())
        self.write({"event": kind, "value": value})
        return value

    def read(self, kind: str) -> dict[str, Any]:
        """The next decision of the journal, which has to be of this kind."""
        event = self.events[self.position]
        if event.get("event") != kind:
            raise ArtifactError(
                f"line {self.position + 1} of the journal is a {event.get('event')!r} where the run wants a "
                f"{kind!r}: another version wrote it, or data or model are not those of the run"
            )
        self.position += 1
        return event

    def write(self, event: dict[str, Any]) -> None:
        """Add a decision."""
        self.events.append(event)
        self.position = len(self.events)

    def keep(self, model: nn.Module, plan: PruningPlan) -> dict[str, Any] | None:
        """Put a model where a later run finds it; what the journal has to say about it."""
        return None

    def drop_old(self) -> None:
        """Forget models that were kept before the last one."""


class RunDirectory(Journal):
    """A journal with its directory.

    Only rank 0 touches the disk; the other processes of a run get what it read.

    Args:
        settings: what the run was asked for; a run is continued only with the same.
        resume: go on with a run that is there; without it such a directory is refused.

    Raises:
        ArtifactError: the directory cannot be written, is in use by another process, holds something else
            than a run, or a run that is damaged or was made with another model or other settings.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = Path(path)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False, default=_plain))
        self.leads = distributed.world()[0] == 0
        self._lock: int | None = None
        problem, events = None, []
        if self.leads:
            try:
                events = self._open(resume)
            except OSError as error:
                problem = str(error) if isinstance(error, ArtifactError) else _cannot_write(self.path, error)
        problem, events = distributed.from_first((problem, events))
        if problem is not None:
            self.close()
            raise ArtifactError(problem)
        super().__init__(events)

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ------------------------------------------------------------------------------------ opening

    def _open(self, resume: bool) -> list[dict[str, Any]]:
        if self.path.exists() and not self.path.is_dir():
            raise ArtifactError(f"{self.path} is a file; give a directory")
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        present = sorted(entry.name for entry in self.path.iterdir())
        if RUN not in present:
            leftovers = [n for n in present if n not in (JOURNAL, _temporary(RUN), _temporary(JOURNAL))]
            if leftovers:
                raise ArtifactError(
                    f"{self.path} is not empty and holds no run of idap ({', '.join(leftovers[:3])}"
                    f"{' ...' if len(leftovers) > 3 else ''}); give another directory"
                )
            return self._begin()
        description, events = read_description(self.path), read_events(self.path)
        if not _any_step(events):
            # Nothing was done yet; most likely the arguments were wrong.
            return self._begin()
        if not resume:
            raise ArtifactError(
                f"{self.path} holds a run already; continue it with resume=True (--resume), or give another "
                "directory"
            )
        self._compare(description.get("settings"), self.settings)
        self._cut_to(events)
        return events

    def _begin(self) -> list[dict[str, Any]]:
        description = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "settings": self.settings,
            "versions": artifact.versions(),
        }
        write_atomically(self.path / JOURNAL, "")
        write_atomically(self.path / RUN, json.dumps(description, indent=1))
        return []

    def _compare(self, before: Any, now: Mapping[str, Any]) -> None:
        if not isinstance(before, dict):
            raise ArtifactError(f"{self.path / RUN}: damaged, it has no settings")
        for name in (*now, *before):
            if before.get(name) != now.get(name):
                if name == "model":
                    raise ArtifactError(
                        f"{self.path} holds a run on another model ({before.get(name)}, now {now.get(name)}): "
                        "give the original with the weights it had at the start of the run, or another directory"
                    )
                raise ArtifactError(
                    f"{self.path} holds a run with {name}={before.get(name)!r}, now it is {now.get(name)!r}; "
                    "continue it with the settings it began with, or give another directory"
                )

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        # Of the directory itself, since files in it are replaced. It ends with the process, however that ends.
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ArtifactError(f"{self.path} is in use by another process; wait for its end") from error

    def _cut_to(self, events: list[dict[str, Any]]) -> None:
        """Drop an unfinished last line, and models that no line speaks of."""
        lines = (self.path / JOURNAL).read_bytes()
        whole = lines[: lines.rfind(b"\n") + 1]
        if whole != lines:
            write_atomically(self.path / JOURNAL, whole.decode("utf-8"))
        named = {event["checkpoint"]["directory"] for event in events if event.get("checkpoint")}
        for entry in self.path.iterdir():
            if (
                entry.name.startswith((_CHECKPOINT, f".{_CHECKPOINT}", f".{MODEL}"))
                and entry.name not in named
            ):
                shutil.rmtree(entry, ignore_errors=True)

    # ------------------------------------------------------------------------------------ writing

    def write(self, event: dict[str, Any]) -> None:
        """Add a decision, on disk before it is acted on."""
        super().write(event)
        if not self.leads:
            return
        try:
            with (self.path / JOURNAL).open("a", encoding="utf-8") as file:
                file.write(json.dumps(event, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ArtifactError(_cannot_write(self.path, error)) from error

    def keep(self, model: nn.Module, plan: PruningPlan) -> dict[str, Any] | None:
        name = f"{_CHECKPOINT}{len(self.events):04d}"
        if not self.leads:
            return {"directory": name}
        artifact.save(model=model, plan=plan, directory=self.path / name)
        return {"directory": name, "sha256": artifact.describe(self.path / name)["sha256"]}

    def drop_old(self) -> None:
        if not self.leads:
            return
        named = [event["checkpoint"]["directory"] for event in self.events if event.get("checkpoint")]
        for entry in self.path.glob(f"{_CHECKPOINT}*"):
            if not named or entry.name != named[-1]:
                shutil.rmtree(entry, ignore_errors=True)

    def restore(self, checkpoint: Mapping[str, Any], original: nn.Module, device: Any) -> nn.Module:
        """The model of a line of the journal.

        Raises:
            ArtifactError: it is gone or damaged.
        """
        path = self.path / str(checkpoint["directory"])
        if not path.exists() and (self.path / RESULT).exists():
            path = self.path / MODEL  # the run is over, and this is all that it keeps
        if artifact.describe(path).get("sha256") != checkpoint.get("sha256"):
            raise ArtifactError(f"{path}: it is not the model that the journal speaks of")
        return artifact.load(path, lambda: original, device=device)

    def finish(self, result: Any, report: Mapping[str, Any]) -> None:
        """Write the model and the figures of a run that is over."""
        if not self.leads:
            return
        try:
            artifact.save(result, self.path / MODEL)
            write_atomically(self.path / RESULT, json.dumps(report, indent=1, allow_nan=False))
            for entry in self.path.glob(f"{_CHECKPOINT}*"):
                shutil.rmtree(entry, ignore_errors=True)
        except OSError as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(_cannot_write(self.path, error)) from error


def has_steps(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a run that has done more than to look at the original.

    Raises:
        ArtifactError: its journal is damaged.
    """
    place = Path(path)
    return (place / RUN).is_file() and (place / JOURNAL).is_file() and _any_step(read_events(place))


def _any_step(events: list[dict[str, Any]]) -> bool:
    return any(event["event"] == "step" and event["record"]["stage"] != "base" for event in events)


def read_description(path: Path) -> dict[str, Any]:
    """What ``run.json`` says.

    Raises:
        ArtifactError: there is none, or it is damaged or of another format.
    """
    try:
        description = json.loads((path / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} holds no run of idap: it has no {RUN}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path / RUN}: damaged ({error})") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ArtifactError(f"{path / RUN}: not the description of a run")
    if description.get("version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path / RUN}: version {description.get('version')!r}, wanted {FORMAT_VERSION}; another version of "
            "idap wrote it"
        )
    return description


def read_events(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; one that a crash cut off at the end is left out.

    Raises:
        ArtifactError: the journal is missing, or a line within it is damaged.
    """
    try:
        lines = (path / JOURNAL).read_bytes().split(b"\n")
    except OSError as error:
        raise ArtifactError(f"{path / JOURNAL}: {error}") from error
    events = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            event = json.loads(line)
        except ValueError as error:
            raise ArtifactError(f"{path / JOURNAL}: line {number} is damaged ({error})") from error
        if not _is_decision(event):
            raise ArtifactError(f"{path / JOURNAL}: line {number} is damaged (it is no decision of a run)")
        events.append(event)
    return events


def _is_decision(event: Any) -> bool:
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    if event["event"] != "step":
        value = event.get("value")
        plan = isinstance(value, dict) and {"plan", "action"} <= value.keys()
        return "value" in event and (plan or event["event"] != "plan")
    record, kept = event.get("record"), event.get("checkpoint")
    if not isinstance(record, dict) or not isinstance(record.get("stage"), str):
        return False
    return kept is None or (isinstance(kept, dict) and isinstance(kept.get("directory"), str))


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as those of Python."""
    return value.item()


def write_atomically(path: Path, text: str) -> None:
    """A file that is there whole or, after a crash, as it was before."""
    temporary = path.with_name(_temporary(path.name))
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _temporary(name: str) -> str:
    return f".{name}.part"


def _cannot_write(path: Path, error: OSError) -> str:
    return f"{path}: cannot be written ({error.strerror or error}); choose another directory"
