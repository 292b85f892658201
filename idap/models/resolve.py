"""From a name to a model: ``resnet50``, ``timm/convnext_tiny``, ``package.module:factory``.

torchvision, timm and transformers are imported by the functions that need them; none of them is a dependency of
the package. Nothing is downloaded unless pretrained weights are asked for.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import IdapError, InvalidInputError
from ..inputs import Inputs, map_tensors

if TYPE_CHECKING:
    from .architectures import Architecture

# Where a name is looked for, in this order; "idap" has the architectures of the paper.
LIBRARIES = ("idap", "torchvision", "timm", "transformers")
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which checkpoints keep the weights
# Heads that only training reads. Pruning looks at what runs in eval mode, so they would be left with old widths.
_AUXILIARY = {"inception_v3": ("AuxLogits.",), "googlenet": ("aux1.", "aux2.")}


@dataclass(frozen=True)
class ModelFactory:
    """Builds one architecture, with new weights and the same structure at every call; needs no network.

    It pickles, and is what :func:`idap.load` wants as ``model_factory``. :func:`resolve` makes one from a
    name and says what is wrong with it.

    Attributes:
        name: ``"idap/NAME"``, ``"torchvision/NAME"``, ``"timm/NAME"``, ``"transformers/CLASS"``,
            ``"transformers/DIRECTORY"`` or ``"package.module:factory"``.
        num_classes: outputs of the classifier (``num_labels`` in transformers); the library's default if not
            given.
        image_size: height and width in pixels, for the models that are made for one size (vision
            transformers); the others ignore it.
        pretrained: whether the model is one for the library's own weights, which makes a difference for some
            of torchvision: ``inception_v3`` and ``googlenet`` then change the normalisation of their inputs,
            and a vision transformer is built for the images that those weights were trained on.
    """

    name: str
    num_classes: int | None = None
    image_size: int | None = None
    pretrained: bool = False

    def __call__(self) -> nn.Module:
        """The model, on the CPU, in the mode its builder leaves it in.

        Raises:
            InvalidInputError: the name is unknown, its library is missing, or it cannot be built so.
        """
        library, name = self._parts()
        if library == "idap":
            return self._own(name)
        if library == "torchvision":
            return self._torchvision(name)
        if library == "timm":
            return self._timm(name)
        if library == "transformers":
            return self._transformers(name)
        factory = import_object(self.name, "model")
        options = {} if self.num_classes is None else {"num_classes": self.num_classes}
        if isinstance(factory, nn.Module):
            raise InvalidInputError(
                f"{self.name} is a model, not a function that makes one: it must give a fresh model at every "
                f"call, such as def build(): return {type(factory).__name__}(...)"
            )
        _check_call(self.name, factory, options)
        with users_code(self.name):
            model = factory(**options)
        if not isinstance(model, nn.Module):
            raise InvalidInputError(f"{self.name}() returned {a_kind(model)}, wanted a torch.nn.Module")
        return model

    @property
    def is_library(self) -> bool:
        """Whether it is no function of the user's: a library builds it, or this package."""
        return self._parts()[0] in LIBRARIES

    @property
    def takes_classes(self) -> bool:
        """Whether ``num_classes`` means something to a model that is no function of the user's."""
        library, name = self._parts()
        return "classes" in _parameters(_default_builder(name)) if library == "idap" else library != ""

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to be had by ``build("default")``: of torchvision, timm, or in a directory."""
        library, name = self._parts()
        return library in ("torchvision", "timm") or (library == "transformers" and _is_directory(name))

    def code(self) -> str:
        """The Python expression that makes this factory."""
        given = [repr(self.name)]
        given += [f"{key}={value!r}" for key, value in vars(self).items() if key != "name" and value]
        return f"ModelFactory({', '.join(given)})"

    def input_config(self) -> dict[str, Any]:
        """What the library's weights were trained on; empty where it says nothing.

        Keys: ``size`` and ``resize`` (pixels), ``mean`` and ``std`` (3 numbers each), ``interpolation``.
        """
        library, name = self._parts()
        if library == "torchvision":
            weights = _torchvision_weights(name)
            preset: Any = weights.transforms() if weights is not None else None
            if not hasattr(preset, "crop_size"):
                return {}
            return {
                "size": preset.crop_size[0],
                "resize": preset.resize_size[0],
                "mean": tuple(preset.mean),
                "std": tuple(preset.std),
                "interpolation": preset.interpolation.value,
            }
        if library == "timm":
            timm = _library("timm")
            config = timm.data.resolve_data_config(pretrained_cfg=_timm_config(timm, name))
            size = config["input_size"][-1]
            return {
                "size": size,
                "resize": int(size / config["crop_pct"]),
                "mean": tuple(config["mean"]),
                "std": tuple(config["std"]),
                "interpolation": config["interpolation"],
            }
        return {}

    def example_inputs(self, batch: int = 1) -> Inputs | None:
        """Random inputs that an architecture of the paper takes; None for a model that is none of these."""
        library, name = self._parts()
        known = _architectures().get(name) if library == "idap" else None
        if known is None:
            return None
        size = self.image_size

        def resized(tensor: Tensor) -> Tensor:
            images = (
                size is not None and tensor.is_floating_point() and tensor.dim() == 4 and tensor.shape[1] == 3
            )
            return torch.randn(*tensor.shape[:2], size, size) if images and size is not None else tensor

        inputs: Inputs = map_tensors(known.inputs(batch), resized)
        return inputs

    def classes(self) -> int | None:
        """How many classes the library's pretrained weights tell apart, if it says so."""
        library, name = self._parts()
        if library == "torchvision":
            weights = _torchvision_weights(name)
            return len(weights.meta.get("categories", ())) or None if weights is not None else None
        if library == "timm":
            return _timm_config(_library("timm"), name).get("num_classes")
        return None

    def build(self, weights: str | os.PathLike[str] = "none") -> nn.Module:
        """The model with weights, in eval mode.

        Args:
            weights: ``"none"`` (new ones, or those that the user's own function gives), ``"default"`` (the
                library's pretrained ones, downloaded if they are not there; a classifier of another number of
                classes stays new) or a file, see :func:`load_weights`.

        Raises:
            InvalidInputError: the weights cannot be had, or do not fit; the message names the first keys.
        """
        if weights != "default":
            model = self()
            if weights != "none":
                load_weights(model, weights, ignore=_AUXILIARY.get(self._parts()[1], ()))
            return model.eval()
        library, name = self._parts()
        if library == "torchvision":
            known = _torchvision_weights(name)
            if known is None:
                raise InvalidInputError(f"torchvision has no weights for {name}; give a file or none")
            try:
                state = known.get_state_dict(progress=False, check_hash=True)
            except Exception as error:
                raise _no_weights(self.name, error) from error
            model = self()
            if self.num_classes is not None and self.num_classes != self.classes():
                own = model.state_dict()
                state = {
                    key: value
                    for key, value in state.items()
                    if key not in own
                    or value.shape == own[key].shape
                    or (len(value), len(own[key])) != (self.classes(), self.num_classes)
                }
                classifier = tuple(key for key in own if key not in state)
            else:
                classifier = ()
            _fit(model, state, f"{known}", ignore=_AUXILIARY.get(name, ()), optional=classifier)
            return model.eval()
        if library == "transformers" and _is_directory(name):
            return self._transformers(name, pretrained=True).eval()
        if library == "timm":
            _library("timm")
            try:
                return self._timm(name, pretrained=True).eval()
            except InvalidInputError:
                raise
            except Exception as error:
                raise _no_weights(self.name, error) from error
        raise InvalidInputError(
            f"only the models of torchvision, of timm and in a directory of transformers have default weights, "
            f"{self.name} has not: give a file or none"
        )

    def _parts(self) -> tuple[str, str]:
        library, _, name = self.name.partition("/")
        return (library, name) if name and library in LIBRARIES else ("", self.name)

    def _own(self, name: str) -> nn.Module:
        builder = _default_builder(name)
        of_library = _library_factory(builder)
        if of_library is not None:
            options = {key: value for key, value in vars(self).items() if key != "name"}
            return replace(of_library, **options)()
        known, given = _parameters(builder), {"classes": self.num_classes, "size": self.image_size}
        if self.num_classes is not None and "classes" not in known:
            raise InvalidInputError(f"{self.name} has no classifier, got num-classes {self.num_classes}")
        chosen = {key: value for key, value in given.items() if value is not None and key in known}
        return _built(self.name, builder, chosen)

    def _transformers(self, name: str, pretrained: bool = False) -> nn.Module:
        transformers = _library("transformers")
        options: dict[str, Any] = {} if self.num_classes is None else {"num_labels": self.num_classes}
        try:
            if _is_directory(name):
                config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, **options)
                kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
            else:
                kind = _transformers_class(name)
                if kind is None:
                    raise _unknown(self.name)
                config = kind.config_class(**options)
            if self.image_size is not None and hasattr(config, "image_size"):
                config.image_size = self.image_size
            if pretrained:
                model: nn.Module = kind.from_pretrained(
                    name, config=config, local_files_only=True, ignore_mismatched_sizes=bool(options)
                )
            elif hasattr(kind, "_from_config"):
                model = kind._from_config(config)
            else:
                model = kind.from_config(config)
        except InvalidInputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            weights = "with its weights" if pretrained else "from its configuration"
            raise InvalidInputError(f"{self.name} cannot be built {weights}: {reason}") from error
        return model

    def _torchvision(self, name: str) -> nn.Module:
        models = _library("torchvision").models
        if name not in models.list_models():
            raise _unknown(self.name)
        builder = models.get_model_builder(name)
        parameters = inspect.signature(builder).parameters
        options: dict[str, Any] = {"weights": None}
        if "weights_backbone" in parameters:
            options["weights_backbone"] = None
        if self.num_classes is not None:
            options["num_classes"] = self.num_classes
        if name in _AUXILIARY:
            options |= {"aux_logits": False, "init_weights": False, "transform_input": self.pretrained}
        if name.startswith("vit_"):
            weights = _torchvision_weights(name)
            size = weights.meta["min_size"][0] if self.pretrained and weights is not None else 224
            options["image_size"] = self.image_size or size
        return _built(self.name, builder, options)

    def _timm(self, name: str, pretrained: bool = False) -> nn.Module:
        timm = _library("timm")
        if not timm.is_model(name):
            raise _unknown(self.name)
        options: dict[str, Any] = {"pretrained": pretrained}
        if self.num_classes is not None:
            options["num_classes"] = self.num_classes
        if self.image_size is not None:
            try:
                model: nn.Module = timm.create_model(name, img_size=self.image_size, **options)
                return model
            except TypeError as error:
                # Most convolutional networks know no such argument, as they take any size.
                if "img_size" not in str(error):
                    raise
        return _built(self.name, lambda **given: timm.create_model(name, **given), options)


