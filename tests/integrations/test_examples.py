"""Every example runs as it is and prints what it found."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="runs in the source tree only")

NEEDS = {
    "modelopt": "modelopt",
    "fasterai": "fasterai",
    "llmcompressor": "llmcompressor",
    "resnet18": "torchvision",
}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_it_runs(name, capsys, tmp_path, monkeypatch):
    path = EXAMPLES / f"{name}.py"
    for word, library in NEEDS.items():
        if word in name or word in path.read_text(encoding="utf-8"):
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert re.search(r"\d", capsys.readouterr().out)


def test_the_list_has_every_example_and_no_other():
    listed = set(re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.stem for path in EXAMPLES.glob("*.py")}
