"""The command line: ``idap quickstart``, ``prune``, ``profile``, ``latency``, ``models``, ``report``, ``doctor``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for an error of ours or wrong usage, 130 after Ctrl-C."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED


def _main(arguments: list[str]) -> int:
    # Here and in _parser, since these imports take seconds, in which Ctrl-C counts too.
    from .errors import IdapError
    from .models import UserCodeError

    args = _parser().parse_args(arguments, argparse.Namespace(argv=arguments))
    try:
        return int(args.run(args))
    except IdapError as error:
        if isinstance(error, UserCodeError):
            print(error.frames, end="", file=sys.stderr)
        print(f"idap: {_one_line(error)}", file=sys.stderr)
        return EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    from .commands import inspect_model, list_models, prune
    from .quickstart.settings import Settings

    parser = argparse.ArgumentParser(
        prog="idap", description="Prune PyTorch models by flow divergence (IDAP++)."
    )
    parser.add_argument("--version", action="version", version=f"idap {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    quickstart = commands.add_parser(
        "quickstart",
        help="compress an embedded network on embedded data, in about a minute",
        description="Both stages of IDAP++ (filters, then layers) on a small residual network and the UCI "
        "digits, with fine-tuning after every step. Prints a table, and writes the pruned model, its figures "
        "and pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = Settings()

    def option(name: str, kind: type, metavar: str, text: str) -> None:
        default = getattr(defaults, name.replace("-", "_"))
        quickstart.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)

    option("output", Path, "DIR", "where model, results and pictures go")
    option("target-macs", float, "X", "stop at this fraction of the original MACs")
    option("budget", float, "X", "validation accuracy that may be lost (0.02: 2 points)")
    option("steps", int, "N", "most steps of the filter stage")
    option(
        "initial-ratio",
        float,
        "X",
        "share of the filters that the first step removes; it grows from step to step",
    )
    option("epochs", int, "N", "epochs of fine-tuning after every step, 0 for none")
    option("final-epochs", int, "N", "epochs of the final fine-tuning, 0 for none")
    option("lr", float, "X", "learning rate of the fine-tuning")
    option("seed", int, "N", "seed of the fine-tuning")
    option("latency-runs", int, "N", "rounds of the latency measurement")
    option("backend", str, "NAME", "kernels of the profile; see idap doctor")
    unset = argparse.SUPPRESS  # the default is that of Settings, and not worth printing
    flag = quickstart.add_argument
    flag("--threads", type=int, metavar="N", default=unset, help="CPU threads (default: as torch chooses)")
    flag("--no-plots", dest="plots", action="store_false", default=unset, help="draw no pictures")
    flag("--quiet", action="store_true", default=unset, help="no progress, only the table and what follows")
    quickstart.set_defaults(run=_quickstart)

    prune.add_parser(commands)
    inspect_model.add_parsers(commands)
    list_models.add_parser(commands)

    report = commands.add_parser("report", help="a page with figures and pictures of a run of idap prune")
    report.add_argument("directory", type=Path, metavar="DIR", help="the --output of idap prune")
    report.add_argument(
        "--output", type=Path, metavar="PATH", help="a directory, or the page, .html (default: DIR/report)"
    )
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="what is installed, what works, and why something does not")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _quickstart(args: argparse.Namespace) -> int:
    from .quickstart.run import run
    from .quickstart.settings import Settings

    settings = {name: value for name, value in vars(args).items() if name not in ("run", "argv")}
    run(Settings(**settings))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from idap_kernels import doctor

    report = doctor.report()
    print(json.dumps(report, indent=1, default=str) if args.json else doctor.format_report(report))
    return 0


def _report(args: argparse.Namespace) -> int:
    from .report import write_report

    print(write_report(args.directory, args.output))
    return 0


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    # What a worker process of a DataLoader raised comes with the worker's traceback before it.
    if lines and lines[0].startswith("Caught ") and "worker process" in lines[0]:
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    return " ".join(" ".join(lines).split())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("idap")
    except PackageNotFoundError:
        # A tree that is not installed has no metadata.
        from idap_kernels.version import __version__

        return __version__
