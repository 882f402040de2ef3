"""Binary convolutions with what follows them, up to the bits of the next one: `hf_bnn::conv2d_block`."""

from ctypes import addressof, c_float
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .conv2d import MOST_GEOMETRIES, Geometry, conv2d_sizes, nothing
from .library import Conv2dEpilogue, Conv2dLayer, call, instruction_set, threads_for
from .operands import define_op, floats, split_threshold
from .weights import PAIR, WORD, Conv2dWeight

GROUPS = (1, 2, 4)  # channels of a shortcut for each output


class Epilogue(NamedTuple):
    """What follows a convolution, in this order; None: it is left out. Every tensor has a number per output.

    - `y * alpha + beta`: batch normalization in evaluation, see `normalization`;
    - `+ shortcut`, itself normalized by `shortcut_alpha` and `shortcut_beta`, or the mean of each `shortcut_group`
      (1, 2 or 4) neighbouring channels of it;
    - RPReLU: `prelu(y - shift, slope) + offset`, as `rprelu = (shift, slope, offset)`.
    """

    alpha: Tensor | None = None
    beta: Tensor | None = None
    shortcut_alpha: Tensor | None = None
    shortcut_beta: Tensor | None = None
    shortcut_group: int = 1
    rprelu: tuple[Tensor, Tensor, Tensor] | None = None


