"""``idap prune``, ``profile``, ``latency``, ``report``: real runs in small, and what goes wrong."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from pruning_networks import interrupted
from safetensors.torch import load_file

import idap
from idap import cli
from idap.commands import prune as prune_command
from idap.commands.progress import Estimate, duration
from idap.commands.prune import criterion_names
from idap.compress import StepRecord
from idap.data import accuracy, batches, load_data
from idap.models import ModelFactory
from idap.quickstart import DigitsResNet
from idap.quickstart.network import load_network

DIGITS = "idap.quickstart.network:load_network"
FAST = ["--epochs", "0", "--final-epochs", "0", "--latency-runs", "1", "--calibration-batches", "2"]
TINY = {"model": "own_task:net", "data": "own_task:classes"}
SMALL = ["--stages", "filters", "--steps", "1", "--initial-ratio", "0.3", "--budget", "0.9"]

OWN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

calls = []

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))

def classes():
    def part(n, seed):
        x = torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x, (x[:, 0].mean((1, 2)) > 0).long())
    return part(50, 0), part(16, 1), part(16, 2)

def fresh():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))

def regression():
    def part(n, seed):
        x = torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x, x.mean((1, 2, 3))[:, None].expand(-1, 2).contiguous())
    return part(24, 0), part(8, 1), part(12, 2)

def error(model, batches):
    calls.append(("error", len(batches.dataset)))
    with torch.no_grad():
        return -sum(float((model(x) - y).abs().sum()) for x, y in batches) - 100

def of_model_alone(model):
    return 5.0

def train(model, batches):
    assert model.training or True
    calls.append(("train", sum(len(x) for x, _ in batches)))

def three(model, batches, more):
    pass

def nothing_to_say(model):
    return float("nan")

def raises_late(model, batches):
    calls.append("late")
    if len(calls) > 3:
        raise RuntimeError("late boom")
    return 5.0

class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)

def broken_data():
    raise ValueError("no data today")

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_task.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("own_task", None)


@pytest.fixture
def images(tmp_path):
    """A folder of images of two colours."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for name, colour in (("blue", (10, 20, 200)), ("red", (200, 10, 20))):
        for i in range(12):
            path = tmp_path / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.new("RGB", (10, 12), tuple(c + i for c in colour)).save(path)
    return tmp_path / "images"


def prune(output, *arguments, model=DIGITS, data="digits:"):
    return cli.main(["prune", model, "--data", data, "--output", str(output), *arguments])


def weights(output):
    return load_file(output / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_help_names_every_option(capsys):
    for command, words in {
        "prune": (
            "--data",
            "--target-latency",
            "--resume",
            "--no-compensate",
            "--mixed-precision",
            "--evaluate",
        ),
        "profile": ("--random", "--data", "--json"),
        "latency": ("--threads", "--runs", "--input"),
        "report": ("DIR",),
    }.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words)


