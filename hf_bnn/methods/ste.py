"""The straight-through estimator: signs forward, the gradient of a clipped identity backward (arXiv 1308.3432)."""

from dataclasses import dataclass
from typing import ClassVar

from .base import ClippedInputs


@dataclass(frozen=True)
class STE(ClippedInputs):
    """The straight-through estimator (arXiv 1308.3432; clip bound: 1602.02830, eq. 4).

    Inputs pass the gradient where |x| <= `clip`, in units of the input's levels. Latent weights pass it always.

    >>> STE(clip=2.0).to_dict()
    {'name': 'ste', 'clip': 2.0}
    """

    name: ClassVar[str] = "ste"
    paper: ClassVar[str] = "arXiv 1308.3432, 1602.02830"
    idea: ClassVar[str] = "sign forward, the gradient of a clipped identity backward"
