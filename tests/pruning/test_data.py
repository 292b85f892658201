"""Data by a spec: parts that do not overlap, the same in every run; images as tensors; errors with names."""

import json
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from idap import data as data_module
from idap.data import SOURCES, CalibrationInputs, Preprocessing, accuracy, batches, load_data
from idap.errors import EmptyDataError, InvalidInputError
from idap.quickstart.data import load_digits
from idap.quickstart.network import load_network
from idap.quickstart.train import accuracy as digits_accuracy

SMALL = Preprocessing().sized(16)


@pytest.fixture
def folder(tmp_path):
    """Writes images of one colour a class: ``make("train", cats=5, dogs=3)``."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")

    def make(part="", mode="RGB", size=(20, 18), **classes):
        for shade, (name, count) in enumerate(classes.items()):
            where = tmp_path / part / name
            where.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                value = 40 * shade + i
                colour = (value, 255 - value, 7) if mode == "RGB" else value
                image.new(mode, size, colour).save(where / f"{i:03d}.png")
        return f"imagefolder:{tmp_path}"

    return make


def labels(dataset):
    return Counter(dataset[i][1] for i in range(len(dataset)))


def test_digits_are_those_of_the_quickstart():
    digits = load_digits()
    parts = load_data("digits:", augment=False)
    assert parts.classes == 10
    for name, split in digits.items():
        inputs, targets = next(iter(batches(getattr(parts, name), len(split))))
        assert torch.equal(inputs, split.images)
        assert torch.equal(targets, split.labels)
    assert torch.equal(torch.stack([x for x, _ in parts.calibration]), digits["train"].images)
    moved = load_data("digits:").train
    assert any(not torch.equal(moved[i][0], parts.train[i][0]) for i in range(20))


def test_accuracy_is_that_of_the_quickstart():
    model, parts = load_network(), load_data("digits:")
    wanted = digits_accuracy(model, load_digits()["validation"])
    model.train()
    assert accuracy(model, batches(parts.validation, 50)) == wanted
    assert model.training


def test_an_empty_class_is_named(folder, tmp_path):
    spec = folder("train", cats=3, dogs=3)
    folder("test", cats=3, dogs=3)
    (tmp_path / "train" / "owls").mkdir()
    (tmp_path / "train" / "owls" / "notes.txt").write_text("words")
    with pytest.raises(
        InvalidInputError, match=r"train/owls holds no images; add some, or remove the folder$"
    ):
        load_data(spec, SMALL)


def test_a_single_folder_is_split_the_same_way_every_time(folder):
    spec = folder(cats=40, dogs=20, owls=2)
    parts = load_data(spec, SMALL)
    assert parts.classes == 3
    assert labels(parts.test) == {0: 4, 1: 2}
    assert labels(parts.validation) == {0: 4, 1: 2}
    assert labels(parts.calibration) == {0: 32, 1: 16, 2: 2}
    indices = [set(getattr(parts, name).indices) for name in ("train", "validation", "test")]
    assert len(set.union(*indices)) == sum(map(len, indices)) == 62
    again = load_data(spec, SMALL)
    assert [set(getattr(again, n).indices) for n in ("train", "validation", "test")] == indices


def test_folders_train_val_test_are_taken_as_they_are(folder):
    for part, count in (("train", 5), ("val", 3), ("test", 2)):
        spec = folder(part, cats=count, dogs=count)
    parts = load_data(spec, SMALL)
    assert [len(getattr(parts, n)) for n in ("train", "validation", "test")] == [10, 6, 4]


@pytest.mark.parametrize("other", ["val", "test"])
def test_with_two_folders_validation_comes_from_training(other, folder):
    folder("train", cats=20, dogs=20)
    parts = load_data(folder(other, cats=3, dogs=3), SMALL)
    assert labels(parts.validation) == {0: 2, 1: 2}
    assert len(parts.train) == 36
    assert labels(parts.test) == {0: 3, 1: 3}
    assert f"test: the folder {other}" in parts.note
    assert "4 images taken" in parts.note


def test_images_become_normalised_tensors(folder):
    spec = folder(cats=5, dogs=5)
    plain = Preprocessing(size=16, resize=16, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0))
    image, label = load_data(spec, plain).calibration[0]
    first = image[:, 0, 0] * torch.tensor(plain.std) + torch.tensor(plain.mean)
    assert image.shape == (3, 16, 16)
    assert type(image) is torch.Tensor
    assert first[2].item() == pytest.approx(7 / 255, abs=1e-6)
    assert label == 0


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1)])
def test_channels_are_those_that_the_model_wants(mode, channels, folder):
    parts = load_data(folder(mode=mode, cats=4, dogs=4), SMALL.for_channels(channels))
    assert parts.train[0][0].shape == (channels, 16, 16)
    image = parts.test[0][0]
    if channels == 3:
        p = SMALL
        grey = image * torch.tensor(p.std)[:, None, None] + torch.tensor(p.mean)[:, None, None]
        assert torch.allclose(grey[0], grey[1], atol=1e-6)


def test_large_images_are_cropped_with_a_margin_and_small_ones_whole():
    assert Preprocessing().sized(224) == Preprocessing()
    assert Preprocessing().sized(32).resize == 32


def test_a_damaged_file_is_named(folder, tmp_path):
    spec = folder(cats=6, dogs=6)
    bad = tmp_path / "dogs" / "003.png"
    bad.write_bytes(bad.read_bytes()[:40])
    parts = load_data(spec, SMALL)
    read = torch.utils.data.ConcatDataset([parts.calibration, parts.validation, parts.test])
    with pytest.raises(InvalidInputError, match=r"dogs/003\.png cannot be read"):
        list(batches(read, 4))


def test_classes_that_differ_between_the_parts(folder):
    folder("train", cats=3, dogs=3)
    with pytest.raises(InvalidInputError, match="owls"):
        load_data(folder("val", cats=3, dogs=3, owls=3), SMALL)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar10", "wanted imagefolder:PATH"),
        ("cifra10:/data", "cifar10"),
        ("imagefolder:/no/such/folder", "no folder '/no/such/folder'"),
        ("imagefolder:", "no folder"),
        ("no_such_package_anywhere:f", "no_such_package_anywhere"),
        ("some-thing:/x", "not known"),
    ],
)
def test_unknown_data(spec, message):
    with pytest.raises(InvalidInputError, match=message):
        load_data(spec)


def test_a_folder_without_images(tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(InvalidInputError, match="by class"):
        load_data(f"imagefolder:{tmp_path}")
    with pytest.raises(InvalidInputError, match=f"imagefolder:{tmp_path}"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("name", SOURCES)
def test_sets_that_are_not_there_say_so_and_nothing_is_downloaded(name, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("went to the network"))
    with pytest.raises(InvalidInputError, match=SOURCES[name].title):
        load_data(f"{name}:{tmp_path}")
    if not SOURCES[name].downloads:
        with pytest.raises(InvalidInputError, match="cannot be downloaded"):
            load_data(f"{name}:{tmp_path}", download=True)


def test_cifar10_from_its_files(tmp_path, monkeypatch):
    """The set in torchvision's own form, in small: validation is a tenth of every class of training."""
    datasets = pytest.importorskip("torchvision").datasets
    import pickle

    import numpy as np

    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        pixels = np.full((20, 3072), len(name), dtype=np.uint8)
        content = {"data": pixels, "labels": [i % 2 for i in range(20)]}
        (root / name).write_bytes(pickle.dumps(content))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": None})
    parts = load_data(f"CIFAR-10:{tmp_path}", SMALL)
    assert parts.classes == 2
    assert [len(getattr(parts, n)) for n in ("train", "validation", "test")] == [90, 10, 20]
    assert labels(parts.validation) == {0: 5, 1: 5}


