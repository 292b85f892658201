"""What a command works on: the options that name a model and data, and both of them made from these."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import CalibrationInputs, DataSplits, Preprocessing, load_data
from ..errors import InvalidInputError
from ..inputs import as_call, call, first_tensor, map_tensors, named_tensors, to_model
from ..models import ModelFactory, resolve


@dataclass(frozen=True)
class Subject:
    """A model in eval mode on its device, the factory that rebuilds it, and what its inputs are like."""

    model: nn.Module
    factory: ModelFactory
    preprocessing: Preprocessing
    device: torch.device
    notes: tuple[str, ...] = ()  # what the user should know, a sentence each


def add_model_options(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    """``MODEL``, ``--weights``, ``--num-classes``, ``--image-size``, ``--device``, ``--threads``."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name of `idap models`, torchvision, timm or transformers (resnet50, timm/convnext_tiny, "
        "transformers/BertForSequenceClassification), a directory with a config.json of transformers, or "
        "package.module:function",
    )
    if weights:
        parser.add_argument(
            "--weights",
            metavar="W",
            help="none, default (the library's pretrained ones), or a file: .safetensors, .pt, .pth "
            "(default: default where there are any, else none)",
        )
    else:
        parser.set_defaults(weights="none")
    parser.add_argument("--num-classes", type=int, metavar="N", help="outputs of the classifier")
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="height and width of the images (default: the model's)"
    )
    parser.add_argument(
        "--device", metavar="NAME", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as torch chooses)")


def add_data_options(parser: argparse.ArgumentParser, *, required: bool, batches: int) -> None:
    """``--data``, ``--batch-size``, ``--calibration-batches`` and how images are read."""
    parser.add_argument(
        "--data",
        required=required,
        metavar="SPEC",
        help="imagefolder:PATH, cifar10:PATH (and cifar100, fashionmnist, imagenet, stanfordcars, inaturalist, "
        "food101, oxfordpet, fer2013), digits:, or package.module:function that returns (train, validation, "
        "test)",
    )
    parser.add_argument("--download", action="store_true", help="get the data if they are not at PATH")
    parser.add_argument(
        "--mean",
        type=_numbers,
        metavar="X,X,X",
        help="of the normalisation (default: the model's, or ImageNet's)",
    )
    parser.add_argument(
        "--std", type=_numbers, metavar="X,X,X", help="likewise (default: the model's, or ImageNet's)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images a batch (default: 64)"
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)"
    )
    parser.add_argument(
        "--calibration-batches",
        type=int,
        default=batches,
        metavar="N",
        help=f"batches of the training part that the profile reads (default: {batches})",
    )


def check_numbers(args: argparse.Namespace, least: Mapping[str, float]) -> None:
    """Refuse options below their least value, before anything is loaded; None is not looked at.

    Raises:
        InvalidInputError: names the option.
    """
    for name, low in least.items():
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and value >= low):
            raise InvalidInputError(f"{name.replace('_', '-')} must be at least {low:g}, got {value:g}")


def open_data(args: argparse.Namespace, *, seed: int = 0, augment: bool = True) -> tuple[Subject, DataSplits]:
    """The model and the data that the options name, fitted to each other.

    A model of a library gets as many classes as the data have, unless ``--num-classes`` says otherwise. New
    weights depend on the seed alone.
    """
    factory = _factory(args)
    # Only the user's own models may want other than three channels, and they are built without the data.
    model = None if factory.is_library else _build(factory, args, seed)
    preprocessing = _preprocessing(factory, args)
    if model is not None:
        preprocessing = preprocessing.for_channels(_channels(model))
    data = load_data(args.data, preprocessing, download=args.download, augment=augment)
    if factory.takes_classes and factory.num_classes is None:
        factory = replace(factory, num_classes=data.classes)
    return _subject(factory, model or _build(factory, args, seed), preprocessing, args), data


def open_model(args: argparse.Namespace, *, seed: int = 0) -> Subject:
    """The model that the options name."""
    factory = _factory(args)
    model = _build(factory, args, seed)
    return _subject(factory, model, _preprocessing(factory, args).for_channels(_channels(model)), args)


def calibration_inputs(args: argparse.Namespace, data: DataSplits, seed: int = 0) -> CalibrationInputs:
    """``--calibration-batches`` batches of the training part."""
    return CalibrationInputs(
        data.calibration, args.calibration_batches, args.batch_size, workers=args.workers, seed=seed
    )


