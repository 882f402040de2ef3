"""Layouts of weights for the backends. Checkpoints hold the layout of `pack_bits` on every machine.

Compiled kernels take int32 panels (see csrc/kernels.h), torch takes int8 signs. Every op accepts both.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import unpack_bits
from .library import backend

PANEL, WORD, PAIR = 16, 32, 64  # outputs in a panel, bits in a word, bits in a pair of words
# Inputs times outputs of a group. For smaller groups (depthwise: 1) torch is faster, since nearly all of a panel would
# be padding.
SMALLEST_GROUP = 64


class LinearWeight(NamedTuple):
    """A weight of `out_features x in_features` bits in the layout of a backend.

    >>> weight = LinearWeight.from_bits(torch.tensor([[1], [2]], dtype=torch.uint8), 3)
    >>> weight.in_features, weight.out_features
    (3, 2)
    """

    data: Tensor
    in_features: int
    out_features: int

    @classmethod
    def from_bits(cls, bits: Tensor, in_features: int) -> "LinearWeight":
        """From uint8 `(out, ceil(in / 8))`, little-endian along the input, bit 1 = negative."""
        expected = -(-in_features // 8)
        if bits.dtype != torch.uint8 or bits.dim() != 2 or bits.shape[1] != expected:
            raise ValueError(
                f"bits of {bits.dtype} and shape {tuple(bits.shape)}: expected uint8 (out, {expected}) for "
                f"in_features={in_features}, as pack_bits makes them"
            )
        data = bits_to_panels(bits, in_features) if takes_panels(bits) else unpack_bits(bits, in_features)
        return cls(data, in_features, bits.shape[0])


class Conv2dWeight(NamedTuple):
    """The 1-bit weight of a convolution in the layout of a backend, with sums of signs for pixels at the border.

    `corners[y, x]` is the sum over the first y rows and x columns of the kernel, int32 `(kh + 1, kw + 1, out)`.

    >>> weight = Conv2dWeight.from_bits(torch.zeros(4, 1, 3, 2, dtype=torch.uint8), in_channels=5)
    >>> weight.kernel_size, weight.corners[-1, -1, 0].item()
    ((3, 2), 30)
    """

    data: Tensor
    corners: Tensor
    in_channels: int
    groups: int

    @classmethod
    def from_bits(cls, bits: Tensor, in_channels: int, groups: int = 1) -> "Conv2dWeight":
        """From uint8 `(out, ceil(in / groups / 8), kh, kw)`, little-endian along the input, bit 1 = negative."""
        if groups < 1 or in_channels % groups or bits.shape[0] % groups:
            raise ValueError(f"groups={groups}: expected a divisor of {in_channels} inputs and {bits.shape[0]} outputs")
        channels = in_channels // groups
        if bits.dtype != torch.uint8 or bits.dim() != 4 or bits.shape[1] != -(-channels // 8):
            raise ValueError(
                f"bits of {bits.dtype} and shape {tuple(bits.shape)}: expected uint8 "
                f"(out, {-(-channels // 8)}, kh, kw) for in_channels={in_channels} and groups={groups}"
            )
        out, _, kh, kw = bits.shape
        taps = bits.permute(0, 2, 3, 1).reshape(out * kh * kw, bits.shape[1])
        signs = unpack_bits(taps, channels).view(out, kh, kw, channels)
        corners = torch.zeros(kh + 1, kw + 1, out, dtype=torch.int32, device=bits.device)
        corners[1:, 1:] = signs.sum(3, dtype=torch.int32).permute(1, 2, 0).cumsum(0).cumsum(1)
        if takes_panels(bits) and groups_are_large(in_channels, out, groups):
            words = _xor_in_pairs(_bits_to_words(taps, channels)).view(groups, out // groups, -1)
            return cls(torch.cat([_words_to_panels(group) for group in words]), corners, in_channels, groups)
        return cls(signs.permute(0, 3, 1, 2), corners, in_channels, groups)  # channels last: rows of windows

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.corners.shape[0] - 1, self.corners.shape[1] - 1


def takes_panels(tensor: Tensor) -> bool:
    """Whether compiled kernels will run on the device of `tensor`."""
    return tensor.device.type == "cpu" and backend() != "torch"


def groups_are_large(channels: int, outputs: int, groups: int) -> bool:
    """Whether compiled kernels are faster than torch for these groups. Depthwise ones are too small."""
    return groups == 1 or (channels // groups) * (outputs // groups) >= SMALLEST_GROUP


def _bits_to_words(bits: Tensor, size: int) -> Tensor:
    """uint8 `(out, ceil(size / 8))` to int32 `(out, words)`, an even number of words."""
    padded = F.pad(bits, (0, -bits.shape[1] % (PAIR // 8)))
    if size % 8:  # stray bits after the last input would count as differences
        padded[:, size // 8] &= (1 << size % 8) - 1
    shifts = torch.arange(0, WORD, 8, dtype=torch.int64, device=bits.device)
    words = (padded.unflatten(1, (padded.shape[1] // 4, 4)).to(torch.int64) << shifts).sum(-1)
    words = words - (words >> 31 << 32)  # two's complement
    return words.to(torch.int32)


def _xor_in_pairs(words: Tensor) -> Tensor:
    """(first, second) to (first, first ^ second) for each pair of words, and back."""
    pairs = words.unflatten(1, (words.shape[1] // 2, 2))
    return torch.stack((pairs[..., 0], pairs[..., 0] ^ pairs[..., 1]), -1).flatten(1)


def _xor_prefixes(words: Tensor) -> Tensor:
    """Prefixes: the n-th word becomes the xor of the first n words."""
    step = 1
    while step < words.shape[1]:
        words = torch.cat((words[:, :step], words[:, step:] ^ words[:, :-step]), 1)
        step *= 2
    return words


def _xor_differences(prefixes: Tensor) -> Tensor:
    """Inverse of `_xor_prefixes`."""
    return torch.cat((prefixes[:, :1], prefixes[:, 1:] ^ prefixes[:, :-1]), 1)


def _words_to_panels(words: Tensor) -> Tensor:
    """int32 `(out, words)` to `(ceil(out / 16), words, 16)`."""
    padded = F.pad(words, (0, 0, 0, -words.shape[0] % PANEL))
    return padded.unflatten(0, (padded.shape[0] // PANEL, PANEL)).transpose(1, 2).contiguous()


def _panels_to_words(panels: Tensor, out: int) -> Tensor:
    return panels.transpose(1, 2).flatten(0, 1)[:out]


def _words_to_signs(words: Tensor) -> Tensor:
    """int32 `(out, words)` to int8 `(out, 32 * words)`."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=words.device)
    return (1 - 2 * (words.unsqueeze(-1) >> shifts & 1).to(torch.int8)).flatten(1)