def test_a_whole_run_and_what_it_says(tmp_path, capsys):
    output = tmp_path / "run"
    assert prune(output, *FAST, *SMALL, "--steps", "2", "--target-macs", "0.6") == 0
    said = capsys.readouterr().out
    assert {p.name for p in output.iterdir()} >= {
        "model",
        "run.json",
        "result.json",
        "settings.json",
        "table.json",
    }

    code = said.split("To load the pruned model:")[1]
    scope: dict = {}
    exec("\n".join(line.strip() for line in code.strip().splitlines()), scope)
    model = scope["model"]
    assert isinstance(model, DigitsResNet)
    table = json.loads((output / "table.json").read_text())
    before, after = table["rows"]
    test = batches(load_data("digits:").test, 64)
    assert before["accuracy"] == accuracy(load_network(), test)
    assert after["accuracy"] == accuracy(model, test)
    assert after["macs"] <= 0.6 * before["macs"]
    assert after["params"] == idap.count_params(model)
    assert f"{after['accuracy']:.2%}" in said
    assert "The target was reached" in said
    assert json.loads((output / "settings.json").read_text())["settings"]["target_macs"] == 0.6

    assert cli.main(["latency", DIGITS, str(output), "--runs", "2", "--input", "1,1,8,8", "--json"]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert list(timed) == ["original", "pruned"]
    assert timed["pruned"]["params"] == after["params"]
    assert timed["pruned"]["median"] > 0

    assert "run.json" in said.split("Written to")[1]
    assert cli.main(["latency", DIGITS, str(output), "--runs", "1"]) == 0
    assert "(1, 1, 8, 8)" in capsys.readouterr().out
    del table["input"]
    (output / "table.json").write_text(json.dumps(table))
    # Of an older run nothing is known, and the input falls back to the model's usual one.
    assert cli.main(["latency", DIGITS, str(output), "--runs", "1", "--image-size", "16"]) == 0
    assert "Note" not in capsys.readouterr().err
    assert cli.main(["latency", DIGITS, str(output), "--runs", "1"]) == 0
    captured = capsys.readouterr()
    assert "(1, 1, 224, 224)" in captured.err

    assert cli.main(["report", str(output)]) == 0
    page = capsys.readouterr().out.strip()
    assert page.endswith(".html")
    text = Path(page).read_text(encoding="utf-8")
    assert "<html" in text
    assert "Test accuracy" in text
    assert f"{after['accuracy']:.2%}" in text


def test_json_is_all_that_stdout_gets(tmp_path, capsys):
    assert prune(tmp_path / "run", *FAST, *SMALL, "--json") == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["directory"] == str(tmp_path / "run")
    assert [row["name"] for row in content["rows"]] == ["original", "pruned"]
    assert content["result"]["macs"] == content["rows"][1]["macs"]
    assert "validation" in captured.err


def test_quiet_prints_the_table_alone(tmp_path, capsys):
    assert prune(tmp_path / "run", *FAST, *SMALL, "--quiet") == 0
    assert "stage" not in capsys.readouterr().out.splitlines()[0]


def test_ctrl_c_leaves_a_run_that_goes_on_to_the_same_model(own, capsys, monkeypatch):
    options = "--round-to 1 --steps 3 --budget 0.3 --epochs 1 --final-epochs 1 --lr 0.01 --quiet"
    arguments = [*FAST, *SMALL, *options.split()]
    assert prune(own / "whole", *arguments, **TINY) == 0
    real, calls = prune_command.finetune, []

    def interrupt(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(prune_command, "finetune", interrupt)
    output = own / "cut"
    assert prune(output, *arguments, **TINY) == 130
    error = capsys.readouterr().err
    assert not (output / "result.json").exists()
    command = shlex.split(error.split("to go on: ")[1])
    assert command[0] == "idap"
    assert command[-1] == "--resume"

    monkeypatch.setattr(prune_command, "finetune", real)
    assert prune(output, *arguments, **TINY) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*command[1:], "--lr", "0.02"]) == 2
    assert "lr=0.01" in capsys.readouterr().err
    assert cli.main([word for word in command[1:] if word != "--quiet"]) == 0
    assert "going on after 1 step\n" in capsys.readouterr().out
    assert same(weights(output), weights(own / "whole"))


def test_ctrl_c_before_anything(tmp_path, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_command, "open_data", interrupt)
    assert prune(tmp_path / "run") == 130
    assert capsys.readouterr().err.strip() == "interrupted: nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_a_real_ctrl_c(tmp_path):
    output = tmp_path / "run"
    arguments = ["prune", DIGITS, "--data", "digits:", "--output", str(output)]
    code, error = interrupted(*arguments, "--epochs", "200", "--calibration-batches", "2", timeout=120)
    assert code == 130
    assert error.strip().count("\n") == 0
    assert "--resume" in error
    assert (output / "settings.json").exists()