def normalization(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """alpha and beta with which F.batch_norm computes `x * alpha + beta` in evaluation: asked of itself."""
    zero = torch.zeros_like(mean)
    alpha = F.batch_norm(torch.ones_like(mean)[None], zero, variance, weight, None, False, 0.0, eps)
    beta = F.batch_norm(zero[None], mean, variance, weight, bias, False, 0.0, eps)
    return alpha[0], beta[0]


@cache
def rounds_once() -> bool | None:
    """Whether F.batch_norm rounds `x * alpha + beta` once here (FMA), False: twice, None: neither always."""
    with torch.inference_mode():
        x = torch.linspace(-3, 5, 2 * 67 * 35, device="cpu", dtype=torch.float32).view(2, 67, 5, 7)
        alpha, beta = (torch.linspace(*ends, 67, device="cpu", dtype=torch.float32) for ends in ((0.3, 2.7), (-1, 1.3)))
        twice = x * alpha.view(-1, 1, 1) + beta.view(-1, 1, 1)
        once = (x.double() * alpha.double().view(-1, 1, 1) + beta.double().view(-1, 1, 1)).float()
        for answer, expected in ((True, once), (False, twice)):
            layouts = (x, x.contiguous(memory_format=torch.channels_last))
            if all(torch.equal(reference.normalized(images, alpha, beta), expected) for images in layouts):
                return answer
    return None


class Level(NamedTuple):
    """What inputs are compared with, one float32 number or one per channel, and where it is."""

    values: Tensor | c_float
    address: int
    per_input: bool

    @classmethod
    def of(cls, threshold: float | Tensor) -> "Level":
        if isinstance(threshold, Tensor):
            values = threshold.to(torch.float32).contiguous()
            return cls(values, values.data_ptr(), values.numel() > 1)
        number = c_float(threshold)
        return cls(number, addressof(number), False)


class Conv2dBlock:
    """A convolution and its epilogue, ready to be called: what a layer and a shape need is made once.

    For float32 tensors on the CPU and a compiled backend; `weight` has one group. Arguments as of `conv2d`.
    """

    def __init__(
        self,
        weight: Conv2dWeight,
        scale: Tensor,
        bias: Tensor | None = None,
        shift: Tensor | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        threshold: float | Tensor = 0.0,
        epilogue: Epilogue = Epilogue(),  # noqa: B008 (immutable)
    ):
        self.arguments = (weight, scale, bias, shift, stride, padding, dilation, threshold, epilogue)
        fused, out = rounds_once(), scale.shape[0]
        if weight.data.dtype != torch.int32 or weight.groups != 1:
            raise ValueError(
                f"a weight of {weight.data.dtype} with groups={weight.groups}: a block takes one laid out for compiled "
                "kernels, with groups=1"
            )
        if epilogue.shortcut_group not in GROUPS:
            raise ValueError(f"shortcut_group={epilogue.shortcut_group}: expected one of {GROUPS}")
        if fused is None and (epilogue.alpha is not None or epilogue.shortcut_alpha is not None):
            raise RuntimeError("F.batch_norm rounds neither once nor twice here: fused blocks cannot equal it")
        self.in_channels, self.level, self.set = weight.in_channels, Level.of(threshold), instruction_set()
        self.window = (stride, padding, dilation, 1)
        self.corners = weight.corners.contiguous()
        vectors = (epilogue.alpha, epilogue.beta, epilogue.shortcut_alpha, epilogue.shortcut_beta)
        vectors += (None, None, None) if epilogue.rprelu is None else epilogue.rprelu
        vectors = tuple(None if vector is None else floats(vector, out) for vector in vectors)
        shift = None if shift is None else floats(shift, out)
        sums = (weight.data.contiguous(), self.corners, floats(scale, out), shift)
        sums += (nothing(out) if bias is None else floats(bias, out),)
        for values in (*vectors, *sums[2:]):
            if values is not None and values.numel() != out:
                raise ValueError(f"a vector of shape {tuple(values.shape)}: expected one number for each of {out}")
        self.tensors = (*vectors, *sums)  # kept: the structure has their addresses only
        addresses = [None if t is None else t.data_ptr() for t in self.tensors]
        self.epilogue = Conv2dEpilogue(*addresses[:7], epilogue.shortcut_group, bool(fused))
        self.sums = addresses[7:]
        self.geometries: dict[tuple, tuple[Geometry, Conv2dLayer, int]] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), self.arguments  # addresses: a copy, or a pickle, makes its own

    def geometry(self, size: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Geometry, Conv2dLayer, int]:
        """Of inputs of `size` and `strides`; with the structure, and its address."""
        if size[1] != self.in_channels:
            raise ValueError(f"inputs of shape {tuple(size)}: expected {self.in_channels} channels")
        geometry = Geometry.of(size, strides, self.corners.shape, *self.window)
        if min(geometry.sizes[2:]) < 1:
            raise ValueError(f"the kernel does not fit into an input of {tuple(size)}")
        layer = Conv2dLayer(geometry.shape, self.level.address, self.level.per_input, *self.sums, self.epilogue)
        if len(self.geometries) >= MOST_GEOMETRIES:
            self.geometries.clear()
        self.geometries[size, strides] = geometry, layer, addressof(layer)
        return self.geometries[size, strides]

    def __call__(
        self,
        x: Tensor | None,
        bits: Tensor | None = None,
        shortcut: Tensor | None = None,
        next_level: Level | None = None,
        in_place: bool = False,
        floats: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Floats `(N, out, H', W')`, channels last, and bits int32 `(N, H', W', words)`, each if it is wanted.

        The input is `x`, or the bits of it where there are some. `next_level`: what the bits are to be of. `in_place`:
        the floats take the place of those of the shortcut, whose shape and strides must be theirs.
        """
        if bits is None:
            if x.dtype != torch.float32:
                raise TypeError(f"inputs of {x.dtype}: a block takes float32")
            key = x.shape, x.stride()
        else:
            n, height, width, words = bits.shape
            if words != words_of(self.in_channels) or bits.dtype != torch.int32:
                raise ValueError(f"bits of {words} words, {bits.dtype}: expected {words_of(self.in_channels)}, int32")
            bits = bits.contiguous()
            channels = self.in_channels
            key = (n, channels, height, width), (height * width * channels, 1, width * channels, channels)
        geometry, _, address = self.geometries.get(key) or self.geometry(*key)
        sizes = geometry.sizes
        if bits is not None and geometry.shape.height * geometry.shape.width != height * width:  # strides are taken
            bits = bits[:, :: self.window[0][0], :: self.window[0][1]].contiguous()
        if bits is None and not geometry.readable:
            x = x.contiguous()
        if shortcut is not None:
            shortcut = self.checked_shortcut(shortcut, sizes)
        y = None
        if in_place and floats:
            y = shortcut
        elif floats:
            y = torch.empty_strided(sizes, geometry.strides, dtype=torch.float32)
        put_out, next_address, per_output = None, None, False
        if next_level is not None:
            put_out = torch.empty((sizes[0], sizes[2], sizes[3], words_of(sizes[1])), dtype=torch.int32)
            next_address, per_output = next_level.address, next_level.per_input
        if geometry.work:
            call(
                "hf_bnn_conv2d_block",
                self.set,
                *threads_for(geometry.work),
                address,
                *((x.data_ptr(), None) if bits is None else (None, bits.data_ptr())),
                None if shortcut is None else shortcut.data_ptr(),
                None if y is None else y.data_ptr(),
                *(None if put_out is None else put_out.data_ptr(), next_address, per_output),
            )
        return y, put_out

    def checked_shortcut(self, shortcut: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """`shortcut`, channels last and without gaps."""
        expected = (sizes[0], sizes[1] * self.epilogue.shortcut_group, *sizes[2:])
        if shortcut.shape != expected or shortcut.dtype != torch.float32:
            found = f"{shortcut.dtype} and shape {tuple(shortcut.shape)}"
            raise ValueError(f"a shortcut of {found}: expected float32 and {expected}")
        return shortcut.contiguous(memory_format=torch.channels_last)


def words_of(channels: int) -> int:
    """Words that hold the bits of a pixel."""
    return -(-channels // PAIR) * (PAIR // WORD)


def conv2d_block(
    x: Tensor,
    weight: Conv2dWeight,
    scale: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    threshold: float | Tensor = 0.0,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 (immutable)
    shortcut: Tensor | None = None,
    next_threshold: float | Tensor = 0.0,
    floats: bool = True,
    bits: bool = True,
) -> tuple[Tensor, Tensor]:
    """float32 `(N, out, H', W')`, channels last, and the bits of its signs, int32 `(N, H', W', words)`.

    `x` is float32 `(N, in, H, W)`, or the bits that another block has put out. What is not wanted comes out empty. One
    group. To call a layer again and again, make a `Conv2dBlock`.
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


def _conv2d_block(
    x: Tensor,
    weight: Tensor,
    corners: Tensor,
    channels: int,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    threshold: float,
    thresholds: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    shortcut_alpha: Tensor | None,
    shortcut_beta: Tensor | None,
    shortcut_group: int,
    rprelu: Tensor | None,
    shortcut: Tensor | None,
    next_threshold: float,
    next_thresholds: Tensor | None,
    floats: bool,
    bits: bool,
) -> tuple[Tensor, Tensor]:
    affine = (alpha, beta, shortcut_alpha, shortcut_beta, shortcut_group)
    packed = x.dtype == torch.int32
    if instruction_set() is None or weight.dtype != torch.int32 or not (packed or x.dtype == torch.float32):
        return reference.conv2d_block(
            *(x, weight, corners, channels, scale, shift, bias, stride, padding, dilation, threshold, thresholds),
            *(*affine, rprelu, shortcut, next_threshold, next_thresholds, floats, bits),
        )
    block = Conv2dBlock(
        *(Conv2dWeight(weight, corners, channels, 1), scale, bias, shift),
        *(tuple(stride), tuple(padding), tuple(dilation), threshold if thresholds is None else thresholds),
        Epilogue(*affine, None if rprelu is None else tuple(rprelu)),
    )
    next_level = Level.of(next_threshold if next_thresholds is None else next_thresholds) if bits else None
    y, out = block(*((None, x) if packed else (x, None)), shortcut, next_level, floats=floats)
    nothing_wanted = (x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.int32))
    return tuple(other if found is None else found for found, other in zip((y, out), nothing_wanted, strict=True))