def resolve(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
) -> ModelFactory:
    """The factory for a name of the paper's architectures, else of torchvision, timm or transformers.

    ``idap/NAME``, ``torchvision/NAME``, ``timm/NAME`` and ``transformers/NAME`` say which is meant. A name of
    transformers is that of a class, built with its default configuration (``BertForSequenceClassification``), or
    a directory with a ``config.json``. ``package.module:function`` is a function of the user's own. Nothing is
    built yet; a module of the user's own is imported, with the current directory on the path.

    Raises:
        InvalidInputError: the name is unknown (the message lists those most like it), the library is missing,
            a number is not positive.
    """
    for what, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value is not None and value < 1:
            raise InvalidInputError(f"{what.replace('_', '-')} must be at least 1, got {value}")
    if ":" in name:
        import_object(name, "model")
        return ModelFactory(name, num_classes)
    library, _, rest = name.partition("/")
    if library in LIBRARIES and rest:
        _library(library)
        if not _has(library, rest):
            raise _unknown(name)
    else:
        found = next((lib for lib in LIBRARIES if _installed(lib) and _has(lib, name)), None)
        if found is None:
            raise _unknown(name)
        library, rest = found, name
    if library == "idap":
        of_library = _library_factory(_default_builder(rest))
        if of_library is not None:
            library, rest = of_library._parts()
    elif library == "transformers" and _is_directory(rest):
        rest = os.path.abspath(rest)
    name = f"{library}/{rest}"
    if library == "torchvision" and not rest.startswith("vit_"):
        image_size = None  # they take any size
    alike = not (library == "torchvision" and (rest.startswith("vit_") or rest in _AUXILIARY))
    return ModelFactory(name, num_classes, image_size, pretrained and not alike)