def bits_to_panels(bits: Tensor, in_features: int) -> Tensor:
    """uint8 `(out, ceil(in / 8))` to int32 `(ceil(out / 16), words, 16)` of prefixes: see csrc/kernels.h."""
    return _words_to_panels(_xor_prefixes(_bits_to_words(bits, in_features)))


def panels_to_signs(panels: Tensor, out_features: int, in_features: int) -> Tensor:
    """Inverse of `bits_to_panels`, as int8 signs `(out, in)`."""
    return _words_to_signs(_xor_differences(_panels_to_words(panels, out_features)))[:, :in_features]


def linear_signs(data: Tensor, out_features: int, in_features: int) -> Tensor:
    """int8 signs `(out, in)` from either layout."""
    return data if data.dtype == torch.int8 else panels_to_signs(data, out_features, in_features)


def conv2d_signs(data: Tensor, corners: Tensor, in_channels: int, groups: int) -> Tensor:
    """int8 signs `(out, in / groups, kh, kw)` from either layout."""
    if data.dtype == torch.int8:
        return data
    (kh, kw, out), channels = corners.shape, in_channels // groups
    padded = -(-channels // PAIR) * PAIR
    words = torch.cat([_panels_to_words(group, out // groups) for group in data.chunk(groups)])
    return _words_to_signs(_xor_in_pairs(words)).view(out, kh - 1, kw - 1, padded)[..., :channels].permute(0, 3, 1, 2)


def linear_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """The shape of panels."""
    return -(-out_features // PANEL), -(-in_features // PAIR) * 2, PANEL
