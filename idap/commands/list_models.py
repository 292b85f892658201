"""``idap models``: the architectures of the paper, and what was tried on each."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import InvalidInputError
from ..inputs import named_tensors
from ..models.architectures import Architecture
from ..models.resolve import suggest


def add_parser(commands: Any) -> None:
    """The parser of ``idap models``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "models",
        help="the architectures of the paper: where they come from, what was tried on each",
        description="The networks of the IDAP++ paper that are built offline, by name, and tried in full. Every "
        "other model of torchvision, timm and transformers can be named as well.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="all that is known of one of them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the list, or one entry.

    Raises:
        InvalidInputError: there is no architecture of that name; says which are nearest.
    """
    from ..models.registry import ARCHITECTURES

    if args.name is not None and args.name not in ARCHITECTURES:
        raise InvalidInputError(
            f"there is no architecture {args.name!r} among those of the paper"
            f"{suggest(args.name, ARCHITECTURES)}; idap models lists them"
        )
    chosen = list(ARCHITECTURES.values()) if args.name is None else [ARCHITECTURES[args.name]]
    if args.json:
        print(json.dumps([describe(architecture) for architecture in chosen], indent=1))
    elif args.name is None:
        _print_list(chosen)
    else:
        _print_one(chosen[0])
    return 0


def describe(architecture: Architecture) -> dict[str, Any]:
    """An architecture as strings, numbers and lists; ``inputs`` holds the shapes of one sample's tensors."""
    return {
        "name": architecture.name,
        "title": architecture.title,
        "task": architecture.task,
        "libraries": list(architecture.builders),
        "inputs": _shapes(architecture),
        "paper": vars(architecture.paper),
        "notes": list(architecture.notes),
    }


def _shapes(architecture: Architecture) -> list[list[int]]:
    return [list(tensor.shape) for _, tensor in named_tensors(architecture.inputs(1))]


def _input(architecture: Architecture) -> str:
    """The shapes of one sample, without its batch dimension; scalars left out."""
    own = [shape[1:] if shape[:1] == [1] else shape for shape in _shapes(architecture)]
    return ", ".join("×".join(map(str, shape)) for shape in own if shape)


def _number(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:g}{unit}"


def _print_list(architectures: list[Architecture]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for column in ("Name", "From"):
        table.add_column(column, no_wrap=True)
    table.add_column("Input", overflow="fold")
    for column in ("GMACs", "Pruned", "Faster"):
        table.add_column(column, justify="right", no_wrap=True)
    for architecture in architectures:
        paper = architecture.paper
        table.add_row(
            architecture.name,
            ", ".join(architecture.builders),
            _input(architecture),
            _number(paper.gmacs, ""),
            _number(paper.pruned_gmacs, ""),
            _number(paper.speedup, "×"),
        )
    console = Console()
    console.print(table)
    console.print(
        "\nGMACs, smallest pruned network and RTX 3060 speed-up are the paper's (arXiv 2511.20141). "
        "idap models NAME says what was tried; any other model of torchvision, timm and transformers goes by "
        "its name too.",
        highlight=False,
    )


def _print_one(architecture: Architecture) -> None:
    paper = architecture.paper
    lines = [
        f"{architecture.name}: {architecture.title} ({architecture.task}), from {' or '.join(architecture.builders)}",
        f"input: {_input(architecture)}",
        f"paper: {_number(paper.gmacs, ' GMACs')}, pruned to {_number(paper.pruned_gmacs, ' GMACs')}, "
        f"{_number(paper.speedup, '× on an RTX 3060')}",
    ]
    print("\n".join([*lines, *(f"- {note}" for note in architecture.notes)]))
