"""Embedding tables for training whose rows are rounded when they are looked up."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import sign_int8, straight_through
from .state_forms import own_form


class RoundedEmbedding(nn.Embedding):
    """The base of tables whose rows are rounded when they are looked up, with a straight-through gradient."""

    @classmethod
    def from_float(cls, embedding: nn.Embedding) -> "RoundedEmbedding":
        """A rounded table that takes over the float table's parameter."""
        size = (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        new = cls(*size, device="meta", dtype=embedding.weight.dtype)
        new.weight = embedding.weight
        return new.train(embedding.training)

    @staticmethod
    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Integers `(..., dim)` and a scale per row `(...)`, whose product is the rounded rows."""
        raise NotImplementedError("RoundedEmbedding is a base class: use Int8Embedding or BinaryEmbedding")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        *_, unexpected, _ = rest
        state_dict = own_form(state_dict, f"{prefix}weight", self.weight, unexpected)
        super()._load_from_state_dict(state_dict, prefix, *rest)

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
