"""Packed layers, for inference: `weight` holds one bit per weight, `weight_scale` one scale per output channel."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import kernels
from ..functional import pack_bits, unpack_bits
from ..kernels.weights import groups_are_large
from .embeddings import BinaryEmbedding, Int8Embedding
from .layers import BinaryConv2d, BinaryLinear, one_image, padding_of
from .levels import SignedLevels
from .packed_base import PackedWeight
from .packed_embeddings import PackedBinaryEmbedding, PackedInt8Embedding
from .products import Conv2dProduct, LinearProduct

LEVELS_POSITION = 8  # of `levels` among the arguments of PackedConv2d


class PackedLinear(PackedWeight, nn.Linear):
    """`(..., in) -> (..., out)` from one bit per weight: uint8 `(out, ceil(in / 8))`, bit 1 = negative.

    The gradient of the input, which an adapter in an earlier layer needs, is that of the straight-through estimator.
    """

    product = LinearProduct()
    latent = BinaryLinear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        levels: SignedLevels | None = None,
        binary_inputs: bool = True,
        weight_scaling: str = "channel",
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: it would register a float parameter under `weight`
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, -(-in_features // 8))
        self.hold(shape, bias, levels, binary_inputs, weight_scaling, device)

    @staticmethod
    def geometry(layer: nn.Linear) -> tuple[int, int]:
        return layer.in_features, layer.out_features

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        return pack_bits(weight)

    def signs(self) -> Tensor:
        """The weights' signs, int8 `(out, in)`."""
        return unpack_bits(self.weight, self.in_features)

    def make_operands(self) -> tuple:
        """The operands of a kernel besides the inputs. With them, the kernel equals `sign_product` bit for bit."""
        levels, offset = self.input_levels, self.bias
        scale, shift = levels.affine()
        if levels.shifted:
            offset = self.product.weight_sum(self.signs(), None) * (self.weight_scale * shift)
            offset = offset if self.bias is None else offset + self.bias
        return self.make_weight(), self.weight_scale * scale, offset, levels.threshold()

    def make_weight(self) -> kernels.LinearWeight:
        """The bits as a kernel takes them."""
        return kernels.LinearWeight.from_bits(self.weight, self.in_features)

    def call_of(self, operands: tuple) -> Callable[[Tensor], Tensor]:
        return kernels.LinearCall(*operands)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedConv2d(PackedWeight, nn.Conv2d):
    """`(N, in, H, W) -> (N, out, H', W')` from one bit per weight, bit 1 = negative; N may be absent.

    The bits run along the input channels: uint8 `(out, ceil(in / groups / 8), kh, kw)`. Gradients as in PackedLinear.
    Without `levels` the constructor makes a float nn.Conv2d: PEFT builds its adapters as `type(layer)(in, out, ...)`.
    """

    latent = BinaryConv2d

    def __new__(cls, *args, **kwargs):
        packed = "levels" in kwargs or len(args) > LEVELS_POSITION or not (args or kwargs)  # none: a copy or a pickle
        return super().__new__(cls) if packed else nn.Conv2d(*args, **kwargs)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        levels: SignedLevels | None = None,
        binary_inputs: bool = True,
        weight_scaling: str = "channel",
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Conv2d's: it would register a float parameter under `weight`
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.padding_mode, self.transposed, self.output_padding = "zeros", False, (0, 0)
        shape = (out_channels, -(-in_channels // groups // 8), *kernel_size)
        self.hold(shape, bias, levels, binary_inputs, weight_scaling, device)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else super().forward(one_image(x)).squeeze(0)

    @staticmethod
    def geometry(layer: nn.Conv2d) -> tuple:
        size = (layer.in_channels, layer.out_channels, layer.kernel_size)
        return *size, layer.stride, padding_of(layer), layer.dilation, layer.groups

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        rows = weight.permute(0, 2, 3, 1)
        return pack_bits(rows.flatten(0, 2)).view(*rows.shape[:3], -1).permute(0, 3, 1, 2)

    def signs(self) -> Tensor:
        """The weights' signs, int8 `(out, in / groups, kh, kw)`."""
        rows = self.weight.permute(0, 2, 3, 1)
        signs = unpack_bits(rows.flatten(0, 2), self.in_channels // self.groups)
        return signs.view(*rows.shape[:3], -1).permute(0, 3, 1, 2)

    @property
    def product(self) -> Conv2dProduct:
        return Conv2dProduct(self.stride, self.padding, self.dilation, self.groups)

    @property
    def has_kernel(self) -> bool:
        return groups_are_large(self.in_channels, self.out_channels, self.groups)

    def make_operands(self) -> tuple:
        """The operands of a kernel besides the inputs. With them, the kernel equals `sign_product` bit for bit."""
        levels = self.input_levels
        scale, shift = levels.affine()
        shift = self.weight_scale * shift if levels.shifted else None
        geometry = (self.stride, self.padding, self.dilation)
        return self.make_weight(), self.weight_scale * scale, self.bias, shift, *geometry, levels.threshold()

    def make_weight(self) -> kernels.Conv2dWeight:
        """The bits as a kernel takes them."""
        return kernels.Conv2dWeight.from_bits(self.weight, self.in_channels, self.groups)

    def call_of(self, operands: tuple) -> Callable[[Tensor], Tensor]:
        return lambda x: kernels.conv2d(x, *operands)


PACKED = {
    BinaryLinear: PackedLinear,
    BinaryConv2d: PackedConv2d,
    Int8Embedding: PackedInt8Embedding,
    BinaryEmbedding: PackedBinaryEmbedding,
}


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of `model` holds packed weights."""
    return any(isinstance(module, tuple(PACKED.values())) for module in model.modules())