def check_fit(name: str, model: nn.Module, data: str, example: Any) -> None:
    """Run the model on one sample, before anything else costs time.

    Raises:
        InvalidInputError: it cannot, with its own words for the reason.
    """
    try:
        with torch.no_grad():
            call(model, example)
    except Exception as error:
        tensor = first_tensor(example)
        shape = (
            "x".join(map(str, tensor.shape[1:])).replace("x", "\N{MULTIPLICATION SIGN}")
            if tensor is not None
            else ""
        )
        reason = str(error) or type(error).__name__
        if isinstance(error, NotImplementedError):
            advice = "give a model that has a forward function"
        elif tensor is not None and tensor.dim() == 4 and tensor.shape[1] != _channels(model):
            advice = "give data or a model with the same channels"
        else:
            advice = "give data that the model takes, or another model"
        raise InvalidInputError(
            f"{name} cannot run on the samples of {data.removesuffix(':')}{f' ({shape})' if shape else ''}: "
            f"{reason}; {advice}"
        ) from error


def first_sample(batch: Any, model: nn.Module) -> Any:
    """The first sample of a batch of inputs, as a batch of one on the device of the model."""
    return to_model(map_tensors(batch, lambda t: t[:1] if t.dim() else t), model)


def input_shape(subject: Subject, shape: tuple[int, ...] | None, batch: int = 1) -> tuple[int, ...]:
    """``shape``, or that of a batch of images as the model wants them."""
    p = subject.preprocessing
    return shape or (batch, p.channels, p.size, p.size)


def parse_shape(text: str) -> tuple[int, ...]:
    """``"1,3,224,224"`` as a tuple, for argparse."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape such as 1,3,224,224")
    return shape


def random_inputs(subject: Subject, shape: tuple[int, ...] | None, batch: int = 1, seed: int = 0) -> Any:
    """Normal noise of ``shape``; without one, a batch of what the model takes, as far as that is known.

    The same for the same seed.
    """
    if shape is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            own = subject.factory.example_inputs(batch)
        if own is None:
            # What the models of transformers take, one sample or a few.
            dummy = getattr(subject.model, "dummy_inputs", None)
            if isinstance(dummy, Mapping) and any(not t.is_floating_point() for _, t in named_tensors(dummy)):
                own = map_tensors(dict(dummy), lambda t: t[:1].expand(batch, *t.shape[1:]) if t.dim() else t)
        if own is not None:
            return to_model(own, subject.model)
    noise = torch.randn(input_shape(subject, shape, batch), generator=torch.Generator().manual_seed(seed))
    return noise.to(subject.device)


def shapes_of(example: Any) -> str:
    """The shapes of all tensors of an input, for messages: ``"(1, 128), (1, 128)"``."""
    return ", ".join(str(tuple(tensor.shape)) for _, tensor in named_tensors(as_call(example)))


def pick_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is CUDA where there is one.

    Raises:
        InvalidInputError: this machine or this torch has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidInputError(
            f"device: got {name!r}, wanted one that is here, such as cpu ({reason})"
        ) from error
    return device


def _factory(args: argparse.Namespace) -> ModelFactory:
    if args.weights is None:
        args.weights = "default" if resolve(args.model).has_weights else "none"
    return resolve(
        args.model,
        num_classes=args.num_classes,
        image_size=args.image_size,
        # A file mostly holds pretrained weights that were trained on.
        pretrained=getattr(args, "pretrained", args.weights != "none"),
    )


def _build(factory: ModelFactory, args: argparse.Namespace, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory.build(args.weights)


def _subject(
    factory: ModelFactory, model: nn.Module, preprocessing: Preprocessing, args: argparse.Namespace
) -> Subject:
    device = pick_device(args.device)
    notes = []
    if factory.is_library and args.weights == "none":
        notes.append(f"{factory.name} has new weights, as nothing was loaded (--weights none).")
    elif args.weights == "default" and factory.num_classes not in (None, factory.classes()):
        notes.append(
            f"The classifier of {factory.name} is new, as the pretrained one has {factory.classes()} classes "
            f"and this one {factory.num_classes}: train the model first, and give the file with --weights."
        )
    return Subject(model.to(device), factory, preprocessing, device, tuple(notes))


def _preprocessing(factory: ModelFactory, args: argparse.Namespace) -> Preprocessing:
    result = replace(Preprocessing(), **factory.input_config())
    if args.image_size is not None and args.image_size != result.size:
        result = result.sized(args.image_size)
    given: dict[str, Any] = {
        name: getattr(args, name) for name in ("mean", "std") if getattr(args, name, None) is not None
    }
    for name, values in given.items():
        if len(values) not in (1, 3):
            raise InvalidInputError(f"{name}: got {len(values)} numbers, wanted 3, or 1 for all channels")
        given[name] = values if len(values) == 3 else values * 3
        if name == "std" and min(values) <= 0:
            raise InvalidInputError(f"std must be above 0, got {min(values):g}")
    return replace(result, **given)


def _channels(model: nn.Module) -> int:
    """Input channels of the first convolution; 3 for models without."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.5,0.5,0.5") from None


def path_of(text: str) -> Path:
    """A path with ``~`` resolved, for argparse."""
    return Path(os.path.expanduser(text))
