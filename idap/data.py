"""Data for the command line: training, validation and test parts by a name, ready for a model.

``imagefolder:PATH``, ``cifar10:PATH`` and the other sets of the IDAP++ paper, ``digits:`` (embedded), or
``package.module:function``. torchvision is imported by the functions that need it. Nothing is downloaded
unless asked for.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .errors import EmptyDataError, InvalidInputError
from .inputs import call, evaluating, first_tensor, named_tensors, to_model
from .models.resolve import a_kind, import_object, users_code

VALIDATION_SHARE, VALIDATION_MOST = 0.1, 10_000
TEST_SHARE = 0.1
_SPLIT_SEED = 0  # of the splits we make: the same images whatever the seed of the run
_MEMORY = 2**31  # bytes of calibration inputs that are kept rather than read anew
_MARGIN = 256 / 224  # what ImageNet's usual preparation resizes to, over what it crops


@dataclass(frozen=True)
class Preprocessing:
    """How images become tensors ``(channels, size, size)``: resize, crop, scale to [0, 1], normalise."""

    size: int = 224
    resize: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    channels: int = 3

    def sized(self, size: int) -> Preprocessing:
        """The same for another size; small images are not cropped, as every pixel of them counts."""
        return replace(self, size=size, resize=round(size * _MARGIN) if size >= 128 else size)

    def for_channels(self, channels: int) -> Preprocessing:
        """The same for grey images (1) or colour images (3); of three means a grey image gets their mean."""
        if channels == self.channels or channels not in (1, 3):
            return self
        if channels == 1:
            mean, std = (sum(v) / len(v) for v in (self.mean, self.std))
            return replace(self, channels=1, mean=(mean,), std=(std,))
        return replace(self, channels=3, mean=self.mean * 3, std=self.std * 3)


@dataclass(frozen=True)
class DataSplits:
    """Data sets of ``(input, target)``: training, decisions of the pruning, and the final table.

    Attributes:
        name: what was asked for.
        train: with augmentation.
        calibration: the training part without augmentation, for profiles.
        validation: what decides while pruning.
        test: read by no decision.
        classes: how many there are; None if not known.
        note: where validation and test come from, as a sentence for people.
    """

    name: str
    train: Dataset[Any] = field(repr=False)
    calibration: Dataset[Any] = field(repr=False)
    validation: Dataset[Any] = field(repr=False)
    test: Dataset[Any] = field(repr=False)
    classes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class _Source:
    """One data set of torchvision: how its training and test parts are made."""

    title: str
    train: Callable[[Any, Path, bool], Any]  # torchvision.datasets, path, download
    test: Callable[[Any, Path, bool], Any]
    downloads: bool = True


def _by_flag(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (
        lambda sets, path, download: getattr(sets, name)(path, train=True, download=download),
        lambda sets, path, download: getattr(sets, name)(path, train=False, download=download),
    )


def _by_split(
    name: str, train: str = "train", test: str = "test", downloads: bool = True
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def make(split: str) -> Callable[..., Any]:
        def build(sets: Any, path: Path, download: bool) -> Any:
            options = {"download": download} if downloads else {}
            return getattr(sets, name)(path, split=split, **options)

        return build

    return make(train), make(test)


def _imagenet(split: str) -> Callable[..., Any]:
    def build(sets: Any, path: Path, download: bool) -> Any:
        # Unpacked folders need no development kit: their sorted names are the order of the classes.
        unpacked = all((path / part).is_dir() for part in ("train", "val"))
        return sets.ImageFolder(path / split) if unpacked else sets.ImageNet(path, split=split)

    return build


def _inaturalist(version: str) -> Callable[..., Any]:
    def build(sets: Any, path: Path, download: bool) -> Any:
        small = f"{version}_mini"
        found = small if (path / small).is_dir() and not (path / version).is_dir() else version
        return sets.INaturalist(path, version=found, download=download)

    return build


# The nine sets of the paper.
SOURCES = {
    "cifar10": _Source("CIFAR-10", *_by_flag("CIFAR10")),
    "cifar100": _Source("CIFAR-100", *_by_flag("CIFAR100")),
    "fashionmnist": _Source("Fashion MNIST", *_by_flag("FashionMNIST")),
    "imagenet": _Source("ImageNet", _imagenet("train"), _imagenet("val"), downloads=False),
    "stanfordcars": _Source("Stanford Cars", *_by_split("StanfordCars", downloads=False), downloads=False),
    "inaturalist": _Source("iNaturalist", _inaturalist("2021_train"), _inaturalist("2021_valid")),
    "food101": _Source("Food-101", *_by_split("Food101")),
    "oxfordpet": _Source("Oxford-IIIT Pet", *_by_split("OxfordIIITPet", "trainval")),
    "fer2013": _Source("FER2013", *_by_split("FER2013", downloads=False), downloads=False),
}


def load_data(
    spec: str,
    preprocessing: Preprocessing | None = None,
    *,
    download: bool = False,
    augment: bool = True,
) -> DataSplits:
    """Read the data that ``spec`` names.

    - ``imagefolder:PATH``: one folder a class. With ``train/`` and ``val/`` and ``test/`` in it, those; with
      ``train/`` and one of the others, that one is the test part, and the validation part is taken from the
      training part; with none of them, the images are split.
    - one of :data:`SOURCES` and ``:PATH``: the set of that name as torchvision reads it, which must be at PATH
      unless ``download``. The validation part is taken from the training part.
    - ``digits:``: the embedded digits, images ``(1, 8, 8)``.
    - ``package.module:function``: the function returns ``(train, validation, test)``, data sets of
      ``(input, target)``, for any task.

    A part taken from another has a tenth of every class, 10,000 images at most for validation, and is the same
    in every run.

    Args:
        preprocessing: what becomes of images; ImageNet's usual if not given.
        augment: train on random crops and mirror images.

    Raises:
        InvalidInputError: an unknown name; a path without such data; classes that differ between the parts.
        EmptyDataError: a part holds nothing.
    """
    kind, separator, rest = spec.partition(":")
    preprocessing = preprocessing or Preprocessing()
    if not separator:
        raise InvalidInputError(
            f"data: got {spec!r}, wanted {_forms()}{_nearest(kind)}"
            + ("; for a folder of images write imagefolder:" + spec if Path(spec).is_dir() else "")
        )
    name = kind.lower().replace("-", "").replace("_", "")
    if name == "digits":
        return _checked(_digits(spec, augment))
    if name == "imagefolder":
        return _checked(_image_folder(spec, _folder(rest, spec), preprocessing, augment))
    if name in SOURCES:
        return _checked(_torchvision(spec, SOURCES[name], rest, preprocessing, download, augment))
    if not all(part.isidentifier() for part in kind.split(".")) or _nearest(kind):
        raise InvalidInputError(f"data: {kind!r} is not known, wanted {_forms()}{_nearest(kind)}")
    return _checked(_from_function(spec))


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Batches ``(inputs, targets)`` of a data set; shuffled ones are for training.

    Order and augmentation follow torch's global generator. In training a last batch of one sample is left
    out, since batch norm cannot train on it.
    """
    size = len(dataset)  # type: ignore[arg-type]
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=workers,
        pin_memory=pin_memory,
        drop_last=shuffle and size > batch_size and size % batch_size == 1,
        persistent_workers=workers > 0,
    )


