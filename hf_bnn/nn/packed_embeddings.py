"""Packed tables: embeddings whose rows are int8 or bits, with one scale per row."""

import torch
from torch import Tensor, nn

from ..functional import pack_bits, unpack_bits
from .embeddings import BinaryEmbedding, Int8Embedding
from .packed_base import Packed


class PackedEmbedding(Packed, nn.Embedding):
    """Base of both packed tables. `weight` holds integers, `weight_scale` one scale per row."""

    weight_dtype: torch.dtype
    scale_dtype: torch.dtype

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Embedding's: it would register a float parameter under `weight`
        self.float_dtype = torch.get_default_dtype() if dtype is None else dtype
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        shape = (num_embeddings, self.row_bytes(embedding_dim))
        self.register_buffer("weight", torch.zeros(shape, dtype=self.weight_dtype, device=device))
        self.register_buffer("weight_scale", torch.zeros(num_embeddings, dtype=self.scale_dtype, device=device))

    @staticmethod
    def row_bytes(embedding_dim: int) -> int:
        return embedding_dim

    @classmethod
    def empty_like(cls, layer: nn.Embedding) -> "PackedEmbedding":
        """The packed form of `layer`, before its integers are loaded."""
        size = (layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
        return cls(*size, layer.weight.device, layer.weight.dtype)

    def integers(self, rows: Tensor) -> Tensor:
        """Stored rows `(n, row_bytes)` as int8 `(n, dim)`."""
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        scale = self.weight_scale.index_select(0, flat)  # refuses -1, as nn.Embedding does: indexing takes it
        rows = self.integers(self.weight.index_select(0, flat)).float() * scale.float().unsqueeze(-1)
        return rows.to(self.float_dtype).view(*ids.shape, self.embedding_dim)


class PackedInt8Embedding(PackedEmbedding):
    """Rows `(..., dim)` for ids `(...)`, from int8 `(rows, dim)` and float32 scales, in `float_dtype`."""

    weight_dtype, scale_dtype = torch.int8, torch.float32

    @classmethod
    def from_latent(cls, layer: Int8Embedding) -> "PackedInt8Embedding":
        new = cls.empty_like(layer)
        new.weight, new.weight_scale = layer.quantize(layer.weight.detach())
        return new

    def to_latent(self) -> Int8Embedding:
        """A trainable table, whose parameter holds the rounded rows."""
        return _latent_table(self, Int8Embedding)


class PackedBinaryEmbedding(PackedEmbedding):
    """Rows `(..., dim)` for ids `(...)`, from uint8 `(rows, ceil(dim / 8))`, bit 1 = negative, and float16 scales."""

    weight_dtype, scale_dtype = torch.uint8, torch.float16

    @staticmethod
    def row_bytes(embedding_dim: int) -> int:
        return -(-embedding_dim // 8)

    @classmethod
    def from_latent(cls, layer: BinaryEmbedding) -> "PackedBinaryEmbedding":
        new = cls.empty_like(layer)
        signs, new.weight_scale = layer.quantize(layer.weight.detach())
        new.weight = pack_bits(signs)
        return new

    def to_latent(self) -> BinaryEmbedding:
        """A trainable table, whose parameter holds the signs times their scales."""
        return _latent_table(self, BinaryEmbedding)

    def integers(self, rows: Tensor) -> Tensor:
        return unpack_bits(rows, self.embedding_dim)


def _latent_table(packed: PackedEmbedding, cls: type) -> nn.Embedding:
    table = cls(packed.num_embeddings, packed.embedding_dim, packed.padding_idx)
    rows = packed.integers(packed.weight).float() * packed.weight_scale.float().unsqueeze(-1)
    table.weight = nn.Parameter(rows.to(packed.float_dtype))
    return table
