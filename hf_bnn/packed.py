"""Inference layers: the bits of the weights under the key `weight`, and one scale per output channel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import channel_scale, clipped_sign, pack_bits, unpack_bits
from .layers import BinaryEmbedding, BinaryLinear, Int8Embedding, rescale, sign_linear
from .levels import SignedLevels


class PackedLinear(nn.Linear):
    """`(..., in) -> (..., out)` from one bit per weight: uint8 `(out, ceil(in / 8))`, bit 1 = negative.

    A gradient asked of the input (an adapter in an earlier layer learns) is the straight-through estimator's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        levels: SignedLevels | None = None,
        binary_inputs: bool = True,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: it would register a float parameter under `weight`
        self.in_features, self.out_features = in_features, out_features
        self.binary_inputs = binary_inputs
        self.input_levels = SignedLevels() if levels is None else levels
        shape = (out_features, -(-in_features // 8))
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.zeros(out_features, device=device))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, device=device)) if bias else None)

    @classmethod
    def empty_like(cls, layer: BinaryLinear) -> "PackedLinear":
        """The packed form of `layer`, its bits still to be loaded."""
        size = (layer.in_features, layer.out_features, layer.bias is not None)
        new = cls(*size, layer.input_levels, layer.binarize == "both", layer.weight.device)
        new.bias = layer.bias
        return new

    @classmethod
    def from_latent(cls, layer: BinaryLinear) -> "PackedLinear":
        new = cls.empty_like(layer)
        new.weight.copy_(pack_bits(layer.weight))
        new.weight_scale.copy_(channel_scale(layer.weight))
        return new

    def to_latent(self) -> BinaryLinear:
        """A trainable layer whose latent weights are the signs times their scale."""
        size = (self.in_features, self.out_features, self.bias is not None)
        layer = BinaryLinear(*size, "both" if self.binary_inputs else "weights", self.input_levels)
        layer.weight = nn.Parameter(unpack_bits(self.weight, self.in_features) * self.weight_scale.unsqueeze(-1))
        layer.bias = self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        signs = unpack_bits(self.weight, self.in_features)
        if torch.is_grad_enabled() and (x.requires_grad or self.training):
            inputs = clipped_sign(self.input_levels.normalize(x)) if self.binary_inputs else x
            product = F.linear(inputs, signs.to(inputs.dtype))
            total = signs.sum(1, dtype=torch.float32)
            return rescale(product, self.weight_scale, total, self.input_levels, self.bias).to(x.dtype)
        return sign_linear(x, signs, self.weight_scale, self.input_levels, self.bias, self.binary_inputs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _PackedEmbedding(nn.Embedding):
    """The base of both packed tables: integers under `weight`, one scale per row under `weight_scale`."""

    weight_dtype: torch.dtype
    scale_dtype: torch.dtype

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Embedding's: it would register a float parameter under `weight`
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        shape = (num_embeddings, self.row_bytes(embedding_dim))
        self.register_buffer("weight", torch.zeros(shape, dtype=self.weight_dtype, device=device))
        self.register_buffer("weight_scale", torch.zeros(num_embeddings, dtype=self.scale_dtype, device=device))

    @staticmethod
    def row_bytes(embedding_dim: int) -> int:
        return embedding_dim

    @classmethod
    def empty_like(cls, layer: nn.Embedding) -> "_PackedEmbedding":
        """The packed form of `layer`, its integers still to be loaded."""
        return cls(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, layer.weight.device)

    def integers(self, rows: Tensor) -> Tensor:
        """Stored rows `(n, row_bytes)` as int8 `(n, dim)`."""
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        rows = self.integers(self.weight[flat]).float() * self.weight_scale[flat].float().unsqueeze(-1)
        return rows.view(*ids.shape, self.embedding_dim)


class PackedInt8Embedding(_PackedEmbedding):
    """ids `(...)` to rows `(..., dim)`, from int8 `(rows, dim)` and a float32 scale per row."""

    weight_dtype, scale_dtype = torch.int8, torch.float32

    @classmethod
    def from_latent(cls, layer: Int8Embedding) -> "PackedInt8Embedding":
        new = cls.empty_like(layer)
        new.weight, new.weight_scale = layer.quantize(layer.weight.detach())
        return new

    def to_latent(self) -> Int8Embedding:
        """A trainable table with the rounded rows as its parameter."""
        return _latent_table(self, Int8Embedding)


class PackedBinaryEmbedding(_PackedEmbedding):
    """ids `(...)` to rows `(..., dim)`, from uint8 `(rows, ceil(dim / 8))`, bit 1 = negative, and a float16 scale."""

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
        """A trainable table with the signs times their scale as its parameter."""
        return _latent_table(self, BinaryEmbedding)

    def integers(self, rows: Tensor) -> Tensor:
        return unpack_bits(rows, self.embedding_dim)


def _latent_table(packed: _PackedEmbedding, cls: type) -> nn.Embedding:
    table = cls(packed.num_embeddings, packed.embedding_dim, packed.padding_idx)
    integers = packed.integers(packed.weight).float()
    table.weight = nn.Parameter(integers * packed.weight_scale.float().unsqueeze(-1))
    return table


PACKED = {
    BinaryLinear: PackedLinear,
    Int8Embedding: PackedInt8Embedding,
    BinaryEmbedding: PackedBinaryEmbedding,
}


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of `model` holds packed weights."""
    return any(isinstance(module, tuple(PACKED.values())) for module in model.modules())
