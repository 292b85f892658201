"""A pruned model on disk: weights as safetensors, plan and description as JSON; loading never unpickles.

A directory holds ``model.safetensors``, ``plan.json`` and ``metadata.json``. The architecture is not stored:
``load`` gets the original from the caller's factory, replays the plan on it and puts the stored tensors in
place.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata as _distributions
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import complexity
from .errors import ArtifactError, IdapError, InvalidInputError, PlanMismatchError
from .groups import side_size
from .plan import BlockRemoval, IdentityBlock, PruningPlan

FORMAT = "idap-artifact"
FORMAT_VERSION = 1
WEIGHTS, PLAN, METADATA = "model.safetensors", "plan.json", "metadata.json"


def save(
    result: Any = None,
    directory: str | os.PathLike[str] | None = None,
    *,
    model: nn.Module | None = None,
    plan: PruningPlan | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a pruned model; the directory appears complete or not at all.

    Args:
        result: anything with the attributes ``model`` and ``plan``, or the pruned module itself.
        directory: where to. An earlier artifact there is replaced; any other directory that is not empty is
            refused.
        model: the pruned module, if ``result`` is not given.
        plan: what was done to the original to get it.
        extra: further JSON data for ``metadata.json``, such as a report.

    Returns:
        The directory.

    Raises:
        InvalidInputError: if model, plan or directory are missing, or ``extra`` is no JSON data.
        PlanMismatchError: if the model is not what the plan makes, such as the unpruned original; names the
            first layer that differs.
        ArtifactError: if the directory holds something else or cannot be written, or the model has state that
            is no tensor.
    """
    if isinstance(result, nn.Module):
        model = result
    elif result is not None:
        model = getattr(result, "model", model)
        plan = plan if plan is not None else getattr(result, "plan", None)
    if (
        not isinstance(model, nn.Module)
        or not isinstance(plan, PruningPlan)
        or not isinstance(directory, (str, os.PathLike))
    ):
        raise InvalidInputError(
            f"save: got model {type(model).__name__}, plan {type(plan).__name__}, directory "
            f"{type(directory).__name__}; wanted a result with .model and .plan and then a directory, or "
            "model=, plan= and directory="
        )
    if extra is not None and not isinstance(extra, Mapping):
        raise InvalidInputError(f"extra: got {type(extra).__name__}, wanted a mapping of plain JSON data")
    _check_result(model, plan)
    target = Path(directory)
    try:
        return _write(target, model, plan, extra or {})
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(
            f"{target}: cannot be written ({error.strerror or error}); choose another directory"
        ) from error


