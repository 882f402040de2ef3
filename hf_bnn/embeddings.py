"""Embedding tables for training whose rows are rounded when they are looked up."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import sign_int8, straight_through

logger = logging.getLogger(__name__)


def refuse_weight(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    reason: str,
    metadata: dict,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Keep `module`'s weight, in the midst of a load_state_dict that has one of another kind for it.

    Of another shape it is an error. Of the same shape (a depthwise kernel, an int8 table) torch would copy it: it is
    reported as unexpected, and the module's own as missing, which only strict=False lets pass.
    """
    name = f"{prefix}weight"
    given = state_dict[name]
    if given.shape == module.weight.shape:
        missing.append(name)
        unexpected.append(name)
        logger.warning(f"{name}, {given.dtype}, is not loaded: {reason}")
    else:
        errors.append(f"{name} is {given.dtype}, but {reason}")
    state_dict[name] = module.weight.detach()  # in load_state_dict's own copy of the dict


def refuse_integers(layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
    """`refuse_weight` for a latent layer that is given the integers of a packed one."""
    given = state_dict.get(f"{prefix}weight")
    if given is not None and not given.is_floating_point():
        text = (
            f"this {type(layer).__name__} is latent: load it into a packed model (hf_bnn.pack_), and call "
            "hf_bnn.unpack_ on that to train it"
        )
        refuse_weight(layer, state_dict, prefix, text, *arguments)


class RoundedEmbedding(nn.Embedding):
    """A table whose rows are rounded when they are looked up, with a straight-through gradient: base of two kinds."""

    @classmethod
    def from_float(cls, embedding: nn.Embedding) -> "RoundedEmbedding":
        """A rounded table that takes over the float table's parameter."""
        size = (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        new = cls(*size, device="meta", dtype=embedding.weight.dtype)
        new.weight = embedding.weight
        return new.train(embedding.training)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        refuse_integers(self, state_dict, prefix, *arguments)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @staticmethod
    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Integers `(..., dim)` and a scale per row `(...)`, whose product is the rounded rows."""
        raise NotImplementedError("RoundedEmbedding is a base class: use Int8Embedding or BinaryEmbedding")

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight, self.padding_idx)
        integers, scale = self.quantize(rows.detach())
        return straight_through((integers.float() * scale.float().unsqueeze(-1)).to(rows.dtype), rows)


class Int8Embedding(RoundedEmbedding):
    """ids `(...)` to rows `(..., dim)` of 255 levels, one float32 scale per row: the row's largest |w| over 127.

    >>> Int8Embedding(10, 4)(torch.tensor([1, 2])).shape
    torch.Size([2, 4])
    """

    @staticmethod
    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = (rows.float().abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return (rows.float() / scale.unsqueeze(-1)).round_().to(torch.int8), scale


class BinaryEmbedding(RoundedEmbedding):
    """ids `(...)` to rows `(..., dim)` of +-1 times the row's mean |w| (BiT, arXiv 2205.13016), held in float16.

    >>> BinaryEmbedding(10, 4)(torch.tensor([1, 2])).shape
    torch.Size([2, 4])
    """

    @staticmethod
    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        return sign_int8(rows), rows.float().abs().mean(-1).half()