def paint(path, shade=0):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 12), (shade, 0, 0)).save(path)


def food101(root, monkeypatch):
    root = root / "food-101"
    for part, count in (("train", 10), ("test", 3)):
        meta = {name: [f"{name}/{part}{i}" for i in range(count)] for name in ("pie", "soup")}
        (root / "meta").mkdir(parents=True, exist_ok=True)
        (root / "meta" / f"{part}.json").write_text(json.dumps(meta))
        for path in (path for paths in meta.values() for path in paths):
            paint(root / "images" / f"{path}.jpg")


def oxfordpet(root, monkeypatch):
    root = root / "oxford-iiit-pet"
    for part, count in (("trainval", 10), ("test", 3)):
        lines = []
        for label, name in ((1, "Abyssinian"), (2, "beagle")):
            for i in range(count):
                paint(root / "images" / f"{name}_{part}{i}.jpg")
                lines.append(f"{name}_{part}{i} {label} 1 1\n")
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"{part}.txt").write_text("".join(lines))


def inaturalist(root, monkeypatch):
    for part, count in (("2021_train_mini", 10), ("2021_valid", 3)):
        for number in range(2):
            for i in range(count):
                paint(root / part / f"{number:05d}_A_B_C_D_E_F_g{number}" / f"{i}.jpg")


def stanfordcars(root, monkeypatch):
    io = pytest.importorskip("scipy.io")
    import numpy as np

    root = root / "stanford_cars"
    (root / "devkit").mkdir(parents=True)
    names = np.array(["Audi", "BMW"], dtype=object)
    io.savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    for folder, file, count in (
        ("cars_train", root / "devkit" / "cars_train_annos.mat", 10),
        ("cars_test", root / "cars_test_annos_withlabels.mat", 3),
    ):
        rows = []
        for i in range(2 * count):
            paint(root / folder / f"{i:05d}.jpg")
            rows.append((f"{i:05d}.jpg", np.uint8(i % 2 + 1)))
        io.savemat(file, {"annotations": np.array(rows, dtype=[("fname", object), ("class", object)])})


