"""The command line: codes, messages, and what happens to the output directory when something goes wrong."""

import json
import subprocess
import sys

import pytest
from pruning_networks import interrupted

from idap import cli
from idap.errors import InvalidInputError
from idap.quickstart import run as quickstart_run


def test_help_of_every_command_names_its_options(capsys):
    for command, words in {
        (): ("quickstart", "doctor", "--version"),
        ("quickstart",): (
            "--output",
            "--target-macs",
            "--budget",
            "--epochs",
            "--seed",
            "--threads",
            "--backend",
        ),
        ("doctor",): ("--json",),
    }.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("idap ")


def test_no_command_and_unknown_option_are_wrong_usage(capsys):
    for arguments in ([], ["quickstart", "--nonsense"], ["quickstart", "--epochs", "many"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-macs", "1.5"], "target-macs"),
        (["--target-macs", "0"], "target-macs"),
        (["--budget", "-1"], "budget"),
        (["--budget", "nan"], "budget"),
        (["--budget", "2"], "budget"),
        (["--epochs", "-1"], "epochs"),
        (["--steps", "0"], "steps"),
        (["--threads", "0"], "threads"),
        (["--lr", "0"], "lr"),
        (["--backend", "nonsense"], "nonsense"),
    ],
)
def test_our_errors_are_one_line_and_code_2(arguments, message, tmp_path, capsys):
    output = tmp_path / "out"
    code = cli.main(["quickstart", "--quiet", "--output", str(output), *arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_directory_or_a_file_is_refused_and_left_alone(tmp_path, capsys):
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "results.json").write_text('{"command": "something else"}')
    (foreign / "thesis.txt").write_text("words")
    file = tmp_path / "file"
    file.write_text("words")
    for path, message in ((foreign, "thesis.txt"), (file, "is a file")):
        assert cli.main(["quickstart", "--output", str(path)]) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "mine", "results.json", "thesis.txt"]


def test_an_output_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(quickstart_run.tempfile, "mkdtemp", refuse)
    code = cli.main(["quickstart", "--output", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert code == 2
    assert "Permission denied" in captured.err
    # Found out before the work, not after it.
    assert "filters" not in captured.out


@pytest.mark.parametrize("moment", ["finetune", "_draw", "_publish"])
def test_ctrl_c_ends_with_130_and_leaves_nothing(moment, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart_run, moment, interrupt)
    epochs = "1" if moment == "finetune" else "0"
    small = ["--target-macs", "0.95", "--epochs", epochs, "--final-epochs", "0", "--latency-runs", "1"]
    small += ["--no-plots"] if moment == "_publish" else []
    code = cli.main(["quickstart", "--budget", "0.9", "--quiet", "--output", str(tmp_path / "out"), *small])
    captured = capsys.readouterr()
    assert code == 130
    assert captured.err.strip().count("\n") == 0
    assert "interrupted" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_real_ctrl_c_in_the_middle_of_the_work(tmp_path):
    code, error = interrupted("quickstart", "--output", str(tmp_path / "out"), timeout=60)
    assert code == 130
    assert error.strip() == "interrupted: nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_commands_are_imported(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupt)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted: nothing was written"


def test_errors_that_are_not_ours_keep_their_traceback(monkeypatch):
    def broken(args):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_doctor", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_message_with_newlines_stays_on_one_line(monkeypatch, capsys):
    def fail(args):
        raise InvalidInputError("one\n   two")

    monkeypatch.setattr(cli, "_doctor", fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "idap: one two\n"


def test_module_entry_point_and_cheap_import():
    code = (
        "import sys, idap.cli\n"
        "heavy = {'matplotlib', 'rich', 'torchvision', 'timm', 'transformers', 'torch_pruning'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "idap", "--version"], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("idap ")
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--backend", "foo"], ["--budget", "-1"], ["--lr", "nan"]])
def test_wrong_settings_are_refused_before_anything_is_printed(arguments, tmp_path, capsys):
    assert cli.main(["quickstart", "--output", str(tmp_path / "out"), *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert arguments[0].lstrip("-") in error


def test_version_of_a_tree_that_is_not_installed(capsys, monkeypatch):
    import importlib.metadata

    from idap_kernels.version import __version__

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"idap {__version__}\n"
