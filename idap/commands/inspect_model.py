"""``idap profile`` and ``idap latency``: what a model's channels and blocks do, and how long it takes."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .. import artifact, rundir
from ..complexity import count_macs, count_params
from ..criteria import flow_divergence, layer_divergence
from ..data import batches as make_batches
from ..data import inputs_of
from ..errors import ArtifactError, InvalidInputError
from ..latency import compare_latency, torch_threads
from ..models import ModelFactory
from ..profile import ActivationProfile, profile
from ..report import TABLE, StageSummary
from .subject import (
    add_data_options,
    add_model_options,
    calibration_inputs,
    check_fit,
    check_numbers,
    first_sample,
    open_data,
    open_model,
    parse_shape,
    path_of,
    random_inputs,
    shapes_of,
)
from .tables import models_table, profile_tables


def add_parsers(commands: Any) -> None:
    """The parsers of ``idap profile`` and ``idap latency``."""
    shown: argparse.ArgumentParser = commands.add_parser(
        "profile",
        help="width, flow divergence, dead channels and APoZ of every layer, divergence of every block",
        description="Run MODEL over data once and print what its layers and removable blocks do. A channel is "
        "dead if its output was above 0 nowhere; APoZ is the share of outputs not above 0, before the "
        "activation.",
    )
    add_model_options(shown)
    add_data_options(shown, required=False, batches=10)
    shown.add_argument("--random", action="store_true", help="noise instead of data, for a first look")
    shown.add_argument("--input", type=parse_shape, metavar="SHAPE", help="of the noise: 16,3,224,224")
    shown.add_argument(
        "--backend", default="auto", metavar="NAME", help="of the kernels; see idap doctor (default: auto)"
    )
    shown.add_argument("--json", type=path_of, metavar="FILE", help="write all of it there")
    shown.set_defaults(run=run_profile)

    timed: argparse.ArgumentParser = commands.add_parser(
        "latency",
        help="time of one forward pass; with a run's directory the original and the pruned model in turns",
        description="Time MODEL on one input, after a warm-up, and with DIR the pruned model of that run too, "
        "both in turns. Weights do not matter and are not loaded.",
    )
    add_model_options(timed, weights=False)
    timed.add_argument(
        "directory", nargs="?", type=path_of, metavar="DIR", help="of idap prune, or of idap.save"
    )
    timed.add_argument("--input", type=parse_shape, metavar="SHAPE", help="shape of the input: 1,3,224,224")
    timed.add_argument(
        "--runs", type=int, default=100, metavar="N", help="timed passes of each model (default: 100)"
    )
    timed.add_argument("--warmup", type=int, default=10, metavar="N", help="passes before them (default: 10)")
    timed.add_argument("--json", action="store_true", help="print JSON")
    timed.set_defaults(run=run_latency)


def run_profile(args: argparse.Namespace) -> int:
    """Profile a model and print tables.

    Raises:
        IdapError: of any kind, for wrong input.
    """
    from rich.console import Console

    check_numbers(args, {"batch_size": 1, "calibration_batches": 1, "workers": 0, "threads": 1})
    if args.random == (args.data is not None):
        raise InvalidInputError("give either --data or --random")
    with torch_threads(args.threads):
        if args.random:
            subject = open_model(args)
            batches: Any = [
                random_inputs(subject, args.input, args.batch_size, i)
                for i in range(args.calibration_batches)
            ]
        else:
            subject, data = open_data(args, augment=False)
            sample = inputs_of(next(iter(make_batches(data.calibration, 1))))
            check_fit(args.model, subject.model, data.name, first_sample(sample, subject.model))
            batches = calibration_inputs(args, data)
        stats = profile(subject.model, batches, backend=args.backend)
    found = describe_profile(subject.model, stats)
    console = Console(highlight=False)
    for note in subject.notes:
        console.print(f"Note: {note}", soft_wrap=True, markup=False)
    source = "noise" if args.random else args.data.removesuffix(":")
    for table in profile_tables(found, f"{args.model} on {stats.samples:,} samples of {source}"):
        console.print(table)
    if not found["blocks"]:
        console.print("No block can be removed.")
    if args.json is not None:
        content = {"model": args.model, "data": source, "samples": stats.samples, **found}
        try:
            rundir.write_atomically(args.json, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise ArtifactError(f"{args.json}: cannot be written ({error.strerror})") from error
        console.print(f"Written to {args.json}", soft_wrap=True, markup=False)
    return 0


def describe_profile(model: nn.Module, stats: ActivationProfile) -> dict[str, Any]:
    """What ``idap profile`` prints: ``layers`` and ``blocks`` as plain data, in the order of the profile."""
    divergence = flow_divergence(model, stats)
    layers = [
        {
            "name": name,
            "width": channel.channels,
            "flow_divergence": float(divergence[name].mean()),
            "dead": int((channel.max <= 0).sum()),
            "apoz": float(channel.apoz.mean()),
        }
        for name, channel in stats.layers.items()
    ]
    blocks = [{"name": name, "divergence": value} for name, value in layer_divergence(model, stats).items()]
    return {"layers": layers, "blocks": blocks}


def run_latency(args: argparse.Namespace) -> int:
    """Time a model, or two in turns, and print a table or JSON.

    Raises:
        IdapError: of any kind, for wrong input.
    """
    from rich.console import Console

    check_numbers(args, {"runs": 1, "warmup": 0, "threads": 1})
    directory, known, recorded = (None, {}, None) if args.directory is None else _pruned(args.directory)
    given = args.input is not None or args.image_size is not None
    shape = args.input if given else recorded
    for name in ("num_classes", "image_size"):
        if getattr(args, name) is None:
            setattr(args, name, known.get(name))
    args.pretrained = bool(known.get("pretrained"))
    subject = open_model(args)
    models = {"original": subject.model}
    if directory is not None:
        models["pruned"] = artifact.load(directory, subject.factory, device=subject.device)
    example = random_inputs(subject, shape)
    if directory is not None and not given and recorded is None:
        print(
            f"Note: {args.directory} does not say what the inputs of its run were; timed on {shapes_of(example)}, "
            "--input gives another shape.",
            file=sys.stderr,
        )
    try:
        comparison = compare_latency(
            models, example, warmup=args.warmup, runs=args.runs, threads=args.threads
        )
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise InvalidInputError(
            f"{args.model} cannot run on an input {shapes_of(example)} ({error}); give its shape with --input"
        ) from error
    rows = [
        StageSummary(
            name=name,
            params=count_params(model),
            macs=count_macs(model, example),
            accuracy=math.nan,
            latency=comparison.stats[name],
            speedup=comparison.speedup(name, over="original"),
        )
        for name, model in models.items()
    ]
    if args.json:
        found = {
            row.name: {
                **comparison.stats[row.name].to_dict(),
                "params": row.params,
                "macs": row.macs,
                "speedup": row.speedup,
            }
            for row in rows
        }
        print(json.dumps(found, indent=1))
    else:
        stats = comparison.stats["original"]
        threads = f"{stats.threads} thread{'s' * (stats.threads != 1)}"
        caption = f"{stats.device}, {stats.dtype}, {threads}, {stats.runs} rounds"
        title = f"{args.model}, input {shapes_of(example)}"
        Console(highlight=False).print(models_table(rows, title=title, caption=caption))
    return 0


def _pruned(directory: Path) -> tuple[Path, Mapping[str, Any], tuple[int, ...] | None]:
    """Where the saved model is, and what a run says about the factory of the original and about its input."""
    inner = directory / rundir.MODEL
    if (directory / rundir.RUN).exists() and not inner.exists():
        raise ArtifactError(f"{directory} holds a run that is not over; idap prune --resume goes on with it")
    try:
        table = json.loads((directory / TABLE).read_text(encoding="utf-8"))
        factory = table["factory"]
        known = {key: factory[key] for key in vars(ModelFactory("")) if key in factory}
        shape = tuple(int(size) for size in table.get("input") or ()) or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known, shape = {}, None
    return (inner if inner.exists() else directory), known, shape
