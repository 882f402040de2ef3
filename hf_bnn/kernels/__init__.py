"""Fast products of 1-bit weights, in compiled kernels or, where those are missing, in torch."""

from . import training  # noqa: F401 (declares its functions before the library is loaded)
from .attention import attention
from .conv2d import conv2d
from .conv2d_block import conv2d_block
from .epilogue import Epilogue, normalization
from .ffn import FfnCall, ffn
from .library import available, backend, using
from .linear import LinearCall, LinearWeightOnlyCall, linear, linear_weight_only
from .planned_block import Conv2dBlock
from .pooling import max_pool
from .weights import Conv2dWeight, LinearWeight

__all__ = [
    "Conv2dBlock",
    "Conv2dWeight",
    "Epilogue",
    "FfnCall",
    "LinearCall",
    "LinearWeight",
    "LinearWeightOnlyCall",
    "attention",
    "available",
    "backend",
    "conv2d",
    "conv2d_block",
    "ffn",
    "linear",
    "linear_weight_only",
    "max_pool",
    "normalization",
    "using",
]