def import_object(spec: str, what: str) -> Any:
    """What ``package.module:name`` stands for; the current directory may hold the module.

    Raises:
        InvalidInputError: no such module or name, or the module fails to import something.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise InvalidInputError(f"{what}: got {spec!r}, wanted package.module:name")
    here = os.getcwd()
    if here not in sys.path:
        # As python -m does; entry points start without the current directory.
        sys.path.insert(0, here)
    try:
        with users_code(f"{what}: importing {module_name}"):
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise InvalidInputError(
            f"{what}: {spec!r} cannot be imported ({error}); modules are looked for in the current directory "
            "and among what is installed"
        ) from error
    value = module
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise InvalidInputError(
                f"{what}: {getattr(value, '__name__', module_name)} has no {part!r}"
                + suggest(part, [name for name in vars(value) if not name.startswith("_")])
            ) from None
    return value


class UserCodeError(IdapError):
    """A function or a module of the user's raised; ``frames`` is the user's part of the traceback."""

    def __init__(self, message: str, frames: str = "") -> None:
        super().__init__(message)
        self.frames = frames


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Run code of the user's, and say of an exception what raised it and where.

    Errors of ours, and modules that are not there, pass as they are.

    Raises:
        UserCodeError: for any other exception.
    """
    try:
        yield
    except (IdapError, ImportError):
        raise
    except Exception as error:
        foreign = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
        foreign.append(Path(__file__).resolve().parents[1])
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if not frame.filename.startswith("<")
            and not any(Path(frame.filename).is_relative_to(place) for place in foreign)
        ]
        where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        raise UserCodeError(
            f"{what} raised {type(error).__name__}: {error}{where}", "".join(traceback.format_list(frames))
        ) from error