def test_new_weights_are_the_same_when_a_run_goes_on(own):
    output = own / "run"
    arguments = [*FAST, *SMALL, "--budget", "0.1", "--quiet", "--seed", "3", "--round-to", "1"]
    tiny = {**TINY, "model": "own_task:fresh"}
    assert prune(output, *arguments, **tiny) == 0
    first = weights(output)
    assert prune(output, *arguments, "--resume", **tiny) == 0
    assert same(weights(output), first)


def test_a_folder_of_images(own, images, capsys):
    output = own / "run"
    options = [
        "--image-size",
        "12",
        "--batch-size",
        "5",
        "--round-to",
        "4",
        "--export",
        "onnx",
        "--workers",
        "1",
    ]
    code = prune(
        output,
        *FAST,
        *SMALL,
        "--budget",
        "0.4",
        *options,
        "--epochs",
        "1",
        model="own_task:net",
        data=f"imagefolder:{images}",
    )
    assert code == 0
    assert "20 train, 2 validation, 2 test" in capsys.readouterr().out.replace("\n", " ")
    assert (output / "model.onnx").stat().st_size > 0
    assert idap.load(output / "model", ModelFactory("own_task:net"))(torch.zeros(1, 3, 12, 12)).shape == (
        1,
        2,
    )


def test_evaluation_and_training_of_the_users_own(own, capsys):
    output = own / "run"
    code = prune(
        output,
        *[
            "--stages",
            "filters",
            "--steps",
            "2",
            "--initial-ratio",
            "0.3",
            "--budget",
            "50",
            "--round-to",
            "1",
        ],
        *[
            "--batch-size",
            "7",
            "--latency-runs",
            "1",
            "--evaluate",
            "own_task:error",
            "--train",
            "own_task:train",
        ],
        model="own_task:net",
        data="own_task:regression",
    )
    assert code == 0
    calls = sys.modules["own_task"].calls
    assert ("train", 24) in calls
    # The test part is read for the original and for the result, and by no decision.
    assert calls.count(("error", 12)) == 2
    assert calls.count(("error", 8)) >= 2
    table = json.loads((output / "table.json").read_text())
    assert table["rows"][0]["accuracy"] < -100
    assert f"{table['rows'][1]['accuracy']:.6g}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["taylor", "bn_scale", "random", "fpgm"])
def test_other_criteria_and_switches(name, tmp_path):
    switches = [
        "--no-compensate",
        "--no-recalibrate",
        "--no-project",
        "--no-heads",
        "--no-distill",
        "--scope",
        "local",
    ]
    assert prune(tmp_path / "run", *FAST, *SMALL, "--criterion", name, "--quiet", *switches) == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["compensate"], settings["heads"], settings["scope"]) == (False, False, "local")
    assert name in criterion_names()


