"""A pruned model for other runtimes: ONNX and ``torch.export`` files, compared with the module they came from.

onnx, onnxruntime and onnxscript are imported by the functions that need them.
"""

from __future__ import annotations

import copy
import inspect
import io
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExportError, InvalidInputError
from .inputs import (
    Inputs,
    as_call,
    batch_size_of,
    call,
    device_of,
    evaluating,
    map_tensors,
    named_tensors,
    outputs_of,
    to_model,
    without_inference,
)

# Largest difference of an output over its largest value. Another runtime sums in another order and folds
# constants; a wrong export is off by far more.
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
_TOLERANCE_FULL = 1e-4
_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_CHATTY = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
    check: bool = True,
) -> Path:
    """Write ``model`` in evaluation mode as an ONNX file, and run the file to see that it gives the same.

    Inputs keep the names of the arguments of ``forward``; outputs are called ``output`` (``output_0``, ...
    for a tuple, the keys for a mapping). Above 2 GiB the weights go into a second file beside it, ``path``
    with ``.data`` appended. The file appears complete or not at all. The model is left as it is.

    Args:
        path: the file to write, replaced if it is there; its directory is made.
        example_inputs: tensor, tuple or list (positional arguments) or mapping (keyword arguments).
        dynamic_batch: leave open the first dimension of every tensor that has the example's batch size there
            (that of its first tensor); the axis is called ``batch``. Otherwise all shapes are those of the
            example.
        opset: ONNX operator set; the exporter's default if not given.
        check: validate the file, then run it with onnxruntime on the CPU on the example, and with a dynamic
            batch also on another batch size. No output may be further from the module's than 1e-4 of its
            largest value (2e-2 in float16, 1e-1 in bfloat16); integers must be equal.

    Returns:
        The path of the file.

    Raises:
        InvalidInputError: ``model`` is no module, the inputs are none, or ``path`` is a directory.
        ExportError: onnx, onnxruntime (for the check) or onnxscript is not installed, the model cannot be
            exported, the file cannot be written, or the check failed.
    """
    target = _target(model, path)
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if not check:
        missing = [name for name in missing if name != "onnxruntime"]
    if missing:
        raise ExportError(
            f"ONNX export needs {' and '.join(missing)}, not installed here: pip install 'idap[onnx]'"
        )
    with evaluating(model), torch.no_grad(), _quiet():
        # The check runs on the CPU; and constants of the graph need no device.
        device = device_of(model)
        twin = model if device is None or device.type == "cpu" else copy.deepcopy(model).to("cpu")
        example = _example(twin, example_inputs)
        program = _capture(twin, example, dynamic_batch)
        names = _input_names(program)
        outputs = _output_names(_run(twin, example), taken=names)
        with _staged(target) as staging:
            file = staging / target.name
            try:
                torch.onnx.export(
                    program,
                    f=str(file),
                    dynamo=True,
                    verbose=False,
                    input_names=names,
                    output_names=outputs,
                    opset_version=opset,
                    external_data=False,
                )
            except Exception as error:
                raise ExportError(
                    f"{type(model).__name__} cannot be written as ONNX{'' if opset is None else f' {opset}'}: "
                    f"{_reason(error)}"
                ) from error
            _finish_onnx(file, opset)
            if check:
                _check_onnx(file, twin, example, dynamic_batch)
    return target


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> Path:
    """Write ``model`` in evaluation mode as a ``torch.export`` file (``.pt2``), and load it to compare.

    ``torch.export.load(path).module()`` gives it back without the model's code, called as ``model`` is called
    with ``example_inputs``, on the device that the model was on. The file appears complete or not at all. The
    model is left as it is.

    Args:
        path: the file to write, replaced if it is there; its directory is made.
        example_inputs: tensor, tuple or list (positional arguments) or mapping (keyword arguments).
        dynamic_batch: as for :func:`export_onnx`.
        check: load the file and run it on the example, and with a dynamic batch also on another batch size:
            its outputs must be those of the exported graph to the last bit, and those of the module within
            the tolerance of :func:`export_onnx`.

    Returns:
        The path of the file.

    Raises:
        InvalidInputError: ``model`` is no module, the inputs are none, or ``path`` is a directory.
        ExportError: the model cannot be exported, the file cannot be written, or the check failed.
    """
    target = _target(model, path)
    with evaluating(model), torch.no_grad(), _quiet():
        example = _example(model, example_inputs)
        program = _capture(model, example, dynamic_batch)
        with _staged(target) as staging:
            file = staging / target.name
            try:
                torch.export.save(program, file)
            except Exception as error:
                raise ExportError(f"{target}: cannot be written ({_reason(error)})") from error
            if check:
                _check_program(file, program, model, example, dynamic_batch)
    return target