def _fake_conv2d_block(
    x: Tensor,
    weight: Tensor,
    corners: Tensor,
    channels: int,
    scale: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *settings: object,
    **named: object,
) -> tuple[Tensor, Tensor]:
    floats, bits = settings[-2:]
    size = (x.shape[0], channels, *x.shape[1:3]) if x.dtype == torch.int32 else x.shape
    height, width = conv2d_sizes(size, corners.shape, stride, padding, dilation)
    n, out = x.shape[0], scale.shape[0]
    shape, words = ((n, out, height, width) if floats else (0,)), (n, height, width, words_of(out)) if bits else (0,)
    y = x.new_empty(shape, dtype=torch.float32)
    return y.contiguous(memory_format=torch.channels_last) if floats else y, x.new_empty(words, dtype=torch.int32)


define_op(
    "conv2d_block(Tensor x, Tensor weight, Tensor corners, int channels, Tensor scale, Tensor? shift, Tensor? bias, "
    "int[2] stride, int[2] padding, int[2] dilation, float threshold, Tensor? thresholds, Tensor? alpha, Tensor? beta, "
    "Tensor? shortcut_alpha, Tensor? shortcut_beta, int shortcut_group, Tensor? rprelu, Tensor? shortcut, "
    "float next_threshold, Tensor? next_thresholds, bool floats, bool bits) -> (Tensor, Tensor)",
    _conv2d_block,
    reference.conv2d_block,
    _fake_conv2d_block,
)
