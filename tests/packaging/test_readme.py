"""What the README says is so: its code runs, its tables are those of the result files."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="runs in the source tree only")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(4))
def test_python_blocks_run(number, tmp_path, monkeypatch, capsys):
    for library, word in (("torchvision", "torchvision"), ("onnxruntime", "export_onnx")):
        if word in blocks("python")[number]:
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[number], f"README block {number}", "exec"), {})


def test_every_python_block_is_run():
    assert len(blocks("python")) == 4


@pytest.mark.parametrize("document", ["README.md", "benchmarks/RESULTS.md", "examples/README.md"])
def test_tables_are_those_of_the_results(document):
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert set(tables.TABLES) == {"README.md", "benchmarks/RESULTS.md", "examples/README.md"}
    text = (ROOT / document).read_text(encoding="utf-8")
    assert tables.filled(document) == text, "run: python benchmarks/tables.py --write"


def test_every_environment_variable_has_a_row():
    used = set()
    for folder in ("setup.py", "csrc", "idap", "idap_kernels"):
        path = ROOT / folder
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.suffix in (".py", ".cpp", ".h", ".cu"):
                text = file.read_text(encoding="utf-8")
                used |= set(re.findall(r"(?:environ[^\n]*?|getenv\(|off\()\"(IDAP_[A-Z_]+)\"", text))
    assert used
    table = README.read_text(encoding="utf-8")
    missing = [name for name in sorted(used) if f"`{name}`" not in table]
    assert not missing


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_ci_runs_the_commands_of_the_readme():
    text = README.read_text(encoding="utf-8")
    marks = dict(re.findall(r"<!-- ci:(\w+) -->\n```bash\n(.*?)```", text, re.DOTALL))
    assert marks["quickstart"].splitlines() == ["pip install -e .", "idap quickstart"]
    assert marks["test"].splitlines() == ['pip install -e ".[test]"', "pytest"]
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    libraries = shlex.split(marks["integrations"].splitlines()[0])
    assert libraries == ["pip", "install", *metadata["project"]["optional-dependencies"]["integrations"]]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name in marks:
        assert f"run {name}\n" in script
