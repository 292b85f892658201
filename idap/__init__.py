"""IDAP: smaller neural networks by activation flow divergence.

``profile`` reads a model's activations once; ``flow_divergence`` and ``layer_divergence`` score its filters
and blocks; ``prune_filters`` and ``truncate_layers`` turn scores into plans; ``compress`` does all of it
under one budget, resumably; ``save`` and ``load`` keep the result, ``export_onnx`` hands it on, ``write_report``
shows how it came about.
"""

from idap_kernels.version import __version__

from .artifact import load, save
from .calibration import compensate, recalibrate
from .complexity import count_macs, count_params
from .compress import CompressionResult, compress, drift
from .criteria import flow_divergence, layer_divergence
from .errors import IdapError
from .export import export_onnx, export_program
from .filters import prune_filters
from .heads import find_heads, head_divergence
from .latency import compare_latency, layer_times, measure_latency
from .layers import find_blocks, fit_projections, truncate_layers
from .plan import PruningPlan
from .profile import ActivationProfile, profile
from .report import write_report
from .training import finetune

__all__ = [
    "ActivationProfile",
    "CompressionResult",
    "IdapError",
    "PruningPlan",
    "__version__",
    "compare_latency",
    "compensate",
    "compress",
    "count_macs",
    "count_params",
    "drift",
    "export_onnx",
    "export_program",
    "find_blocks",
    "find_heads",
    "finetune",
    "fit_projections",
    "flow_divergence",
    "head_divergence",
    "layer_divergence",
    "layer_times",
    "load",
    "measure_latency",
    "profile",
    "prune_filters",
    "recalibrate",
    "save",
    "truncate_layers",
    "write_report",
]
