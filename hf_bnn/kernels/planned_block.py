"""A binary convolution with what follows it, as a call for which shapes and addresses are worked out once."""

import ctypes
from ctypes import addressof, c_float, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from .conv2d import MOST_GEOMETRIES, Conv2dShape, Geometry, nothing
from .epilogue import GROUPS, Epilogue, rounds_once
from .library import CALL, THRESHOLD, call, declare, instruction_set, threads_for
from .operands import floats
from .ops import Pair
from .weights import PAIR, WORD, Conv2dWeight


class Conv2dEpilogue(ctypes.Structure):
    """`struct conv2d_epilogue` of csrc/hf_bnn.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("alpha", "beta", "shortcut_alpha", "shortcut_beta")),
        *((name, c_void_p) for name in ("rprelu_shift", "rprelu_slope", "rprelu_offset")),
        ("shortcut_group", c_int64),
        ("fused", c_int64),
    )


class Conv2dLayer(ctypes.Structure):
    """`struct conv2d_layer` of csrc/hf_bnn.h."""

    _fields_ = (
        ("shape", Conv2dShape),
        ("threshold", c_void_p),
        ("per_input", c_int64),
        *((name, c_void_p) for name in ("weights", "corners", "scale", "shift", "bias")),
        ("epilogue", Conv2dEpilogue),
    )


declare("hf_bnn_conv2d_block", *CALL, *(c_void_p,) * 6, *THRESHOLD)


class Level(NamedTuple):
    """Thresholds of inputs in memory: one float32 number, or one per channel."""

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
    """A convolution and its epilogue, ready to be called. Prepares a layer, and each shape of inputs, once.

    Takes float32 tensors on the CPU and needs a compiled backend. `weight` has one group. Arguments as in `conv2d`.
    """

    def __init__(
        self,
        weight: Conv2dWeight,
        scale: Tensor,
        bias: Tensor | None = None,
        shift: Tensor | None = None,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
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
        self.tensors = (*vectors, *sums)  # kept alive: the structure holds only their addresses
        addresses = [None if t is None else t.data_ptr() for t in self.tensors]
        self.epilogue = Conv2dEpilogue(*addresses[:7], epilogue.shortcut_group, bool(fused))
        self.sums = addresses[7:]
        self.geometries: dict[tuple, tuple[Geometry, Conv2dLayer, int]] = {}

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), self.arguments  # addresses are not copied: copies and pickles make their own

    def geometry(self, size: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Geometry, Conv2dLayer, int]:
        """Geometry for inputs of `size` and `strides`, with the structure for the kernel and its address."""
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
        """Floats `(N, out, H', W')`, channels last, and bits int32 `(N, H', W', words)`; None for what is not wanted.

        The input is `bits` if given, else `x`. The output bits compare the result with `next_level`; without one there
        are none. `in_place` writes the floats over the shortcut, which must have their shape and strides.
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
        if bits is not None and geometry.shape.height * geometry.shape.width != height * width:  # 1 x 1 with strides
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
                *threads_for(geometry.work, self.set),
                address,
                *((x.data_ptr(), None) if bits is None else (None, bits.data_ptr())),
                None if shortcut is None else shortcut.data_ptr(),
                None if y is None else y.data_ptr(),
                *(None if put_out is None else put_out.data_ptr(), next_address, per_output),
            )
        return y, put_out

    def checked_shortcut(self, shortcut: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """`shortcut`, dense and channels last."""
        expected = (sizes[0], sizes[1] * self.epilogue.shortcut_group, *sizes[2:])
        if shortcut.shape != expected or shortcut.dtype != torch.float32:
            found = f"{shortcut.dtype} and shape {tuple(shortcut.shape)}"
            raise ValueError(f"a shortcut of {found}: expected float32 and {expected}")
        return shortcut.contiguous(memory_format=torch.channels_last)


def words_of(channels: int) -> int:
    """Number of words that hold the bits of a pixel."""
    return -(-channels // PAIR) * (PAIR // WORD)