def _write(target: Path, model: nn.Module, plan: PruningPlan, extra: Mapping[str, Any]) -> Path:
    _refuse_foreign(target)
    tensors, aliases, strides = _collect(model)
    description = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": plan.model,
        "params": complexity.count_params(model),
        "tensors": {
            name: {"shape": list(t.shape), "dtype": _dtype_name(t.dtype)} for name, t in tensors.items()
        },
        "aliases": aliases,
        "strides": strides,
        "frozen": [n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad],
        "evaluating": [name for name, module in model.named_modules() if not module.training],
        "versions": versions(),
        "extra": dict(extra),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        from safetensors.torch import save_file

        save_file(tensors, str(staging / WEIGHTS), metadata={"format": "pt"})
        description["sha256"] = _digest(staging / WEIGHTS)
        plan.save(staging / PLAN)
        try:
            text = json.dumps(description, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f"extra: wanted plain JSON data ({error})") from error
        (staging / METADATA).write_text(text, encoding="utf-8")
        for name in (WEIGHTS, PLAN, METADATA):
            _flush(staging / name)
        # mkdtemp's directories are private to the user
        staging.chmod(0o777 & ~_umask())
        _swap_in(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def load(
    directory: str | os.PathLike[str],
    model_factory: Callable[[], nn.Module],
    *,
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> nn.Module:
    """Rebuild a saved model: the factory's original, pruned by the stored plan, with the stored tensors.

    Tied parameters, ``requires_grad``, training mode, dtypes, memory formats and buffers come back as they
    were saved.

    Args:
        model_factory: called without arguments, gives the original, unpruned module; its weights do not
            matter.
        device: where the tensors go.
        strict: refuse if names differ; with False, tensors without a place are left out and the factory's own
            values stay where none was stored. Shapes must agree in any case.

    Raises:
        InvalidInputError: if the factory is no function without arguments or gives no module, or the device is
            not there.
        ArtifactError: if files are missing, damaged, of another format, or the directory is no artifact.
        PlanMismatchError: if the factory gives another model; names the first difference.
    """
    _check_factory(model_factory)
    _check_device(device)
    source = _as_path(directory)
    description = _read_description(source)
    try:
        plan = PruningPlan.load(source / PLAN)
    except (InvalidInputError, OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{source / PLAN}: {error}") from error
    if _digest(source / WEIGHTS) != description["sha256"]:
        raise ArtifactError(
            f"{source / WEIGHTS}: damaged (its checksum is not the one in {METADATA}); save it again"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(source / WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{source / WEIGHTS}: {error}") from error
    original = model_factory()
    if not isinstance(original, nn.Module):
        raise InvalidInputError(f"model_factory: gave {type(original).__name__}, wanted a torch.nn.Module")
    if type(original).__name__ != plan.model:
        raise PlanMismatchError(
            f"model_factory gives a {type(original).__name__}, the artifact was saved from a {plan.model}"
        )
    model = plan.apply(original)
    # Every tensor moves to memory of its own: in the file they lie at any offset, and kernels round in another
    # order where the data is not aligned.
    strides = description.get("strides", {})
    tensors = {name: _settle(name, t, strides.get(name), device, source) for name, t in tensors.items()}
    _fill(model, tensors, description["aliases"], device, strict)
    frozen, evaluating = set(description["frozen"]), set(description["evaluating"])
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(
            name not in frozen and (parameter.is_floating_point() or parameter.is_complex())
        )
    for name, module in model.named_modules():
        module.training = name not in evaluating
    return model


def describe(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of ``metadata.json``.

    Raises:
        ArtifactError: if the directory is no artifact.
    """
    return _read_description(_as_path(directory))


# --------------------------------------------------------------------------------- internals


def _as_path(directory: Any) -> Path:
    if not isinstance(directory, (str, os.PathLike)):
        raise InvalidInputError(f"directory: got {type(directory).__name__}, wanted a path")
    return Path(directory)


def _check_factory(factory: Any) -> None:
    wanted = "wanted a function without arguments that gives the original model, such as lambda: Net(10)"
    if isinstance(factory, nn.Module) or not callable(factory):
        kind = "a model" if isinstance(factory, nn.Module) else type(factory).__name__
        raise InvalidInputError(f"model_factory: got {kind}, {wanted}")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind()
    except TypeError as error:
        raise InvalidInputError(f"model_factory: {error}; {wanted}") from error


def _check_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"device: got {device!r}, wanted one that this machine and this torch have, such as 'cpu' "
            f"({str(error).partition(chr(10))[0]})"
        ) from error


def _check_result(model: nn.Module, plan: PruningPlan) -> None:
    """Refuse a model whose layers are not as wide as the plan leaves them, before it is on disk."""
    left: dict[tuple[str, str, int], int] = {}
    gone: dict[str, str] = {}
    cut: set[str] = set()
    for step in plan.steps:
        for removal in step.removals:
            if isinstance(removal, BlockRemoval):
                gone.update(removal.modules)
                cut |= {removal.name} if removal.cut else set()
            else:
                left[removal.layer, removal.kind, removal.dim] = removal.size - len(removal.removed)
    advice = "save what plan.apply gave, with the plan it came from"
    modules = dict(model.named_modules())
    for name, kind in gone.items():
        removed = name not in modules if name in cut else isinstance(modules.get(name), IdentityBlock)
        if not removed:
            raise PlanMismatchError(f"{name}: the plan removes this {kind}, the model still has it; {advice}")
    for (layer, side, dim), wanted in left.items():
        if any(layer.startswith(name + ".") or layer == name for name in gone):
            continue
        actual = side_size(model, layer, side, dim)
        if actual != wanted:
            raise PlanMismatchError(
                f"{layer}: the plan leaves {wanted} channels ({side}), the model has {actual}; {advice}"
            )


def _settle(name: str, tensor: Tensor, strides: Any, device: Any, source: Path) -> Tensor:
    """A copy in fresh memory, in the memory format that the saved model had."""
    if strides is None:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor)
    try:
        meta = torch.empty_strided(tensor.shape, strides, device="meta")
        dense = torch.empty_like(meta).stride() == meta.stride()
    except (RuntimeError, TypeError):
        dense = False
    if not dense:
        raise ArtifactError(f"{source / METADATA}: damaged, the strides of {name!r} are {strides!r}")
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=device).copy_(tensor)


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, all names of shared ones, also the buffers outside state_dict."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, list[int]]]:
    """Tensors by name, other names of the same ones, and strides where they are not the usual ones."""
    strange = [name for name in model.state_dict() if name.rpartition(".")[2] == "_extra_state"]
    if strange:
        raise ArtifactError(f"{strange[0]}: state that is no tensor cannot be stored without pickling")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    strides: dict[str, list[int]] = {}
    first: dict[int, str] = {}
    for name, tensor in _all_tensors(model).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        # Copied, since safetensors refuses tensors that overlap in memory, such as slices of one buffer.
        copied = tensor.detach().to("cpu", copy=True)
        tensors[name] = copied.contiguous()
        # Not only of tensors that are not contiguous: a 1x1 filter is both, and convolutions look at the strides.
        if copied.stride() != torch.empty(copied.shape, device="meta").stride():
            strides[name] = list(copied.stride())
    return tensors, aliases, strides


def _place(model: nn.Module, name: str, tensor: Tensor, parameter: nn.Parameter | None) -> None:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    if parameter is not None:
        module._parameters[key] = parameter
    else:
        module._buffers[key] = tensor


def _fill(
    model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], device: Any, strict: bool
) -> None:
    places = _all_tensors(model)
    stored = {name: name for name in tensors} | dict(aliases)
    missing = [name for name in places if name not in stored]
    surplus = [name for name in stored if name not in places]
    if strict and (missing or surplus):
        raise PlanMismatchError(
            f"the factory's model and the artifact differ: {(missing or surplus)[0]!r} is only in the "
            f"{'model' if missing else 'artifact'} ({len(missing)} only in the model, {len(surplus)} only in "
            "the artifact); use the factory of the saved model, or strict=False"
        )
    made: dict[str, nn.Parameter] = {}
    for name, place in places.items():
        origin = stored.get(name)
        if origin is None:
            continue
        tensor = tensors[origin]
        if tensor.shape != place.shape:
            raise PlanMismatchError(
                f"{name}: the artifact has shape {tuple(tensor.shape)}, the factory's model after the plan "
                f"{tuple(place.shape)}; use the factory of the saved model"
            )
        if isinstance(place, nn.Parameter):
            parameter = made.setdefault(origin, nn.Parameter(tensor, requires_grad=False))
            _place(model, name, tensor, parameter)
        else:
            _place(model, name, tensor, None)
    if missing:
        for name in missing:
            place = places[name]
            moved = place.detach().to(device)
            _place(
                model, name, moved, nn.Parameter(moved, False) if isinstance(place, nn.Parameter) else None
            )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a pruned model depends on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("idap", "torch-pruning", "safetensors"):
        try:
            found[name] = _distributions.version(name)
        except _distributions.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error
    return digest.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    # There is no way to read it without setting it.
    current = os.umask(0o022)
    os.umask(current)
    return current


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ArtifactError(f"{target}: is a file, wanted a directory")
    if any(target.iterdir()):
        try:
            _read_description(target)
        except IdapError as error:
            raise ArtifactError(
                f"{target}: holds something other than a saved model, which save will not replace ({error}); "
                "choose another directory"
            ) from error


def _swap_in(staging: Path, target: Path) -> None:
    """Put ``staging`` in the place of ``target``; if interrupted, one of both is complete."""
    old: Path | None = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, old)
    try:
        os.replace(staging, target)
    except BaseException:
        if old is not None:
            os.replace(old, target)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _read_description(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise ArtifactError(f"{source}: no such directory")
    missing = [name for name in (METADATA, PLAN, WEIGHTS) if not (source / name).is_file()]
    if missing:
        raise ArtifactError(f"{source}: not a saved model, {', '.join(missing)} missing")
    try:
        data = json.loads((source / METADATA).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{source / METADATA}: damaged ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtifactError(f"{source / METADATA}: not of the format {FORMAT!r}")
    if data.get("version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{source / METADATA}: got format version {data.get('version')!r}, wanted {FORMAT_VERSION}; "
            "a newer version of idap wrote it"
        )
    wanted = {"tensors": dict, "aliases": dict, "frozen": list, "evaluating": list, "sha256": str}
    if "strides" in data:  # absent where an earlier version wrote it
        wanted["strides"] = dict
    for key, kind in wanted.items():
        if not isinstance(data.get(key), kind):
            raise ArtifactError(f"{source / METADATA}: damaged, {key!r} is missing or no {kind.__name__}")
    return data
