"""Fused residual blocks of binary convolutions, which pass bits to one another.

In all cases that they do not cover, the plain class behind them runs: training, gradients, other dtypes or devices, no
compiled kernels, torch.compile, layers of another kind.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import Conv2dBlock, Epilogue, backend, max_pool, normalization
from ..kernels.epilogue import GROUPS, rounds_once
from ..kernels.lending import OWN
from ..kernels.operands import runs_directly
from ..kernels.planned_block import Level
from ..kernels.sources import Source, lent_tensors_of, tensors_of
from ..nn.activations import RPReLU
from ..nn.packed import PackedConv2d
from .base import Fused


class Signs(NamedTuple):
    """The output of a block for the next one: float32 images, channels last, and their bits against its threshold."""

    images: Tensor
    bits: Tensor | None = None
    owned: bool = False  # whether nothing else uses `images`, so that the next block may overwrite them


def runs_fused(x: Tensor) -> bool:
    """Whether a fused block takes `x` now."""
    return (
        x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and runs_directly(x)
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
    )


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """alpha and beta of a batch normalization in evaluation. None if kernels cannot equal this module."""
    if type(norm) is not nn.BatchNorm2d or norm.running_var is None or rounds_once() is None:
        return None
    values = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if not all(t is None or (t.dtype == torch.float32 and t.is_cpu) for t in values):
        return None
    return normalization(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns."""
    return (size, size) if isinstance(size, int) else tuple(size)


def block_of(unit: nn.Module, epilogue: Epilogue) -> Conv2dBlock | None:
    """A unit as one call: its `convolution`, `normalization` and `activation`, with the shortcut of `epilogue`.

    None if the unit cannot be fused.
    """
    conv, affine, activation = unit.convolution, affine_of(unit.normalization), unit.activation
    if not isinstance(conv, PackedConv2d) or not conv.binary_inputs or conv.groups != 1 or affine is None:
        return None
    weight, scale, bias, shift, *geometry, threshold = conv.operands()
    if backend() == "torch" or weight.data.dtype != torch.int32 or scale.dtype != torch.float32:
        return None
    rprelu = None
    if type(activation) is RPReLU:
        rprelu = (activation.shift, activation.slope, activation.offset)
        rprelu = tuple(values.detach().flatten() for values in rprelu)
    elif type(activation) is not nn.Identity:
        return None
    epilogue = epilogue._replace(alpha=affine[0], beta=affine[1], rprelu=rprelu)
    return Conv2dBlock(weight, scale, bias, shift, *geometry, threshold, epilogue)


class Shortcut(NamedTuple):
    """A shortcut, divided into what runs before the epilogue of a convolution and what runs in it."""

    run: Callable[[Tensor], Tensor] | None  # None: the input is added unchanged
    epilogue: Epilogue = Epilogue()

    @classmethod
    def of(cls, module: nn.Module) -> "Shortcut":
        """From a block's own shortcut: an identity, a `convolution` with its `normalization`, or any other module."""
        if type(module) is nn.Identity:
            return cls(None)
        affine = affine_of(getattr(module, "normalization", None))
        if affine is None or list(module._modules) != ["convolution", "normalization"]:
            return cls(module)
        return cls(module.convolution, Epilogue(shortcut_alpha=affine[0], shortcut_beta=affine[1]))


class Watched(Fused):
    """Caches data derived from the weights of a block; rebuilds it when a source changes.

    Plain numbers such as a stride or an eps are not sources.
    """

    made = ("_prepared", "_backend", "_parts")
    _prepared: Any = None
    _backend: str | None = None

    def prepare(self) -> Any:
        """The data derived from the present weights. None if the block cannot be fused."""
        raise NotImplementedError(f"{type(self).__name__} must say what it runs")

    def derive(self) -> None:
        for module in self.modules():
            if module is not self and isinstance(module, Fused):
                module.current()
        self._prepared, self._backend = self.prepare(), backend()

    def entries(self) -> list[Source]:
        self._parts = list(self.modules())
        read = [module for module in self._parts if type(module) is not nn.Conv2d]  # float ones run unfused
        tensors = [place for module in read for place in lent_tensors_of(module) if not place[1].startswith(OWN)]
        return [*tensors, *((module._modules, name) for module in self._parts for name in module._modules)]

    def unread(self) -> list[Source]:
        return [place for module in self._parts for place in tensors_of(module) if place[1].startswith(OWN)]

    def ready(self) -> Any:
        """The data of `prepare`, rebuilt if a source or the backend has changed. None if the plain forward must run."""
        if self._backend != backend():
            self.sources = None
        if not self.current() or any(module.training for module in self._parts):
            return None
        return self._prepared

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_prepared": None}  # addresses: copies and pickles make their own


