"""The precision of latent weights in training."""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..nn.layers import HALF, binary_layers
from ..nn.packed import is_packed

logger = logging.getLogger(__name__)


def upcast_(model: nn.Module) -> nn.Module:
    """Convert a latent binary model from bfloat16 or float16 to float32, in place, with a warning.

    This holds for latents, levels and norms: most updates of an optimizer are smaller than a step of half precision,
    and would be rounded away. float64 is kept. Raises ValueError for a partly packed model.
    """
    half = {p.dtype for p in model.parameters() if p.dtype in HALF}
    learning = any(p.requires_grad for layer in binary_layers(model) for p in layer.parameters())
    if not half or not learning:
        return model
    if is_packed(model):  # float() would change the types of its packed parts
        raise ValueError(
            f"{type(model).__name__} is in part packed and in part latent, in {_names(half)}, in which latent weights "
            "do not learn: call hf_bnn.unpack_(model) and model.float(), or load it with dtype=torch.float32"
        )
    nn.Module.float(model)  # transformers forbids model.float() for models with a quantizer
    logger.warning(
        f"{type(model).__name__} was in {_names(half)}, in which most updates of latent weights are rounded away: it "
        "is trained, and saved, in float32. For speed, bf16=True computes in bfloat16 all the same"
    )
    return model


def _names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