# --------------------------------------------------------------------------------- capture


def _target(model: Any, path: str | os.PathLike[str]) -> Path:
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    target = Path(path)
    if target.is_dir():
        raise InvalidInputError(f"{target}: is a directory, wanted the name of a file")
    return target


def _example(model: nn.Module, example_inputs: Inputs) -> Inputs:
    """The inputs on the model's device, keyword arguments in the order of the signature."""
    as_call(example_inputs)
    example = without_inference(to_model(example_inputs, model))
    if isinstance(example, dict):
        order = [name for name in inspect.signature(model.forward).parameters if name in example]
        example = {name: example[name] for name in [*order, *(n for n in example if n not in order)]}
    inputs: Inputs = example
    return inputs


def _capture(model: nn.Module, example: Inputs, dynamic_batch: bool) -> torch.export.ExportedProgram:
    shapes = None
    advice = ""
    if dynamic_batch:
        size = batch_size_of(example)
        if size == 1:
            # A dimension of 1 would be taken for fixed.
            size, example = 2, _resized(example, 2)
        shapes, batch = torch.export.ShapesCollection(), torch.export.Dim("batch")
        for _, tensor in named_tensors(as_call(example)):
            if tensor.dim() and tensor.shape[0] == size:
                shapes[tensor] = {0: batch}
        advice = (
            "; if its forward fixes the batch size, dynamic_batch=False exports it for that of the example"
        )
    args, kwargs = as_call(example)
    failure: Exception | None = None
    # The first way runs the module on stand-ins, the second reads its bytecode: slower, and often stuck on code
    # that the first one passes, but len(x) does not fix a dimension there.
    for strict in (False, True):
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise ExportError(
        f"torch.export cannot follow {type(model).__name__}: {_reason(failure)}{advice}"
    ) from failure


def _resized(inputs: Inputs, size: int) -> Inputs:
    """The inputs with another batch size: samples repeated or left out."""
    old = batch_size_of(inputs)

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != old:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % old]

    resized: Inputs = map_tensors(inputs, resize)
    return resized


def _run(model: nn.Module, inputs: Inputs) -> list[tuple[str, Tensor]]:
    # Cloned, since a forward pass may work in place on its input.
    return outputs_of(call(model, map_tensors(inputs, torch.clone)))


def _input_names(program: torch.export.ExportedProgram) -> list[str]:
    tensors = {node.name for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    return [name for name in program.graph_signature.user_inputs if isinstance(name, str) and name in tensors]


def _output_names(outputs: Sequence[tuple[str, Tensor]], taken: Sequence[str]) -> list[str]:
    names: list[str] = []
    for path, _ in outputs:
        name = re.sub(r"\W+", "_", path).strip("_")
        if not name or not name[0].isalpha() or name in taken:
            name = f"output_{name}".rstrip("_")
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def _finish_onnx(file: Path, opset: int | None) -> None:
    """Call the open axis ``batch``, and refuse another operator set than the one asked for."""
    import onnx

    proto = onnx.load(str(file), load_external_data=False)
    used = next((entry.version for entry in proto.opset_import if not entry.domain), None)
    if opset is not None and used != opset:
        # The exporter writes what it can, and only logs that the conversion failed.
        raise ExportError(f"{file.name}: the exporter gives opset {used}, wanted {opset}; leave opset out")
    graph = proto.graph
    shapes = [value.type.tensor_type.shape for value in (*graph.input, *graph.output, *graph.value_info)]
    open_dims = [dim for shape in shapes for dim in shape.dim if dim.dim_param]
    symbol = next((dim.dim_param for dim in open_dims), None)
    if symbol is None:
        return
    for dim in open_dims:
        dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dim.dim_param)
    onnx.save(proto, str(file))


# ---------------------------------------------------------------------------------- checks


def _batches(example: Inputs, dynamic_batch: bool) -> Iterator[tuple[str, Inputs]]:
    yield "the example", example
    if dynamic_batch:
        size = batch_size_of(example)
        for other in {1, size + 1} - {size}:
            yield f"batch size {other}", _resized(example, other)


