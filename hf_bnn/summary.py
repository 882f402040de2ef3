"""Counts a model's weights and bytes, in agreement with the file on disk."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .nn.layers import BinaryLayer
from .nn.levels import SignedLevels
from .nn.packed import PACKED, PackedConv2d, PackedLinear


class Summary(NamedTuple):
    """Counts over a model's saved parameters and buffers; sizes in bytes."""

    weights: int  # of the whole model, as many as in its float form
    binary_weights: int  # those that are kept as signs only
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


def composition(model: nn.Module, blocks: int = 3) -> str:
    """One line on how much of a latent or packed model is binary, and which blocks hold most float weights.

    >>> from hf_bnn import binarize_
    >>> composition(binarize_(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), exclude=["1"]))
    '87.4% of the weights are binary (1 layer); largest float blocks: 1 (11.3%), 0 (1.4%)'
    """
    floats: Counter[str] = Counter()
    binary, layers = 0, 0
    for name, module, count in _counts(model):
        bits = _binary_weights(module)
        layers += bits > 0
        binary += bits
        block = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) or type(model).__name__
        floats[block] += count - bits
    total = binary + floats.total()
    largest = ", ".join(f"{name} ({n / total:.1%})" for name, n in floats.most_common(blocks) if n)
    share = f"{binary / total:.1%} of the weights are binary ({layers} layer{'s' * (layers != 1)})"
    return f"{share}; largest float blocks: {largest}" if largest else share


def _binary_weights(module: nn.Module) -> int:
    """The number of a module's own binary weights, without those of its submodules."""
    if isinstance(module, PackedLinear | PackedConv2d):
        return module.signs().numel()
    return module.weight.numel() if isinstance(module, BinaryLayer) and module.binary_weight else 0


def _weights(model: nn.Module) -> int:
    return sum(count for _, _, count in _counts(model))


def _counts(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, module, number of its own weights in float form) of every module."""
    seen: set[nn.Parameter] = set()  # a bias may belong to two modules
    for module in model.modules():
        if isinstance(module, BinaryLayer):  # the method's parts are dropped after training
            seen.update(p for _, part in module.parts() for p in part.parameters())
        if isinstance(module, SignedLevels):
            seen.update(module.parameters())
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedConv2d):
            yield name, module, module.signs().numel() + (0 if module.bias is None else module.bias.numel())
        elif isinstance(module, nn.Embedding):
            yield name, module, module.num_embeddings * module.embedding_dim
        else:
            own = [p for p in module.parameters(recurse=False) if p not in seen]
            seen.update(own)
            yield name, module, sum(p.numel() for p in own)