class FusedStem(Watched):
    """A stem of `embedder.convolution`, `pooler` and `embedder.normalization`, with the last two in one call.

    Hooks of those two do not run; hooks of the convolution do.
    """

    def prepare(self) -> tuple[Tensor, ...] | None:
        pool, affine = self.pooler, affine_of(self.embedder.normalization)
        if type(pool) is not nn.MaxPool2d or affine is None or pool.ceil_mode or pool.return_indices:
            return None
        window = [pair(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
        return (*affine, *window[:3]) if window[3] == (1, 1) else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        prepared = self.ready() if runs_fused(pixel_values) and pixel_values.shape[1] == self.num_channels else None
        if prepared is None:
            return super().forward(pixel_values)
        images = pixel_values.contiguous(memory_format=torch.channels_last)
        return max_pool(self.embedder.convolution(images), *prepared)


class FusedBlock(Watched):
    """Base of residual blocks whose units run as one call each. Hooks on the modules inside do not run."""

    def run(self, prepared: Any, x: Signs, next_level: Level | None) -> Signs:
        """The output of the block, and its bits against `next_level` if that is given."""
        raise NotImplementedError(f"{type(self).__name__} must say how it runs")

    def first_level(self, prepared: Any) -> Level:
        """The threshold of the block's input."""
        raise NotImplementedError(f"{type(self).__name__} must say what its first convolution is")

    def forward(self, x: Tensor) -> Tensor:
        prepared = self.ready() if runs_fused(x) else None
        return super().forward(x) if prepared is None else self.run(prepared, Signs(x), None).images


class FusedBasicBlock(FusedBlock):
    """Two convolutions. The shortcut of the block runs around the first, the identity around the second."""

    def prepare(self) -> tuple[Shortcut, Conv2dBlock, Conv2dBlock] | None:
        first, second = self.layer
        shortcut = Shortcut.of(self.shortcut)
        blocks = block_of(first, shortcut.epilogue), block_of(second, Epilogue())
        return None if None in blocks else (shortcut, *blocks)

    def first_level(self, prepared: tuple) -> Level:
        return prepared[1].level

    def run(self, prepared: tuple, x: Signs, next_level: Level | None) -> Signs:
        shortcut, first, second = prepared
        around, in_place = (x.images, x.owned) if shortcut.run is None else (shortcut.run(x.images), False)
        y, bits = first(x.images, x.bits, around, second.level, in_place)
        return Signs(*second(None, bits, y, next_level, True), True)


class FusedBottleNeckBlock(FusedBlock):
    """Three convolutions. The shortcut of the block runs around the last, resized inputs around the other two."""

    @staticmethod
    def resized(x: Tensor, conv: nn.Conv2d) -> Tensor:
        """`x` resized to the shape of the output of `conv`."""
        raise NotImplementedError("a bottleneck block must say how a shortcut is resized")

    def resizing(self, conv: nn.Conv2d) -> Shortcut:
        """The shortcut around a convolution that changes the shape of its input."""
        group, rest = divmod(conv.in_channels, conv.out_channels)
        if conv.stride == (1, 1) and not rest and group in GROUPS:
            return Shortcut(None, Epilogue(shortcut_group=group))
        return Shortcut(lambda x: self.resized(x, conv))

    def prepare(self) -> tuple[tuple[Shortcut, Conv2dBlock], ...] | None:
        first, second, third = self.layer
        shortcuts = self.resizing(first.convolution), self.resizing(second.convolution), Shortcut.of(self.shortcut)
        units = zip((first, second, third), shortcuts, strict=True)
        steps = tuple((shortcut, block_of(unit, shortcut.epilogue)) for unit, shortcut in units)
        return None if any(block is None for _, block in steps) else steps

    def first_level(self, prepared: tuple) -> Level:
        return prepared[0][1].level

    def run(self, prepared: tuple, x: Signs, next_level: Level | None) -> Signs:
        (first_shortcut, first), (second_shortcut, second), (own, third) = prepared
        around = x.images if first_shortcut.run is None else first_shortcut.run(x.images)
        y, bits = first(x.images, x.bits, around, second.level)
        around, in_place = (y, True) if second_shortcut.run is None else (second_shortcut.run(y), False)
        y, bits = second(None, bits, around, third.level, in_place, floats=False)
        around, in_place = (x.images, x.owned) if own.run is None else (own.run(x.images), False)
        return Signs(*third(None, bits, around, next_level, in_place), True)


class FusedStage(Fused):
    """A sequence `layers` of fused blocks, which pass bits to one another. Hooks on the blocks do not run.

    If one of the blocks cannot run fused, each block runs by itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        blocks = list(self.layers)
        if not runs_fused(x) or not all(isinstance(block, FusedBlock) for block in blocks):
            return super().forward(x)
        prepared = [block.ready() for block in blocks]
        if any(found is None for found in prepared):
            return super().forward(x)
        return self.run(list(zip(blocks, prepared, strict=True)), Signs(x)).images

    def run(self, steps: list[tuple[FusedBlock, Any]], x: Signs) -> Signs:
        """Run all blocks, each on the bits that the block before it has returned."""
        levels = [block.first_level(prepared) for block, prepared in steps[1:]]
        for (block, prepared), level in zip(steps, (*levels, None), strict=True):
            x = block.run(prepared, x, level)
        return x
