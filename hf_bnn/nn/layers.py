"""Binary layers for training: BinaryLinear and BinaryConv2d. Their common base is in `latent`."""

import torch
from torch import Tensor, nn

from .latent import BINARIZE, HALF, BinaryLayer, WeightedLayer, binary_layers
from .levels import SignedLevels
from .products import Conv2dProduct, LinearProduct
from .rescaling import rescale, sign_product

__all__ = [
    "BINARIZE",
    "BINARY_CLASSES",
    "HALF",
    "BinaryConv2d",
    "BinaryLayer",
    "BinaryLinear",
    "WeightedLayer",
    "binary_layers",
    "one_image",
    "padding_of",
    "rescale",
    "sign_product",
]


class BinaryLinear(WeightedLayer, nn.Linear):
    """`(..., in) -> (..., out)` with weights of +-1 times a scale, and inputs on two levels.

    `binarize` says which side is binary: "both", "weights" (inputs stay float) or "activations" (weights stay float).
    `weight_scaling`: one scale per output "channel" (mean |w|), one per "layer", or "none". In evaluation the product
    runs on integers and is exact.

    >>> layer = BinaryLinear(8, 4).eval().requires_grad_(False)
    >>> layer(torch.randn(2, 8)).shape
    torch.Size([2, 4])
    """

    product = LinearProduct()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        binarize: str = "both",
        levels: SignedLevels | None = None,
        weight_scaling: str = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.set_structure(binarize, levels, weight_scaling)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        binarize: str = "both",
        levels: SignedLevels | None = None,
        weight_scaling: str = "channel",
    ) -> "BinaryLinear":
        """A binary layer that takes over the float layer's parameters."""
        size = (linear.in_features, linear.out_features, linear.bias is not None)
        new = cls(*size, binarize, levels, weight_scaling, device="meta", dtype=linear.weight.dtype)
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.in_features,)


class BinaryConv2d(WeightedLayer, nn.Conv2d):
    """`(N, in, H, W) -> (N, out, H', W')` with weights of +-1 times a scale, and inputs on two levels; N may be absent.

    `binarize` and `weight_scaling` as in BinaryLinear. A padded position adds exactly nothing, whatever the levels.

    >>> layer = BinaryConv2d(8, 4, 3, padding=1).eval().requires_grad_(False)
    >>> layer(torch.randn(2, 8, 5, 5)).shape
    torch.Size([2, 4, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        binarize: str = "both",
        levels: SignedLevels | None = None,
        weight_scaling: str = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(*geometry, bias, device=device, dtype=dtype)
        self.padding = padding_of(self)
        self.set_structure(binarize, levels, weight_scaling)

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        binarize: str = "both",
        levels: SignedLevels | None = None,
        weight_scaling: str = "channel",
    ) -> "BinaryConv2d":
        """A binary layer that takes over the float layer's parameters. Raises ValueError unless it pads with zeros."""
        new = cls(
            *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding_of(conv), conv.dilation),
            *(conv.groups, conv.bias is not None, binarize, levels, weight_scaling),
            device="meta",
            dtype=conv.weight.dtype,
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else super().forward(one_image(x)).squeeze(0)

    @property
    def product(self) -> Conv2dProduct:
        return Conv2dProduct(self.stride, self.padding, self.dilation, self.groups)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.in_channels, 1, 1)


def one_image(x: Tensor) -> Tensor:
    """`(C, H, W)` as a batch of one. Raises ValueError for inputs of other dimensions."""
    if x.dim() != 3:
        raise ValueError(f"inputs of shape {tuple(x.shape)}: a convolution takes (N, C, H, W), or (C, H, W)")
    return x.unsqueeze(0)


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """(rows, columns) of zeros on each side. Raises ValueError for padding of another kind."""
    if conv.padding_mode != "zeros":
        raise ValueError(
            f"padding_mode={conv.padding_mode!r}: a binary convolution pads with zeros; leave it float (exclude=...)"
        )
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(n % 2 for n in total):
            raise ValueError(
                f"padding='same' with kernel_size={conv.kernel_size} pads more on one side than on the other: "
                "a binary convolution pads alike; leave it float (exclude=...)"
            )
        return tuple(n // 2 for n in total)
    return conv.padding


BINARY_CLASSES = {nn.Linear: BinaryLinear, nn.Conv2d: BinaryConv2d}  # float layers of exactly these classes convert
