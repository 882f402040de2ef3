"""DoReFa-Net: latent weights take the gradient of the scaled weights unchanged (arXiv 1606.06160)."""

from dataclasses import dataclass
from typing import ClassVar

from .base import ClippedInputs, Part, Site
from .scaled_weight import SignWithScaledWeightGradient


@dataclass(frozen=True)
class DoReFa(ClippedInputs):
    """DoReFa-Net (arXiv 1606.06160, eq. 8) with 1-bit weights: r_o = sign(r_i) E|r_i|, dL/dr_i = dL/dr_o.

    The straight-through estimator of hf_bnn has dL/dr_i = s dL/dr_o, with the scale s. The paper's scale is one per
    layer: that is structure, `binarize_(..., weight_scaling="layer")`; dL/dr_o is right under every scaling.
    Deviation: the paper's activations are clipped to [0, 1] and rounded; here, inputs keep the model's levels and the
    straight-through estimator with bound `clip`.

    >>> DoReFa().to_dict()
    {'name': 'dorefa', 'clip': 1.0}
    """

    name: ClassVar[str] = "dorefa"
    paper: ClassVar[str] = "DoReFa-Net, arXiv 1606.06160"
    idea: ClassVar[str] = "latent weights take the gradient of the scaled binary ones, not of their signs"

    def weight_binarizer(self, site: Site) -> Part:
        return SignWithScaledWeightGradient(site.weight_scaling)
