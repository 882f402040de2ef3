"""The linear operators of binary layers: on floats, exactly on signs, and their adjoints, which methods use."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..functional import exactly, integer_conv2d, integer_product
from ..kernels import training as on_bits
from ..kernels.weights import Conv2dWeight, LinearWeight


def linear_weight(weight: Tensor) -> LinearWeight:
    """The signs of contiguous float32 `(out, in)` as compiled kernels take them."""
    return LinearWeight(on_bits.linear_panels(weight), weight.shape[1], weight.shape[0])


def conv2d_weight(weight: Tensor) -> Conv2dWeight:
    """The signs of contiguous float32 `(out, in, kh, kw)`, of one group, as compiled kernels take them."""
    out, channels, height, width = weight.shape
    corners = torch.zeros(height + 1, width + 1, out, dtype=torch.int32)
    corners[1:, 1:] = on_bits.signs(weight).sum(1).to(torch.int32).permute(1, 2, 0).cumsum(0).cumsum(1)
    return Conv2dWeight(on_bits.conv2d_panels(weight), corners, channels, 1)


class LinearProduct(NamedTuple):
    """`(..., in)` and `(out, in)` to `(..., out)`, without a bias."""

    def output_shape(self, x: Tensor, weight_shape: torch.Size) -> tuple[int, ...]:
        return (*x.shape[:-1], weight_shape[0])

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def of_signs(self, x: Tensor, weight: Tensor) -> Tensor:
        """The exact product of int8 signs, as float32."""
        if x.shape[-1] != weight.shape[1] or not on_bits.takes_signs(x, weight):
            return integer_product(x, weight)
        ones = torch.ones(weight.shape[0])
        return kernels.LinearCall(linear_weight(weight.float().contiguous()), ones, None, 0.0)(x.float())

    def weight_sum(self, weight: Tensor, x: Tensor) -> Tensor:
        """The sum of the weights that each output for `x` sees, in a shape that broadcasts to the output's."""
        return weight.sum(1, dtype=torch.float32)

    def per_channel(self, values: Tensor) -> Tensor:
        """One value per output channel, `(out,)`, in a shape that broadcasts to the output's."""
        return values

    def grad_input(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


class Conv2dProduct(NamedTuple):
    """`(N, in, H, W)` and `(out, in / groups, kh, kw)` to `(N, out, H', W')`, zero padding, without a bias."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_shape(self, x: Tensor, weight_shape: torch.Size) -> tuple[int, ...]:
        size = (
            (x.shape[2 + i] + 2 * self.padding[i] - self.dilation[i] * (weight_shape[2 + i] - 1) - 1) // self.stride[i]
            + 1
            for i in range(2)
        )
        return (x.shape[0], weight_shape[0], *size)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        # Rows in memory: the order of summation depends on the layout, and unpacked signs have their channels last.
        return F.conv2d(x, weight.flatten().view(weight.shape), None, *self)

    def of_signs(self, x: Tensor, weight: Tensor) -> Tensor:
        """The exact product of int8 signs, as float32, channels last in memory."""
        if self.groups > 1 or x.shape[1] != weight.shape[1] or not on_bits.takes_signs(x, weight):
            return integer_conv2d(x, weight, *self)
        ones, geometry = torch.ones(weight.shape[0]), (self.stride, self.padding, self.dilation)
        return kernels.conv2d(x.float(), conv2d_weight(weight.float().contiguous()), ones, None, None, *geometry)

    def weight_sum(self, weight: Tensor, x: Tensor) -> Tensor:
        """The sum of the weights that each output for `x` sees: fewer at the border. `(out, H', W')`, float32."""
        with exactly(x.device):
            return F.conv2d(x.new_ones((1, *x.shape[1:]), dtype=torch.float32), weight.float(), None, *self)[0]

    def per_channel(self, values: Tensor) -> Tensor:
        """One value per output channel, `(out,)`, in a shape that broadcasts to the output's."""
        return values.view(-1, 1, 1)

    def _adjoint(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]):
        geometry = (list(self.stride), list(self.padding), list(self.dilation), False, [0, 0], self.groups)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, wanted)

    def grad_input(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._adjoint(grad, x, weight, [True, False, False])[0]

    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._adjoint(grad, x, weight, [False, True, False])[1]
