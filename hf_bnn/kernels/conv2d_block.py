"""Binary convolutions with what follows them, up to the bits of the next one: `hf_bnn::conv2d_block`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv2d import Conv2dOperands, conv2d_sizes
from .epilogue import Epilogue
from .library import instruction_set
from .operands import split_threshold
from .ops import Pair, define_op
from .planned_block import Conv2dBlock, Level, words_of
from .reference import below, normalized, sign_words, words_to_signs
from .weights import Conv2dWeight


def conv2d_block(
    x: Tensor,
    weight: Conv2dWeight,
    scale: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    threshold: float | Tensor = 0.0,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 (immutable)
    shortcut: Tensor | None = None,
    next_threshold: float | Tensor = 0.0,
    floats: bool = True,
    bits: bool = True,
) -> tuple[Tensor, Tensor]:
    """float32 `(N, out, H', W')`, channels last, and the bits of its signs, int32 `(N, H', W', words)`.

    `x` is float32 `(N, in, H, W)`, or the bits that another block returned. `floats` and `bits` say what is wanted; the
    other result is empty. The convolution has one group. To call a layer repeatedly, make a `Conv2dBlock`.
    """
    if weight.groups != 1:
        raise ValueError(f"groups={weight.groups}: a block takes convolutions of one group")
    level, levels = split_threshold(threshold)
    next_level, next_levels = split_threshold(next_threshold)
    rprelu = None if epilogue.rprelu is None else torch.stack([values.flatten() for values in epilogue.rprelu])
    sums = (weight.data, weight.corners, weight.in_channels, scale, shift, bias, stride, padding, dilation)
    affine = (epilogue.alpha, epilogue.beta, epilogue.shortcut_alpha, epilogue.shortcut_beta)
    return torch.ops.hf_bnn.conv2d_block(
        *(x, *sums, level, levels, *affine, epilogue.shortcut_group, rprelu),
        *(shortcut, next_level, next_levels, floats, bits),
    )


@define_op("conv2d_block")
class Conv2dBlockOperands(NamedTuple):
    """Operands of `hf_bnn::conv2d_block`. `channels`: those of the input, which `x` as bits does not tell."""

    x: Tensor
    weight: Tensor
    corners: Tensor
    channels: int
    scale: Tensor
    shift: Tensor | None
    bias: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    threshold: float
    thresholds: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    shortcut_alpha: Tensor | None
    shortcut_beta: Tensor | None
    shortcut_group: int
    rprelu: Tensor | None  # (3, out): shift, slope and offset
    shortcut: Tensor | None
    next_threshold: float
    next_thresholds: Tensor | None
    floats: bool
    bits: bool

    def block(self) -> Conv2dBlock:
        affine = (self.alpha, self.beta, self.shortcut_alpha, self.shortcut_beta)
        return Conv2dBlock(
            Conv2dWeight(self.weight, self.corners, self.channels, 1),
            self.scale,
            self.bias,
            self.shift,
            *(tuple(self.stride), tuple(self.padding), tuple(self.dilation)),
            self.threshold if self.thresholds is None else self.thresholds,
            Epilogue(*affine, self.shortcut_group, None if self.rprelu is None else tuple(self.rprelu)),
        )

    def compute(self) -> tuple[Tensor, Tensor]:
        x, packed = self.x, self.x.dtype == torch.int32
        if instruction_set() is None or self.weight.dtype != torch.int32 or not (packed or x.dtype == torch.float32):
            return self.reference()
        next_level = Level.of(self.next_threshold if self.next_thresholds is None else self.next_thresholds)
        inputs = (None, x) if packed else (x, None)
        found = self.block()(*inputs, self.shortcut, next_level if self.bits else None, floats=self.floats)
        unwanted = (x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.int32))
        return tuple(other if one is None else one for one, other in zip(found, unwanted, strict=True))

    def reference(self) -> tuple[Tensor, Tensor]:
        x, threshold, thresholds, shortcut = self.x, self.threshold, self.thresholds, self.shortcut
        if x.dtype == torch.int32:
            x, threshold, thresholds = words_to_signs(x, self.channels).permute(0, 3, 1, 2), 0.0, None
        sums = (x, self.weight, self.corners, self.scale, self.shift, self.bias)
        y = Conv2dOperands(*sums, self.stride, self.padding, self.dilation, 1, threshold, thresholds).reference()
        if self.alpha is not None:
            y = normalized(y, self.alpha, self.beta)
        if shortcut is not None:
            if self.shortcut_alpha is not None:
                shortcut = normalized(shortcut, self.shortcut_alpha, self.shortcut_beta)
            group = self.shortcut_group
            y = y + (shortcut if group == 1 else shortcut.unflatten(1, (-1, group)).mean(2))
        if self.rprelu is not None:
            before, slope, after = self.rprelu
            y = F.prelu(y - before.view(-1, 1, 1), slope) + after.view(-1, 1, 1)
        last = y.permute(0, 2, 3, 1)
        levels = None if self.next_thresholds is None else self.next_thresholds.flatten()
        words = x.new_empty(0, dtype=torch.int32)
        if self.bits:
            words = sign_words(below(last, self.next_threshold, levels))
        images = x.new_empty(0, dtype=torch.float32)
        return y.contiguous(memory_format=torch.channels_last) if self.floats else images, words

    def fake(self) -> tuple[Tensor, Tensor]:
        x = self.x
        size = (x.shape[0], self.channels, *x.shape[1:3]) if x.dtype == torch.int32 else x.shape
        height, width = conv2d_sizes(size, self.corners.shape, self.stride, self.padding, self.dilation)
        n, out = x.shape[0], self.scale.shape[0]
        images = x.new_empty((n, out, height, width) if self.floats else (0,), dtype=torch.float32)
        if self.floats:
            images = images.contiguous(memory_format=torch.channels_last)
        words = (n, height, width, words_of(out)) if self.bits else (0,)
        return images, x.new_empty(words, dtype=torch.int32)