def a_kind(value: Any) -> str:
    """The type of a value with its article: ``"an int"``, ``"a Tensor"``."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, ignore: tuple[str, ...] = ()) -> None:
    """Load a state dictionary from ``.safetensors``, ``.pt`` or ``.pth`` into ``model``, in place.

    Files of torch are read with ``weights_only=True``, so that nothing in them runs. A dictionary inside
    another (``state_dict``, ``model_state_dict``, ``model``) is found, and the prefix ``module.`` of parallel
    training removed.

    Args:
        ignore: prefixes of keys that the model need not have.

    Raises:
        InvalidInputError: the file is missing, unreadable or holds something else; or it does not fit, with the
            first keys that are missing, unknown or of another shape, and how many there are.
    """
    file = Path(path)
    if not file.is_file():
        raise InvalidInputError(f"there is no file {file}: weights are none, default, or a file")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content: Any = load_file(file)
        except (SafetensorError, OSError) as error:
            raise InvalidInputError(f"{file} cannot be read as safetensors: {error}") from error
    elif file.suffix in (".pt", ".pth"):
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise InvalidInputError(
                f"{file} cannot be read as plain weights ({reason}); save them with "
                "torch.save(model.state_dict(), path)"
            ) from error
    else:
        raise InvalidInputError(
            f"{file}: weights are .safetensors, .pt or .pth, got {file.suffix or 'no suffix'!r}"
        )
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(t, Tensor) for t in content.values())
    ):
        raise InvalidInputError(
            f"{file} holds {a_kind(content)} that is no state dictionary (names and tensors); save "
            "model.state_dict()"
        )
    state = {str(key): value for key, value in content.items()}
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    _fit(model, state, str(file), ignore=ignore)


def _fit(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    ignore: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> None:
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or not key.startswith(ignore)}
    missing = [
        key
        for key in own
        # Files from before PyTorch 0.4.1 have no such counts, and no result depends on them.
        if key not in state and key not in optional and not key.endswith("num_batches_tracked")
    ]
    unknown = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{len(keys)} {text}: {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}"
        for keys, text in (
            (missing, "of the model are not in it"),
            (unknown, "are not in the model"),
            (shapes, "have another shape"),
        )
        if keys
    ]
    if problems:
        advice = "; is it the right model?" if missing or unknown else "; is --num-classes right?"
        raise InvalidInputError(
            f"{source} does not fit {type(model).__name__} (of its {len(own)} tensors): {'; '.join(problems)}{advice}"
        )
    model.load_state_dict({**{key: own[key] for key in own if key not in state}, **state})


def _check_call(name: str, factory: Any, options: Mapping[str, Any]) -> None:
    if not callable(factory):
        raise InvalidInputError(f"{name} is {a_kind(factory)}, wanted a function that returns the model")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        raise InvalidInputError(
            f"{name} cannot be called with {', '.join(options) or 'no argument'} ({error}); wanted a function "
            "without required arguments"
            + (", that takes num_classes if --num-classes is given" if options else "")
        ) from error


def _built(name: str, builder: Any, options: Mapping[str, Any]) -> nn.Module:
    try:
        model: nn.Module = builder(**options)
    except (TypeError, ValueError, AssertionError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise InvalidInputError(f"{name} cannot be built with {given}: {error}") from error
    return model


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise InvalidInputError(
            f"{package} is needed for this model ({error}): pip install {package}"
        ) from error


def _names(library: str) -> list[str]:
    if library == "idap":
        return list(_architectures())
    if library == "timm":
        return list(_library("timm").list_models())
    if library == "transformers":
        tables = vars(_library("transformers.models.auto.modeling_auto")).items()
        values = [v for key, table in tables if key.endswith("_MAPPING_NAMES") for v in table.values()]
        return sorted({own for v in values for own in (v if isinstance(v, (tuple, list)) else (v,))})
    names = _library("torchvision").models.list_models()
    return [name for name in names if not name.startswith("quantized_")]


def _has(library: str, name: str) -> bool:
    if library == "timm":
        return bool(_library("timm").is_model(name))
    if library == "transformers":
        return _is_directory(name) or _transformers_class(name) is not None
    return name in _names(library)


def _architectures() -> Mapping[str, Architecture]:
    from .registry import ARCHITECTURES  # here, as its builders are made of this module

    return ARCHITECTURES


def _default_builder(name: str) -> Any:
    known = _architectures().get(name)
    if known is None:
        raise _unknown(f"idap/{name}")
    return next(iter(known.builders.values()))


def _library_factory(builder: Any) -> ModelFactory | None:
    """The factory whose ``build`` an architecture of the paper takes for its builder, if it does."""
    own = getattr(builder, "__self__", None)
    return own if isinstance(own, ModelFactory) else None


def _parameters(builder: Any) -> set[str]:
    if _library_factory(builder) is not None:
        return {"classes"}
    return set(inspect.signature(builder).parameters)


def _is_directory(name: str) -> bool:
    return (Path(name) / "config.json").is_file()


def _transformers_class(name: str) -> Any:
    """The class of transformers that has this name and is a whole model with a configuration; else None."""
    if not name.isidentifier() or not name[0].isupper() or name.endswith("PreTrainedModel"):
        return None  # without importing the library
    try:
        kind = getattr(_library("transformers"), name, None)
    except (ImportError, RuntimeError):  # a model whose own requirements are missing
        return None
    whole = isinstance(kind, type) and issubclass(kind, nn.Module)
    return kind if whole and getattr(kind, "config_class", None) is not None else None


def _unknown(name: str) -> InvalidInputError:
    library, _, rest = name.rpartition("/")
    searched = [lib for lib in ([library] if library in LIBRARIES else LIBRARIES) if _installed(lib)]
    missing = [lib for lib in LIBRARIES if not _installed(lib)]
    message = f"there is no model {name!r}"
    message += f" in {' or '.join(searched)}" if searched else ""
    message += suggest(rest, [known for lib in searched for known in _names(lib)])
    message += "; a function of your own is package.module:function"
    if Path(name).is_dir():
        message += ", and a directory is taken for a model of transformers if it holds a config.json"
    if missing and library not in LIBRARIES:
        message += f"; not installed: {', '.join(missing)} (pip install {' '.join(missing)})"
    return InvalidInputError(message)


def suggest(name: str, known: Iterable[str]) -> str:
    """``"; the nearest: ..."`` with up to five of the known names that begin or are spelt alike, or ``""``."""
    names, wanted = {each.lower(): each for each in sorted(set(known))}, name.lower()
    beginning = [each for each in names if wanted and each.startswith(wanted)]
    alike = difflib.get_close_matches(wanted, names, n=5, cutoff=0.5)
    nearest = [names[each] for each in dict.fromkeys([*beginning, *alike])][:5]
    return f"; the nearest: {', '.join(nearest)}" if nearest else ""


def _no_weights(name: str, error: Exception) -> InvalidInputError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InvalidInputError(
        f"the pretrained weights of {name} cannot be had ({reason}); they are downloaded once, which needs the "
        "network: give a file or none with --weights"
    )


def _torchvision_weights(name: str) -> Any:
    models = _library("torchvision").models
    try:
        return models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):
        return None


def _timm_config(timm: Any, name: str) -> dict[str, Any]:
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return dict(config.to_dict()) if config is not None else {}
