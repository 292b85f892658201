"""What the build did on this machine, as setup.py recorded it beside the package."""

from __future__ import annotations

import json
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any


@cache
def build_info() -> dict[str, Any]:
    """The build record: for each extension its state, and the reason where it was not built.

    An empty dictionary if the package was never built (for example, run from a source tree).
    """
    path = Path(__file__).with_name("_build.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def extension_missing(name: str, error: ImportError | None) -> str:
    """Why extension ``name`` (``_cpu`` or ``_cuda``) is not there, and what to do."""
    record = build_info().get(name, {})
    reason = record.get("reason")
    if reason:
        return f"the extension was not built: {reason}"
    if not build_info():
        return "the extension was never built here: run 'pip install -e .' in the source tree"
    library = Path(__file__).with_name(name + str(sysconfig.get_config_var("EXT_SUFFIX")))
    if not library.exists():
        return f"{library.name} is missing (built for another Python, or deleted): install idap again"
    return f"the extension does not load: {error}"