class CalibrationInputs:
    """The inputs of the first ``count`` batches of a fixed shuffle of a data set, again at every pass.

    They are kept in memory if they take no more than 2 GiB, else read anew. ``pairs`` gives the same batches
    with their targets.
    """

    def __init__(
        self, dataset: Dataset[Any], count: int, batch_size: int, *, workers: int = 0, seed: int = 0
    ) -> None:
        size = len(dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(size, generator=generator)[: count * batch_size].tolist()
        self.pairs: DataLoader[Any] = batches(
            torch.utils.data.Subset(dataset, chosen), batch_size, workers=workers
        )
        self._kept: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Any] | None = []
        room = _MEMORY
        for batch in self.pairs:
            value = inputs_of(batch)
            if kept is not None:
                room -= sum(tensor.nbytes for _, tensor in named_tensors(value))
                kept = [*kept, value] if room >= 0 else None
            yield value
        self._kept = kept


def inputs_of(batch: Any) -> Any:
    """The inputs of a batch ``(inputs, targets)``.

    Raises:
        InvalidInputError: the batch is no pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InvalidInputError(
            f"the data must give pairs (input, target), got {a_kind(batch)}"
            + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        )
    return batch[0]


def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    """Share of the samples whose largest logit is that of their class; between 0 and 1.

    Outputs are ``(B, classes)`` or ``(B, classes, *)`` with targets ``(B, *)`` of class numbers: a tensor, an
    object with ``logits``, or a structure whose first tensor they are.

    Raises:
        InvalidInputError: outputs or targets of another form, or fewer outputs than classes.
        EmptyDataError: there is no batch.
    """
    right = total = 0
    with evaluating(model), torch.inference_mode():
        for batch in loader:
            value = inputs_of(batch)
            target = batch[1]
            outputs = call(model, to_model(value, model))
            logits = getattr(outputs, "logits", None)
            logits = logits if isinstance(logits, Tensor) else first_tensor(outputs)
            if logits is None or not isinstance(target, Tensor) or target.is_floating_point():
                raise InvalidInputError(
                    "accuracy needs logits from the model and class numbers as targets; for another task give "
                    "a function with --evaluate"
                )
            if logits.dim() < 2 or logits.shape[:1] + logits.shape[2:] != target.shape:
                raise InvalidInputError(
                    f"accuracy: the outputs have shape {tuple(logits.shape)} and the targets "
                    f"{tuple(target.shape)}, wanted (B, classes, ...) and (B, ...); for another task give a "
                    "function with --evaluate"
                )
            if target.numel() and int(target.max()) >= logits.shape[1]:
                raise InvalidInputError(
                    f"the model has {logits.shape[1]} outputs, and the data a class numbered {int(target.max())}: "
                    "give the right --num-classes, or weights for these classes"
                )
            right += int((logits.argmax(dim=1) == target.to(logits.device)).sum())
            total += target.numel()
    if not total:
        raise EmptyDataError("there is no sample to measure the accuracy on")
    return right / total


class _Images(Dataset[Any]):
    """Some items of a data set of PIL images, as tensors."""

    def __init__(self, base: Any, indices: Sequence[int], transform: Callable[[Any], Any], mode: str) -> None:
        self.base, self.indices, self.transform, self.mode = base, list(indices), transform, mode

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        number = self.indices[index]
        try:
            image, target = self.base[number]
            image = image.convert(self.mode)  # decodes what was only opened
        except Exception as error:
            # Decoders raise all sorts of errors for a damaged file.
            raise InvalidInputError(
                f"{_item_name(self.base, number)} cannot be read as an image ({error}); repair or remove it"
            ) from error
        return self.transform(image), int(target)


class _Digits(Dataset[Any]):
    def __init__(self, split: Any, augment: bool) -> None:
        self.split, self.augment = split, augment

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.split.images[index]
        if self.augment:
            from .quickstart.data import _shift

            image = _shift(image[None])[0]
        return image, int(self.split.labels[index])


def _digits(spec: str, augment: bool) -> DataSplits:
    from .quickstart.data import load_digits

    digits = load_digits()
    plain = {name: _Digits(split, False) for name, split in digits.items()}
    return DataSplits(
        spec,
        _Digits(digits["train"], augment),
        plain["train"],
        plain["validation"],
        plain["test"],
        classes=10,
        note="the embedded digits have all three parts",
    )


def _image_folder(spec: str, root: Path, preprocessing: Preprocessing, augment: bool) -> DataSplits:
    parts = {
        name: next((root / folder for folder in folders if (root / folder).is_dir()), None)
        for name, folders in (
            ("train", ("train",)),
            ("validation", ("val", "valid", "validation")),
            ("test", ("test",)),
        )
    }
    others = [path for name, path in parts.items() if name != "train" and path is not None]
    only = [entry.name for entry in root.iterdir() if entry.is_dir()] == ["train"]
    if parts["train"] is None or not (others or only):
        # A class may well be called train.
        return _assembled(spec, _read_folder(root), None, None, preprocessing, augment)
    train = _read_folder(parts["train"])
    rest = [_read_folder(path) for path in others]
    for path, dataset in zip(others, rest, strict=True):
        if dataset.classes != train.classes:
            odd = sorted(set(dataset.classes) ^ set(train.classes))
            raise InvalidInputError(
                f"the classes differ: {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''} only in one of "
                f"{parts['train']} and {path}; wanted the same folders in both"
            )
    validation, test = rest if len(rest) == 2 else (None, rest[0] if rest else None)
    names = (
        {"test": f"the folder {others[-1].name}", "validation": f"the folder {others[0].name}"}
        if others
        else None
    )
    return _assembled(spec, train, validation, test, preprocessing, augment, names)


def _read_folder(path: Path) -> Any:
    sets = _datasets()
    try:
        return sets.ImageFolder(path)
    except FileNotFoundError as error:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
        images = tuple(sets.folder.IMG_EXTENSIONS)
        empty = [
            folder
            for folder in folders
            if not any(file.name.lower().endswith(images) for file in folder.rglob("*"))
        ]
        if empty and len(empty) < len(folders):
            names = ", ".join(map(str, empty[:3])) + (" ..." if len(empty) > 3 else "")
            raise InvalidInputError(
                f"{names} {'holds' if len(empty) == 1 else 'hold'} no images; add some, or remove the "
                f"folder{'s' * (len(empty) > 1)}"
            ) from error
        raise InvalidInputError(
            f"{path} holds no images in folders by class, such as {path}/cat/1.png ({error})"
        ) from error


def _torchvision(
    spec: str, source: _Source, path_text: str, preprocessing: Preprocessing, download: bool, augment: bool
) -> DataSplits:
    if download and not source.downloads:
        raise InvalidInputError(
            f"{source.title} cannot be downloaded by torchvision; get it where its authors offer it, and give the "
            "folder. If its images lie in one folder a class, imagefolder:PATH reads them"
        )
    root = Path(path_text).expanduser() if download and path_text else _folder(path_text, spec)
    sets = _datasets()
    try:
        train, test = source.train(sets, root, download), source.test(sets, root, download)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        advice = (
            "; --download gets it"
            if source.downloads and not download
            else "; if its images lie in one folder a class, imagefolder:PATH reads them"
        )
        raise InvalidInputError(f"{source.title} cannot be read at {root}: {reason}{advice}") from error
    return _assembled(spec, train, None, test, preprocessing, augment, {"test": "as the set has it"})


def _assembled(
    spec: str,
    train: Any,
    validation: Any,
    test: Any,
    preprocessing: Preprocessing,
    augment: bool,
    names: Mapping[str, str] | None = None,
) -> DataSplits:
    """Wrap the data sets, and take from the training part what is missing."""
    targets = _targets(train)
    indices = list(range(len(train)))
    notes = []
    taken: dict[str, list[int]] = {}
    for name, present, share, most in (
        ("test", test, TEST_SHARE, None),
        ("validation", validation, VALIDATION_SHARE, VALIDATION_MOST),
    ):
        if present is None:
            if most is not None and indices:
                share = min(share, most / len(indices))
            indices, taken[name] = _take(indices, targets, share)
            notes.append(f"{name}: {len(taken[name]):,} images taken from the training part")
        else:
            notes.append(f"{name}: {(names or {}).get(name, 'as given')}")
    mode = "L" if preprocessing.channels == 1 else "RGB"
    plain, augmented = _transform(preprocessing, False), _transform(preprocessing, augment)

    def part(name: str, present: Any) -> _Images:
        base, chosen = (train, taken[name]) if present is None else (present, range(len(present)))
        return _Images(base, chosen, plain, mode)

    classes = getattr(train, "classes", None) or getattr(train, "all_categories", None)
    known = len(classes) if classes else (max(targets) + 1 if targets else None)
    return DataSplits(
        spec,
        _Images(train, indices, augmented, mode),
        _Images(train, indices, plain, mode),
        part("validation", validation),
        part("test", test),
        classes=known,
        note="; ".join(notes),
    )


def _transform(preprocessing: Preprocessing, augment: bool) -> Callable[[Any], Any]:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise _needs_torchvision(error) from error
    size = preprocessing.size
    how = {"interpolation": v2.InterpolationMode(preprocessing.interpolation), "antialias": True}
    if not augment:
        steps = [v2.Resize(preprocessing.resize, **how), v2.CenterCrop(size)]
    elif size >= 128:
        steps = [v2.RandomResizedCrop(size, scale=(0.35, 1.0), **how), v2.RandomHorizontalFlip()]
    else:
        pad = max(1, size // 8)
        steps = [v2.Resize((size, size), **how), v2.RandomCrop(size, padding=pad), v2.RandomHorizontalFlip()]
    steps += [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(preprocessing.mean), list(preprocessing.std)),
        v2.ToPureTensor(),
    ]
    composed: Callable[[Any], Any] = v2.Compose(steps)
    return composed


def _take(indices: list[int], targets: list[int] | None, share: float) -> tuple[list[int], list[int]]:
    """Split off a share of every class (of all, where classes are not known), the same at every call."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    by_class: dict[int, list[int]] = {}
    for index in indices:
        by_class.setdefault(targets[index] if targets else 0, []).append(index)
    taken: set[int] = set()
    for _, members in sorted(by_class.items()):
        order = torch.randperm(len(members), generator=generator).tolist()
        # A class of one or two images stays where it is trained on.
        count = max(1, round(share * len(members))) if len(members) > 2 else 0
        taken.update(members[i] for i in order[:count])
    return [i for i in indices if i not in taken], [i for i in indices if i in taken]


