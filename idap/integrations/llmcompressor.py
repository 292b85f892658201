"""llm-compressor's Wanda, its input statistics from our kernel: one read, no copy of the activations.

The library's own accumulation writes a float32 copy of each input in half precision, twice the input's size,
and takes the norms of that. Here the input is read once where it lies, in its own dtype. Scores, masks and the
life cycle of the modifier stay the library's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

try:
    from compressed_tensors.utils import get_execution_device
    from llmcompressor.modifiers.pruning import WandaPruningModifier
except ImportError as error:
    raise ImportError(
        "idap.integrations.llmcompressor needs llmcompressor >= 0.14: pip install llmcompressor"
    ) from error

from pydantic import PrivateAttr

from idap_kernels import ChannelStats, channel_stats

from ..errors import InvalidInputError, NonFiniteError
from ..profile import is_transposed_linear
from .wanda import sum_of_squares


class IdapWandaPruningModifier(WandaPruningModifier):
    """``WandaPruningModifier`` that accumulates its row scalars with :func:`idap_kernels.channel_stats`.

    Takes the arguments of the library's modifier and gives its masks; use it in ``oneshot(recipe=...)`` as an
    object. The row scalars of a layer are ``Σx² / samples`` per column of its weight, in float32, where an
    input (T, C) counts as one sample and (B, *, C) as B.

    Beyond the library's own it handles inputs of linear layers with more than three dimensions, transformers'
    ``Conv1D``, and ``Conv2d`` with kernels above 1×1 (zero padding, ungrouped): a column of the flattened weight
    has the energy of what its kernel position reads.

    Raises, while calibrating:
        InvalidInputError: the layer is of a kind that one vector of row scalars cannot describe (grouped,
            ``Conv1d``, ``Conv3d``, padding other than zeros); leave it out with ``ignore``.
        NonFiniteError: the input of a layer, or its square, is NaN or infinite; names the layer. It comes when
            the layer is pruned, before its weights are touched.
    """

    _energy: dict[nn.Module, list[ChannelStats | None]] = PrivateAttr(default_factory=dict)

    def calibrate_module(self, module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        """Add the input of one call of a layer to its row scalars.

        Args:
            module: a linear layer or a convolution.
            args: what it was called with; the first is the input, (T, C), (B, *, C) or (B, C, H, W).
        """
        device = get_execution_device(module)
        x = args[0].detach().to(device)
        windows = self._windows(module, x)
        if module not in self._num_samples:
            self._num_samples[module] = 0
            self._energy[module] = []
        convolution = isinstance(module, nn.Conv2d)
        channel_dim = 1 if convolution else -1
        stats = self._energy[module] or [None] * len(windows)
        self._energy[module] = [
            old
            if not window.numel()
            else channel_stats(window, channel_dim=channel_dim, activation="identity", out=old)
            for old, window in zip(stats, windows, strict=True)
        ]
        batched = x.dim() > (3 if convolution else 2)
        self._num_samples[module] += x.shape[0] if batched else 1
        nothing = torch.zeros(windows[0].shape[channel_dim], dtype=torch.float64, device=device)
        columns = [nothing if one is None else sum_of_squares(one) for one in self._energy[module]]
        total = torch.stack(columns, dim=1).flatten()  # input channel by kernel position, as the weight lies
        self._row_scalars[module] = (total / max(self._num_samples[module], 1)).float()

    def compress_modules(self) -> None:
        """Prune the layers calibrated since the last call, as the library does, and drop their statistics."""
        for module, scalars in self._row_scalars.items():
            if not scalars.isfinite().all():
                raise NonFiniteError(
                    f"the input of layer {self._name(module)!r}, or its square, is NaN or infinite: "
                    "look at the inputs and weights; in float16, try bfloat16 or float32"
                )
        super().compress_modules()
        self._energy.clear()

    def _name(self, module: nn.Module) -> str:
        return str(self._module_names.get(module, "")).rstrip(".")  # the library ends them with a point

    def _windows(self, module: nn.Module, x: Tensor) -> list[Tensor]:
        """The input as each kernel position reads it, as views: padding adds nothing to a sum of squares."""
        if isinstance(module, nn.Linear) or is_transposed_linear(module):
            return [x if x.dim() > 1 else x[None]]
        if not isinstance(module, nn.Conv2d) or module.groups != 1 or module.padding_mode != "zeros":
            raise InvalidInputError(
                f"layer {self._name(module)!r} is {module}; wanted a linear layer or an ungrouped "
                "Conv2d with padding of zeros: leave it out with ignore="
            )
        x = x if x.dim() == 4 else x[None]
        left, right, top, bottom = module._reversed_padding_repeated_twice
        rows = _reads(x.shape[2], top, bottom, module.kernel_size[0], module.stride[0], module.dilation[0])
        columns = _reads(x.shape[3], left, right, module.kernel_size[1], module.stride[1], module.dilation[1])
        return [x[:, :, i, j] for i in rows for j in columns]


def _reads(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> list[slice]:
    """What each position of a kernel reads of one dimension, without the padding."""
    outputs = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    slices = []
    for position in range(kernel):
        offset = position * dilation - before
        first = max(0, -(offset // stride))  # the first output whose read lies at 0 or behind
        last = min(outputs - 1, (size - 1 - offset) // stride)
        start = first * stride + offset
        slices.append(slice(start, last * stride + offset + 1, stride) if last >= first else slice(0, 0))
    return slices


__all__ = ["IdapWandaPruningModifier"]