def fer2013(root, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.fer2013.check_integrity", lambda *args, **options: True)
    (root / "fer2013").mkdir()
    pixels = " ".join(["7"] * (48 * 48))
    lines = ["emotion,pixels,Usage"]
    lines += [f"{i % 2},{pixels},Training" for i in range(20)]
    lines += [f"{i % 2},{pixels},{use}" for use in ("PublicTest", "PrivateTest") for i in range(3)]
    (root / "fer2013" / "fer2013.csv").write_text("\n".join(lines) + "\n")


def fashionmnist(root, monkeypatch):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 6)):
        images = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images + bytes(count * 28 * 28))
        labels = bytes(i % 2 for i in range(count))
        header = b"\x00\x00\x08\x01" + count.to_bytes(4, "big")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels)


@pytest.mark.parametrize("make", [food101, oxfordpet, inaturalist, stanfordcars, fer2013, fashionmnist])
def test_the_papers_sets_in_the_form_that_torchvision_reads(make, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    make(tmp_path, monkeypatch)
    parts = load_data(f"{make.__name__}:{tmp_path}", SMALL)
    assert labels(parts.train) == {0: 9, 1: 9}
    assert labels(parts.validation) == {0: 1, 1: 1}
    assert sum(labels(parts.test).values()) == 6
    image, label = parts.train[0]
    assert image.shape == (3, 16, 16)
    assert type(label) is int
    damaged = sorted(tmp_path.rglob("*.jpg"))
    for file in damaged:
        file.write_bytes(b"words")
    if damaged:
        with pytest.raises(InvalidInputError, match=r"\.jpg cannot be read as an image"):
            parts.test[0]


def test_imagenet_as_plain_folders(folder, tmp_path):
    folder("train", n01440764=20, n01443537=20)
    folder("val", n01440764=3, n01443537=3)
    parts = load_data(f"imagenet:{tmp_path}", SMALL)
    assert [len(getattr(parts, n)) for n in ("train", "validation", "test")] == [36, 4, 6]


def test_the_users_own_function(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset as T\n"
        "def part(n): return T(torch.randn(n, 3), torch.zeros(n).long())\n"
        "def good(): return part(5), part(4), part(3)\n"
        "def two(): return part(5), part(4)\n"
        "def empty(): return part(5), part(0), part(3)\n"
        "def loaders(): return [iter([1])] * 3\n"
        "def needy(path): pass\n"
        "five = 5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    parts = load_data("own_data:good")
    assert [len(getattr(parts, n)) for n in ("train", "calibration", "validation", "test")] == [5, 5, 4, 3]
    assert parts.classes is None
    for name, message in (
        ("two", "tuple of 2"),
        ("empty", "validation part"),
        ("loaders", "list_iterator"),
        ("needy", "path"),
        ("five", "int"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            load_data(f"own_data:{name}")
    with pytest.raises(EmptyDataError):
        load_data("own_data:empty")


def test_no_training_batch_has_one_sample():
    parts = TensorDataset(torch.randn(9, 2), torch.zeros(9).long())
    assert sorted(len(x) for x, _ in batches(parts, 4, shuffle=True)) == [4, 4]
    assert [len(x) for x, _ in batches(parts, 4)] == [4, 4, 1]
    assert [
        len(x) for x, _ in batches(TensorDataset(torch.zeros(1, 2), torch.zeros(1)), 4, shuffle=True)
    ] == [1]


@pytest.mark.parametrize("memory", [2**20, 0])
def test_calibration_inputs_are_the_same_at_every_pass(memory, monkeypatch):
    monkeypatch.setattr(data_module, "_MEMORY", memory)
    numbers = TensorDataset(torch.arange(20.0)[:, None], torch.zeros(20))
    inputs = CalibrationInputs(numbers, 3, 4)
    first, second = list(inputs), list(inputs)
    assert len(inputs) == len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, (b, _) in zip(first, inputs.pairs, strict=True))
    values = torch.cat(first).flatten().tolist()
    assert len(set(values)) == 12
    assert values != sorted(values)
    assert (inputs._kept is None) == (memory == 0)


def test_accuracy_refuses_what_it_cannot_count():
    model = nn.Linear(2, 3)
    pairs = TensorDataset(torch.zeros(4, 2), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(InvalidInputError, match=r"3 outputs.*numbered 3"):
        accuracy(model, batches(pairs, 4))
    with pytest.raises(InvalidInputError, match="--evaluate"):
        accuracy(model, batches(TensorDataset(torch.zeros(4, 2), torch.zeros(4)), 4))
    with pytest.raises(InvalidInputError, match=r"\(4, 3\)"):
        accuracy(model, batches(TensorDataset(torch.zeros(4, 2), torch.zeros(4, 2).long()), 4))
    with pytest.raises(InvalidInputError, match="pairs"):
        accuracy(model, batches(TensorDataset(torch.zeros(4, 2)), 4))
