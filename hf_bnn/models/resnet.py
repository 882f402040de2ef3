"""Binary ResNet: config, blocks and their fused forms, and model classes."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetBackbone, ResNetConfig, ResNetForImageClassification, ResNetModel
from transformers.models.resnet.modeling_resnet import (
    ResNetBasicLayer,
    ResNetBottleNeckLayer,
    ResNetConvLayer,
    ResNetEmbeddings,
    ResNetShortCut,
    ResNetStage,
)

from ..convert import replace_modules
from ..fused.convolutions import FusedBasicBlock, FusedBottleNeckBlock, FusedStage, FusedStem
from ..fused.registry import fuses
from ..nn.activations import RPReLU
from ..nn.levels import SignedLevels, ThresholdLevels
from ..observers import transformed
from .base import BinaryModelMixin
from .config import BinaryConfigFields, check_choice

STEM, SHORTCUTS, CLASSIFIER = "*embedder.embedder*", "*.shortcut.*", "classifier*"
BLOCKS = ("bireal", "residual")


class BinaryResNetConfig(BinaryConfigFields, ResNetConfig):
    """The config of a binary ResNet: ResNetConfig's fields, and those that say which parts are binary.

    - `binarize`: "both", "weights", "activations", or "none" for a float network of the same structure.
    - `stem`: "imagenet" (7 x 7, stride 2, max pooling) or "cifar" (3 x 3, stride 1, no pooling).
    - `shortcut`: of a block that changes its input's shape, "conv" (1 x 1 convolution, float by default) or "pad"
      (every other pixel, zeros for new channels, no parameters: option A of arXiv 1512.03385).
    - `block`: "bireal" (a shortcut around every convolution, no ReLU before a sign: Bi-Real Net, arXiv 1808.00278) or
      "residual" (transformers' own). None: "bireal" where inputs are binary, else "residual".
    - `levels`: "signed" ({-1, 1}), "rsign" (a learned threshold per channel, ReActNet) or "elastic".
    - `block_activation`: after each shortcut of a Bi-Real block, "none" or "rprelu" (ReActNet). Residual blocks keep
      transformers' ReLU.
    - `exclude`: shell-style patterns of modules that stay float. None: the default, which is then stored.

    >>> BinaryResNetConfig(stem="cifar").exclude
    ['*embedder.embedder*', '*.shortcut.*', 'classifier*']
    """

    model_type = "hf_bnn_resnet"
    float_model_type = "resnet"
    levels_choices: ClassVar[tuple[str, ...]] = ("signed", "rsign", "elastic")
    family_patterns: ClassVar[tuple[str, ...]] = (STEM, SHORTCUTS, CLASSIFIER)

    levels: str = "signed"
    stem: str = "imagenet"
    shortcut: str = "conv"
    block: str | None = None
    block_activation: str = "none"

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        check_choice("stem", self.stem, ("imagenet", "cifar"))
        check_choice("shortcut", self.shortcut, ("conv", "pad"))
        check_choice("block", self.block, (None, *BLOCKS))
        check_choice("block_activation", self.block_activation, ("none", "rprelu"))
        if self.block == "residual" and self.binary_inputs:
            raise ValueError(
                f"block='residual' with binarize={self.binarize!r}: every convolution would read a ReLU output, "
                "so every sign would be +1; use block='bireal'"
            )
        if self.block == "bireal" and not self.binary_inputs and self.block_activation == "none":
            raise ValueError(
                f"block='bireal' with binarize={self.binarize!r} and block_activation='none': without signs and "
                "without activations the network would be linear; use block_activation='rprelu' or block='residual'"
            )
        if self.exclude is None:
            self.exclude = [STEM, SHORTCUTS, CLASSIFIER]

    @property
    def binary_inputs(self) -> bool:
        """Whether the convolutions' inputs are binary."""
        return self.binarize in ("both", "activations")

    @property
    def bireal(self) -> bool:
        """Whether the blocks are Bi-Real ones."""
        return self.binary_inputs if self.block is None else self.block == "bireal"


class PadShortCut(nn.Module):
    """`(N, in, H, W) -> (N, out, H / stride, W / stride)`: every `stride`-th pixel, and zeros for the new channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride, self.before = stride, (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BiRealStem(nn.Module):
    """transformers' stem without its ReLU, and with the normalization after the pooling.

    A sign follows. The maximum of nine normalized pixels is rarely negative; normalized after the pooling, half are.
    """

    def __init__(self, stem: ResNetEmbeddings):
        super().__init__()
        self.embedder, self.pooler, self.num_channels = stem.embedder, stem.pooler, stem.num_channels
        self.embedder.activation = nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values has {pixel_values.shape[1]} channels: the config's num_channels is {self.num_channels}"
            )
        # torch pools 18 times as fast with channels last.
        if pixel_values.is_cpu and not self.training and not transformed():
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return self.embedder.normalization(self.pooler(self.embedder.convolution(pixel_values)))


class BiRealLayer(nn.Module):
    """The base of blocks with a shortcut around every convolution and no ReLU before a sign.

    `(N, in, H, W) -> (N, out, H', W')`. Replaces transformers' block and keeps its parameters and their names.
    """

    def __init__(self, block: ResNetBasicLayer | ResNetBottleNeckLayer, rprelu: bool):
        super().__init__()
        self.shortcut, self.layer = block.shortcut, block.layer
        for unit in self.layer:
            unit.activation = RPReLU(unit.convolution.out_channels) if rprelu else nn.Identity()

    @staticmethod
    def unit(unit: ResNetConvLayer, x: Tensor, shortcut: Tensor) -> Tensor:
        """One binary convolution of `x`, normalized, plus its shortcut, and the activation of the sum."""
        return unit.activation(unit.normalization(unit.convolution(x)).add_(shortcut))


class BiRealBasicLayer(BiRealLayer):
    """Two convolutions: the block's own shortcut stands around the first (Bi-Real Net, arXiv 1808.00278, figure 3)."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer
        x = self.unit(first, x, self.shortcut(x))
        return self.unit(second, x, x)


class BiRealBottleNeckLayer(BiRealLayer):
    """Three convolutions: the block's own shortcut stands around the last, resized inputs around the other two."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layer
        narrow = self.unit(first, x, resized(x, first.convolution))
        narrow = self.unit(second, narrow, resized(narrow, second.convolution))
        return self.unit(third, narrow, self.shortcut(x))


def resized(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`x` in the output shape of `conv`, without parameters.

    Pixels are averaged over the stride; channels are averaged in groups or repeated. Where the numbers of channels do
    not divide evenly, the groups overlap.
    """
    if conv.stride != (1, 1):
        x = F.avg_pool2d(x, conv.stride, ceil_mode=True, count_include_pad=False)
    channels = conv.out_channels
    if x.shape[1] == channels:
        return x
    if x.shape[1] % channels == 0:
        return x.unflatten(1, (channels, -1)).mean(2)
    return F.adaptive_avg_pool1d(x.flatten(2).transpose(1, 2), channels).transpose(1, 2).unflatten(2, x.shape[2:])


@fuses(BiRealStem)
class FusedBiRealStem(FusedStem, BiRealStem):
    """A BiRealStem that pools and normalizes in one call."""


@fuses(BiRealBasicLayer)
class FusedBiRealBasicLayer(FusedBasicBlock, BiRealBasicLayer):
    """A packed BiRealBasicLayer that runs each convolution and everything behind it as one call."""


@fuses(BiRealBottleNeckLayer)
class FusedBiRealBottleNeckLayer(FusedBottleNeckBlock, BiRealBottleNeckLayer):
    """A packed BiRealBottleNeckLayer that runs each convolution and everything behind it as one call."""

    resized = staticmethod(resized)


@fuses(ResNetStage)
class FusedResNetStage(FusedStage, ResNetStage):
    """A stage of fused blocks, each of which hands bits to the next."""


BIREAL = {ResNetBasicLayer: BiRealBasicLayer, ResNetBottleNeckLayer: BiRealBottleNeckLayer}


class BinaryResNetMixin(BinaryModelMixin):
    """Makes any ResNet head binary."""

    config_class = BinaryResNetConfig
    config: BinaryResNetConfig

    def rewrite(self) -> None:
        replace_modules(self, self.rewritten)

    def rewritten(self, name: str, module: nn.Module) -> nn.Module | None:
        """The replacement of a module of the float network; None: it stays."""
        config = self.config
        if isinstance(module, ResNetEmbeddings):
            if config.stem == "cifar":
                module.embedder.convolution = nn.Conv2d(config.num_channels, config.embedding_size, 3, 1, 1, bias=False)
                self._init_weights(module.embedder.convolution)
                module.pooler = nn.Identity()
            return BiRealStem(module) if config.bireal else None
        if isinstance(module, ResNetShortCut) and config.shortcut == "pad":
            conv = module.convolution
            return PadShortCut(conv.in_channels, conv.out_channels, conv.stride[0])
        if type(module) in BIREAL and config.bireal:
            return BIREAL[type(module)](module, config.block_activation == "rprelu")
        return None

    def input_levels(self, name: str) -> SignedLevels:
        if self.config.levels == "rsign":
            return ThresholdLevels(self.get_submodule(name).in_channels)
        return super().input_levels(name)


class BinaryResNetModel(BinaryResNetMixin, ResNetModel):
    """ResNetModel with binary convolutions."""


class BinaryResNetForImageClassification(BinaryResNetMixin, ResNetForImageClassification):
    """ResNetForImageClassification with binary convolutions.

    `from_pretrained` reads float, latent and packed checkpoints. Float weights become the latent ones.

    >>> config = BinaryResNetConfig(stem="cifar", layer_type="basic", hidden_sizes=[16, 32], depths=[1, 1])
    >>> model = BinaryResNetForImageClassification(config)
    """


class BinaryResNetBackbone(BinaryResNetMixin, ResNetBackbone):
    """ResNetBackbone with binary convolutions. No ReLU follows its feature maps."""