def _targets(dataset: Any) -> list[int] | None:
    """The class of every item without reading an image, where the data set keeps them in a known place."""
    for name in ("targets", "_labels", "labels"):
        values = getattr(dataset, name, None)
        if values is not None and len(values) == len(dataset):
            return [int(value) for value in values]
    for name, place in (("samples", 1), ("_samples", 1), ("index", 0)):
        items = getattr(dataset, name, None)
        if isinstance(items, Sequence) and len(items) == len(dataset) and items[0][place] is not None:
            return [int(item[place]) for item in items]
    return None


def _item_name(dataset: Any, index: int) -> str:
    """The file of an item, where the data set says so; else its number."""
    for name in ("samples", "_samples", "_image_files", "_images"):
        items = getattr(dataset, name, None)
        if isinstance(items, Sequence):
            item = items[index]
            path = item[0] if isinstance(item, tuple) else item
            if isinstance(path, (str, Path)):
                return str(path)
    if hasattr(dataset, "all_categories"):
        category, file = dataset.index[index]
        return str(Path(dataset.root) / dataset.all_categories[category] / file)
    return f"image {index} of {type(dataset).__name__}"


def _from_function(spec: str) -> DataSplits:
    function = import_object(spec, "data")
    if not callable(function):
        raise InvalidInputError(f"data: {spec} is {a_kind(function)}, wanted a function")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InvalidInputError(f"data: {spec} must need no argument ({error})") from error
    except ValueError:
        pass  # built in, without a signature
    with users_code(f"--data {spec}"):
        parts = function()
    if not isinstance(parts, (tuple, list)) or len(parts) != 3:
        raise InvalidInputError(
            f"data: {spec}() must return (train, validation, test), data sets of (input, target); it returned "
            f"{a_kind(parts)}" + (f" of {len(parts)}" if isinstance(parts, (tuple, list)) else "")
        )
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        if isinstance(part, DataLoader) or not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
            raise InvalidInputError(
                f"data: the {name} part of {spec}() is {a_kind(part)}, wanted a data set with "
                "__getitem__ and __len__, or a list of pairs"
            )
    train, validation, test = parts
    return DataSplits(spec, train, train, validation, test, note=f"all three parts come from {spec}")


def _checked(data: DataSplits) -> DataSplits:
    for name in ("train", "validation", "test"):
        if not len(getattr(data, name)):
            raise EmptyDataError(f"the {name} part of {data.name} is empty; wanted at least one sample")
    return data


def _folder(text: str, spec: str) -> Path:
    path = Path(text).expanduser()
    if not text or not path.is_dir():
        raise InvalidInputError(f"data: there is no folder {text!r} (from {spec!r})")
    return path


def _forms() -> str:
    return f"imagefolder:PATH, digits:, package.module:function, or PATH after one of {', '.join(SOURCES)}"


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), [*SOURCES, "imagefolder", "digits"], n=2, cutoff=0.75)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _datasets() -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise _needs_torchvision(error) from error
    return datasets


def _needs_torchvision(error: Exception) -> InvalidInputError:
    return InvalidInputError(f"reading images needs torchvision ({error}): pip install torchvision")
