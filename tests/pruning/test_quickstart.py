"""The embedded data and network are what they say, and the main job runs end to end."""

import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

import idap
from idap.complexity import count_macs
from idap.errors import ArtifactError
from idap.quickstart import DigitsResNet, TrainingBatches, load_digits, load_network
from idap.quickstart import run as quickstart_run
from idap.quickstart.data import DATA_FILE, Split, _shift
from idap.quickstart.make_data import stratified_split
from idap.quickstart.network import WEIGHTS_FILE
from idap.quickstart.run import PICTURES, loading_code
from idap.quickstart.settings import Settings
from idap.quickstart.train import accuracy

SMALL = {
    "target_macs": 0.5,
    "epochs": 1,
    "final_epochs": 1,
    "latency_runs": 5,
    "steps": 6,
    "initial_ratio": 0.3,
    "budget": 0.1,
}


def test_splits_are_whole_disjoint_balanced_and_without_duplicates():
    digits = load_digits()
    sizes = {name: len(split) for name, split in digits.items()}
    assert sizes == {"train": 1114, "validation": 287, "test": 396}
    images = torch.cat([split.images for split in digits.values()])
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images) == 1797
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)
    for split in digits.values():
        assert split.images.shape[1:] == (1, 8, 8)
        shares = torch.bincount(split.labels, minlength=10) / len(split)
        assert shares.sub(0.1).abs().max() < 0.01


def test_the_split_is_the_one_of_the_script():
    digits = load_digits()
    with safe_open(DATA_FILE, "pt") as file:
        labels, split = file.get_tensor("labels"), file.get_tensor("split")
        metadata = file.metadata()
    made = stratified_split(labels.numpy(), (0.62, 0.16, 0.22), int(metadata["split_seed"]))
    assert torch.equal(torch.from_numpy(made), split)
    assert metadata["licence"] == "CC BY 4.0"
    assert (split == 2).sum() == len(digits["test"])


def test_the_weights_reach_the_accuracy_of_their_metadata_and_are_small():
    with safe_open(WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
        assert all(file.get_tensor(key).dtype in (torch.float32, torch.int64) for key in file.keys())  # noqa: SIM118
    model = load_network()
    assert not model.training
    for name, split in load_digits().items():
        # One image may tip over on another processor, whose sums round differently.
        assert accuracy(model, split) == pytest.approx(
            float(metadata[f"{name}_accuracy"]), abs=1.01 / len(split)
        )
    assert accuracy(model, load_digits()["test"]) > 0.98
    assert WEIGHTS_FILE.stat().st_size < 1_500_000


def test_training_batches_cover_the_split_and_follow_the_seed():
    split = Split(torch.arange(33.0).reshape(33, 1, 1, 1).expand(33, 1, 8, 8), torch.arange(33))
    batches = TrainingBatches(split, batch_size=16, augment=False)
    torch.manual_seed(0)
    first = list(batches)
    second = list(batches)
    torch.manual_seed(0)
    again = list(batches)
    assert len(first) == len(batches) == 2
    labels = torch.cat([y for _, y in first])
    assert len(labels.unique()) == 32
    assert all(torch.equal(x[:, 0, 0, 0], y.float()) for x, y in first)
    assert not torch.equal(labels, torch.cat([y for _, y in second]))
    assert torch.equal(labels, torch.cat([y for _, y in again]))


def test_shifts_move_by_one_pixel_at_most_and_fill_with_zero():
    torch.manual_seed(0)
    images = torch.zeros(300, 1, 8, 8)
    images[:, 0, 3, 4] = 1
    images[:, 0, 0, 0] = 2
    moved = _shift(images)
    assert moved.shape == images.shape
    places = {tuple(place) for place in (moved[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(3 + a, 4 + b) for a in (-1, 0, 1) for b in (-1, 0, 1)}
    corners = (moved[:, 0] == 2).nonzero()[:, 1:].tolist()
    assert {tuple(place) for place in corners} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert 0 < len(corners) < 300


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "out"
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    done = quickstart_run.run(Settings(output=directory, seed=1, **SMALL), console)
    return done, console.export_text()


def test_small_run_gives_a_smaller_model_within_the_budget(outcome):
    done, _ = outcome
    result, rows = done.result, done.rows
    assert result.reached_target
    assert result.macs <= 0.5 * result.baseline.macs
    assert result.metric >= result.baseline.metric - 0.1
    assert rows[0].name == "original"
    assert rows[-1].name == "fine-tuned"
    assert rows[-1].macs == result.macs == count_macs(result.model, load_digits()["test"].images[:1])
    assert rows[-1].params == sum(p.numel() for p in result.model.parameters())
    assert rows[-1].accuracy == accuracy(result.model, load_digits()["test"])
    assert accuracy(result.model, load_digits()["validation"]) == result.metric
    stages = {step.stage for step in result.history}
    assert stages == {"base", "filters", "layers", "final"}


def test_small_run_shows_table_steps_and_code(outcome):
    done, text = outcome
    for row in done.rows:
        assert row.name in text
        assert f"{row.params:,}" in text
    assert f"{done.rows[-1].accuracy:.2%}" in text
    assert all(step.action in text for step in done.result.history)
    assert all(line in text for line in loading_code(done.directory).splitlines())


def test_small_run_writes_everything(outcome):
    done, _ = outcome
    names = {path.name for path in done.directory.iterdir()}
    assert names == {"model", "results.json", *PICTURES}
    content = json.loads((done.directory / "results.json").read_text())
    assert content["stages"][-1]["macs"] == done.result.macs
    assert content["compression"]["metric"] == done.result.metric
    assert 0 < content["test_drift"] < 1
    assert len(content["compression"]["history"]) == len(done.result.history)
    assert [p.name for p in done.directory.parent.iterdir()] == ["out"]


def test_the_printed_code_runs_and_gives_the_same_model(outcome):
    done, _ = outcome
    printed = subprocess.run(
        [sys.executable, "-c", loading_code(done.directory)], check=True, capture_output=True, text=True
    )
    images = load_digits()["test"].images
    with torch.inference_mode():
        wanted = done.result.model(images)
        loaded = idap.load(done.directory / "model", DigitsResNet).eval()
        assert torch.equal(loaded(images), wanted)
    assert printed.stdout.strip() == str(wanted[:5].argmax(dim=1))


def test_an_earlier_run_is_replaced_and_files_of_the_user_stay(outcome, tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "results.json").write_text(json.dumps({"command": quickstart_run.COMMAND}))
    (directory / "steps.png").write_text("old")
    (directory / "notes.txt").write_text("mine")
    staging = tmp_path / "staging"
    staging.mkdir()
    (staging / "model").mkdir()
    (staging / "results.json").write_text("new")
    quickstart_run._publish(staging, directory)
    assert (directory / "results.json").read_text() == "new"
    assert (directory / "notes.txt").read_text() == "mine"
    assert not (directory / "steps.png").exists()
    assert (directory / "model").is_dir()


def test_a_saved_model_that_differs_is_noticed(outcome, tmp_path, monkeypatch):
    done, _ = outcome

    def load_other(directory, factory):
        model = idap.load(directory, factory)
        with torch.no_grad():
            model.head.bias[0] += 1e-3
        return model

    monkeypatch.setattr(quickstart_run.artifact, "load", load_other)
    with pytest.raises(ArtifactError, match="other outputs"):
        quickstart_run._prove(done.directory / "model", done.result.model, load_digits()["test"].images)
