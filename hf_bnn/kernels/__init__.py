"""Fast products of 1-bit weights: compiled kernels, and the same in torch where there are none."""

from .attention import attention
from .conv2d import conv2d
from .ffn import FfnCall, ffn
from .library import available, backend, using
from .linear import LinearCall, LinearWeightOnlyCall, linear, linear_weight_only
from .weights import Conv2dWeight, LinearWeight

__all__ = [
    "Conv2dWeight",
    "FfnCall",
    "LinearCall",
    "LinearWeight",
    "LinearWeightOnlyCall",
    "attention",
    "available",
    "backend",
    "conv2d",
    "ffn",
    "linear",
    "linear_weight_only",
    "using",
]