def _check_onnx(file: Path, model: nn.Module, example: Inputs, dynamic_batch: bool) -> None:
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(file))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            str(file), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ExportError(f"{file.name}: onnxruntime cannot load it ({_reason(error)})") from error
    names = [item.name for item in session.get_inputs()]
    for what, inputs in _batches(example, dynamic_batch):
        tensors = [tensor for _, tensor in named_tensors(as_call(inputs))]
        if len(tensors) != len(names):
            raise ExportError(
                f"{file.name}: the file takes {names}, the example has {len(tensors)} tensors; "
                "give every argument that is a tensor once"
            )
        try:
            feed = {name: tensor.detach().numpy() for name, tensor in zip(names, tensors, strict=True)}
            got = [torch.from_numpy(array) for array in session.run(None, feed)]
        except Exception as error:
            raise ExportError(f"{file.name}: onnxruntime fails on {what} ({_reason(error)})") from error
        _compare(file, what, _run(model, inputs), got)


def _check_program(
    file: Path,
    program: torch.export.ExportedProgram,
    model: nn.Module,
    example: Inputs,
    dynamic_batch: bool,
) -> None:
    try:
        loaded, graph = torch.export.load(file).module(), program.module()
    except Exception as error:
        raise ExportError(f"{file.name}: cannot be loaded again ({_reason(error)})") from error
    for what, inputs in _batches(example, dynamic_batch):
        try:
            got = [tensor for _, tensor in _run(loaded, inputs)]
            wanted = [tensor for _, tensor in _run(graph, inputs)]
        except Exception as error:
            raise ExportError(f"{file.name}: fails on {what} ({_reason(error)})") from error
        if len(got) != len(wanted) or not all(map(_same_bits, got, wanted)):
            raise ExportError(f"{file.name}: the loaded file gives other outputs than the graph on {what}")
        _compare(file, what, _run(model, inputs), got)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # NaN equals NaN here: the file is compared, not the numbers judged.
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def _compare(file: Path, what: str, wanted: Sequence[tuple[str, Tensor]], got: Sequence[Tensor]) -> None:
    if len(wanted) != len(got):
        raise ExportError(f"{file.name}: gives {len(got)} tensors on {what}, the module {len(wanted)}")
    for (path, a), b in zip(wanted, got, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ExportError(
                f"{file.name}: output{path} is {tuple(b.shape)} {b.dtype} on {what}, the module's "
                f"{tuple(a.shape)} {a.dtype}"
            )
        if not a.numel():
            continue
        if not a.is_floating_point() and not a.is_complex():
            if not torch.equal(a, b):
                raise ExportError(f"{file.name}: output{path} differs from the module's on {what}")
            continue
        limit = _TOLERANCE.get(a.dtype, _TOLERANCE_FULL)
        error = _relative_difference(a, b)
        # Written so that NaN fails.
        if not error <= limit:
            raise ExportError(
                f"{file.name}: output{path} is off by {error:.2g} of its largest value on {what}, at most "
                f"{limit:g} allowed"
            )


def _relative_difference(wanted: Tensor, got: Tensor) -> float:
    """Largest absolute difference over the largest absolute value that is finite, in float64.

    NaN if values that are not finite differ: an infinite or NaN output must be the same in both.
    """
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    wanted, got = wanted.to(wide), got.to(wide)
    finite = torch.isfinite(wanted)
    if not bool(torch.isclose(wanted[~finite], got[~finite], equal_nan=True).all()):
        return float("nan")
    if not bool(finite.any()):
        return 0.0
    difference = (got[finite] - wanted[finite]).abs().max()
    return float(difference / wanted[finite].abs().max().clamp_min(1e-300))


# ------------------------------------------------------------------------------------ files


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A directory beside ``target``; what is in it at the end takes its place there, if all went well."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(f"{target}: cannot be written ({error.strerror or error})") from error
    try:
        yield staging
        written = sorted(staging.iterdir(), key=lambda file: file.name == target.name)
        try:
            if len(written) > 1:
                # An old graph beside new weights must not be there at any moment.
                target.unlink(missing_ok=True)
            for file in written:
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                os.replace(file, target.parent / file.name)
        except OSError as error:
            raise ExportError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing from the exporters on the terminal; what they have to say comes as an error."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause in a few words; the exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