def test_blocks_alone_and_layers_that_stay(tmp_path):
    arguments = [
        "--stages",
        "layers",
        "--max-blocks",
        "1",
        "--budget",
        "0.9",
        "--ignore",
        "blocks.5",
        "--quiet",
    ]
    assert prune(tmp_path / "run", *FAST, *arguments) == 0
    stages = [step["stage"] for step in json.loads((tmp_path / "run" / "result.json").read_text())["history"]]
    assert "layers" in stages
    assert "filters" not in stages
    assert "blocks.5.conv1.weight" in weights(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--criterion", "flow_divergense"], "did you mean flow_divergence"),
        (["--criterion", "nonsense"], "weight_l1"),
        (["--lr", "0"], "lr"),
        (["--lr", "nan"], "lr"),
        (["--target-macs", "0"], "target-macs"),
        (["--target-latency", "-1"], "target-latency"),
        (["--initial-ratio", "1"], "initial-ratio"),
        (["--epochs", "-1"], "epochs"),
        (["--batch-size", "0"], "batch-size"),
        (["--threads", "0"], "threads"),
        (["--device", "nonsense"], "nonsense"),
        (["--weights", "missing.pt"], "missing.pt"),
        (["--weights", "default"], "default"),
        (["--std", "0,1,1"], "std"),
        (["--evaluate", "own_task:three"], "three"),
        (["--evaluate", "own_task:nothing_there"], "nothing_there"),
        (["--evaluate", "own_task:number"], "is an int"),
        (["--budget", "1"], "budget must be below 1"),
        (["--train", "no_such_module_anywhere:f"], "no_such_module_anywhere"),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(arguments, message, own, capsys):
    assert prune(own / "run", *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (own / "run").exists()


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("resnt18", "digits:", "resnet18"),
        ("idap.quickstart:DigitsRes", "digits:", "DigitsResNet"),
        (DIGITS, "imagefolder:/no/such/folder", "/no/such/folder"),
        (DIGITS, "cifar11:/x", "cifar10"),
    ],
)
def test_unknown_models_and_data(model, data, message, tmp_path, capsys):
    pytest.importorskip("torchvision")
    assert prune(tmp_path / "run", model=model, data=data) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-macs", "2e12"], "target-macs 2e12 is not below the model's 11,431,552; up to 1"),
        (["--target-params", "342106"], "target-params 342106 is not below the model's 342,106"),
        (["--target-latency", "1"], "target-latency 1 is not below the model's own"),
    ],
)
def test_targets_that_the_original_meets(arguments, message, tmp_path, capsys):
    assert prune(tmp_path / "run", *FAST, "--quiet", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("own_task:fresh", r"cannot run on the samples of digits \(1×8×8\): .*model with the same channels"),
        ("own_task:NoForward", "forward"),
    ],
)
def test_data_that_do_not_fit_are_one_line(model, message, own, capsys):
    assert prune(own / "run", *FAST, "--quiet", model=model) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (own / "run").exists()
    assert cli.main(["profile", model, "--data", "digits:"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_refused_run_does_not_stand_in_the_way(own, capsys):
    output = own / "run"
    assert prune(output, *FAST, *SMALL, "--quiet", "--evaluate", "own_task:nothing_to_say") == 2
    assert "nan" in capsys.readouterr().err
    # Also by --resume, as nothing was done by the old settings.
    assert prune(output, *FAST, *SMALL, "--quiet", "--lr", "0.02", "--resume") == 0
    settings = json.loads((output / "settings.json").read_text())["settings"]
    assert (settings["lr"], settings["evaluate"]) == (0.02, None)


def test_a_model_without_accuracy(own, images, capsys, monkeypatch):
    monkeypatch.setattr(prune_command, "accuracy", lambda model, loader: 0.0)
    assert prune(own / "run", *FAST, "--quiet") == 2
    assert "no accuracy to lose" in capsys.readouterr().err


def test_errors_in_the_users_code_show_that_code_alone(own, capsys):
    output = own / "run"
    line = OWN.splitlines().index('        raise RuntimeError("late boom")') + 1
    wanted = (
        f"idap: --evaluate own_task:raises_late raised RuntimeError: late boom (own_task.py, line {line})"
    )
    options = ["--budget", "4", "--stages", "filters", "--steps", "3"]
    assert prune(output, *FAST, *options, "--quiet", "--evaluate", "own_task:raises_late") == 2
    *frames, last = capsys.readouterr().err.splitlines()
    assert last.startswith(wanted)
    assert last.endswith("--resume")
    assert "own_task.py" in frames[0]
    assert not any("idap/" in frame for frame in frames)
    assert prune(own / "other", *FAST, data="own_task:broken_data") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("idap: --data own_task:broken_data raised ValueError: no data today (own_task.py")


def test_wrong_usage(tmp_path, capsys):
    for arguments in (
        ["--stages", "filters,filters"],
        ["--stages", "heads"],
        ["--mean", "a"],
        ["--export", "pickle"],
    ):
        with pytest.raises(SystemExit) as stop:
            prune(tmp_path / "run", *arguments)
        assert stop.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_image_is_named(workers, own, images, capsys):
    for name in ("blue/3.png", "red/5.png"):
        (images / name).write_bytes((images / name).read_bytes()[:50])
    arguments = ["--image-size", "12", "--batch-size", "8", "--workers", workers]
    code = prune(
        own / "run",
        *FAST,
        *SMALL,
        *arguments,
        "--epochs",
        "1",
        "--quiet",
        model="own_task:net",
        data=f"imagefolder:{images}",
    )
    error = capsys.readouterr().err
    assert code == 2
    assert "blue/3.png" in error or "red/5.png" in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_a_directory_that_is_no_run(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("words")
    assert prune(tmp_path, *FAST, *SMALL, "--quiet") == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_profile_of_digits(own, capsys):
    model = load_network()
    with torch.no_grad():
        model.stem[0].weight[3] = 0
    torch.save(model.state_dict(), "w.pt")
    arguments = ["--weights", "w.pt", "--calibration-batches", "3", "--json", "out.json"]
    assert cli.main(["profile", DIGITS, "--data", "digits:", *arguments]) == 0
    said = capsys.readouterr().out
    found = json.loads((own / "out.json").read_text())
    first = found["layers"][0]
    assert found["samples"] == 192
    assert (first["name"], first["width"], first["dead"]) == ("stem.0", 48, 1)
    assert 0 < first["apoz"] < 1
    assert first["flow_divergence"] > 0
    assert {block["name"] for block in found["blocks"]} >= {"blocks.0", "blocks.5"}
    assert "stem.0" in said
    assert "blocks.5" in said


def test_profile_of_noise(capsys):
    model = "idap.quickstart:DigitsResNet"
    assert cli.main(["profile", model, "--random", "--input", "4,1,8,8", "--calibration-batches", "2"]) == 0
    assert "8 samples of noise" in capsys.readouterr().out.replace("\n", " ")
    for arguments in ([], ["--random", "--data", "digits:"]):
        assert cli.main(["profile", model, *arguments]) == 2
        assert "either" in capsys.readouterr().err


def test_latency_of_a_library_model_and_of_wrong_inputs(capsys):
    pytest.importorskip("torchvision")
    arguments = ["latency", "squeezenet1_1", "--runs", "2", "--warmup", "0", "--threads", "1"]
    assert cli.main([*arguments, "--image-size", "64"]) == 0
    assert "(1, 3, 64, 64)" in capsys.readouterr().out
    assert cli.main([*arguments, "--input", "1,5,64,64"]) == 2
    assert "--input" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--input", "1,a"])
    capsys.readouterr()


def test_latency_and_report_of_what_is_no_run(tmp_path, capsys):
    assert cli.main(["latency", DIGITS, str(tmp_path), "--input", "1,1,8,8"]) == 2
    assert cli.main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def record(stage, macs, seconds, accepted=True):
    return StepRecord(stage, "", accepted, 100, macs, 1.0, 0.0, seconds)


def test_estimate_of_the_time_left():
    estimate = Estimate({"macs": 0.5}, steps=10, final_epochs=2)
    estimate.add(record("base", 1000, 7.0))
    assert estimate.left() is None
    estimate.add(record("filters", 900, 10.0))
    # A fifth of the way took 10 s, which leaves 40.
    assert estimate.left() == pytest.approx(40)
    estimate.epoch_seconds = 3.0
    assert estimate.left() == pytest.approx(46)
    estimate.add(record("filters", 600, 10.0, accepted=False))
    assert estimate.left() == pytest.approx(20 * 4 + 6)
    estimate.add(record("layers", 500, 10.0))
    assert estimate.left() == pytest.approx(6)
    estimate.add(record("final", 500, 6.0))
    assert estimate.left() == 0


def test_estimate_without_a_target_goes_by_the_steps():
    estimate = Estimate(None, steps=4, final_epochs=0)
    estimate.add(record("base", 1000, 7.0))
    estimate.add(record("filters", 900, 10.0))
    assert estimate.left() == pytest.approx(30)
    estimate.add(record("layers", 800, 10.0))
    assert estimate.left() is None
    assert [duration(s) for s in (0.2, 40, 600, 7200)] == [
        "about 1 s",
        "about 40 s",
        "about 10 min",
        "about 2.0 h",
    ]
