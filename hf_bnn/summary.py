"""What a model consists of, in bits: it agrees with the file on disk."""

from typing import NamedTuple

from torch import nn

from .layers import BinaryLayer
from .levels import SignedLevels
from .packed import PACKED, PackedConv2d, PackedLinear


class Summary(NamedTuple):
    """Counts over a model's parameters and buffers that are saved; sizes in bytes."""

    weights: int  # all weights of the model, as many as its float form has
    binary_weights: int  # those of which only the sign is kept
    matrix_bytes_float: int  # the binary matrices in float32
    matrix_bytes_bits: int  # the same as bits alone
    matrix_bytes_packed: int  # the same as bits, with their scales

    @property
    def binary_share(self) -> float:
        """Binary weights over all weights, 0 to 1."""
        return self.binary_weights / self.weights

    @property
    def matrix_compression(self) -> float:
        """float32 bytes of the binary matrices over their packed bytes, scales included."""
        return self.matrix_bytes_float / self.matrix_bytes_packed


def summary(model: nn.Module) -> Summary:
    """Count a latent or a packed model.

    >>> from hf_bnn import binarize_
    >>> summary(binarize_(nn.Sequential(nn.Linear(64, 32, bias=False)))).matrix_compression
    21.333333333333332
    """
    binary = bits = scales = 0
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedConv2d):
            binary += module.signs().numel()
            bits += module.weight.numel()
            scales += 4 * module.weight_scale.numel()
        elif isinstance(module, BinaryLayer) and module.binary_weight:
            binary += module.weight.numel()
            bits += PACKED[type(module)].pack(module.weight).numel()
            scales += 4 * module.weight.shape[0]
    return Summary(_weights(model), binary, 4 * binary, bits, bits + scales)


def _weights(model: nn.Module) -> int:
    count, seen = 0, set()  # a bias may belong to two modules
    for module in model.modules():
        if isinstance(module, BinaryLayer):  # what its method has put into it is gone after training
            seen.update(p for _, part in module.parts() for p in part.parameters())
        if isinstance(module, SignedLevels):
            seen.update(module.parameters())
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedConv2d):
            count += module.signs().numel()
            count += 0 if module.bias is None else module.bias.numel()
        elif isinstance(module, nn.Embedding):
            count += module.num_embeddings * module.embedding_dim
        else:
            own = [p for p in module.parameters(recurse=False) if p not in seen]
            seen.update(own)
            count += sum(p.numel() for p in own)
    return count
