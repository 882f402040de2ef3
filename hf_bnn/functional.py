"""Pure tensor functions: no modules, no state, no configuration."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .observers import looked_on, transformed


def sign(x: Tensor) -> Tensor:
    """-1 where `x < 0`, else +1, in the dtype of `x`: 0, -0.0 and NaN count as +1."""
    # Compared in place, in the dtype of x: a bool tensor in between would make it four times slower on a CPU.
    return x.detach().clone().lt_(0).mul_(-2).add_(1)


def clipped_gradient(grad: Tensor, x: Tensor, clip: float | Tensor) -> Tensor:
    """`grad` where |x| <= clip, else 0: the gradient of clamp(x, -clip, clip), whose kinks let it pass."""
    return x.abs().le_(clip).mul_(grad)  # in place, as in `sign`


def sign_int8(x: Tensor, threshold: Tensor | float = 0.0) -> Tensor:
    """-1 where `x < threshold`, else +1, as int8, the operand of the integer product."""
    return (x < threshold).to(torch.int8).mul_(-2).add_(1)


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, grad


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, the gradient of `soft`; same shapes.

    Exact, unlike `soft + (hard - soft).detach()`, which rounds.
    """
    if hard.shape != soft.shape:
        raise ValueError(f"hard has shape {tuple(hard.shape)} but soft has shape {tuple(soft.shape)}")
    return _StraightThrough.apply(hard, soft)


class _SurrogateSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gradient: Callable[..., Tensor], settings: tuple, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.gradient, ctx.settings = gradient, settings
        return sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, *tensors = ctx.saved_tensors
        return ctx.gradient(grad, x, *tensors, *ctx.settings), None, None, *[None] * len(tensors)


def surrogate_sign(x: Tensor, gradient: Callable[..., Tensor], *tensors: Tensor, settings: tuple = ()) -> Tensor:
    """sign(x) whose backward is `gradient(grad, x, *tensors, *settings)`. Most methods differ only in it.

    `gradient` returns a tensor of the shape and dtype of `grad`; `tensors` are constants, `settings` no tensors.
    """
    return _SurrogateSign.apply(x, gradient, settings, *tensors)


EXACT_SUMS = 2**24  # float32 holds all sums of fewer signs
WEIGHT_SCALINGS = ("channel", "layer", "none")


def weight_scale(weight: Tensor, scaling: str = "channel") -> Tensor:
    """The scale of each output channel's signs, shape `(out,)`, float32.

    "channel": mean |w| of the channel (XNOR-Net, arXiv 1603.05279, eq. 6); "layer": mean |w| of the whole weight
    (DoReFa-Net, arXiv 1606.06160, eq. 8); "none": 1.
    """
    if scaling == "none":
        return torch.ones(weight.shape[0], device=weight.device)
    per_channel = weight.detach().float().abs().flatten(1).mean(1)
    return per_channel if scaling == "channel" else per_channel.mean().expand_as(per_channel)


def learning_scale(scale: Tensor, inputs: int) -> Tensor:
    """`scale` `(out,)`, but never 0: the factor of a gradient. `inputs`: the weights of an output channel.

    A scale of 0, from a channel of zeros, becomes the mean scale of the layer, or 1 / sqrt(inputs) if all are 0. With a
    factor of 0 such a channel could never learn.
    """
    mean = scale.mean()
    usual = torch.where(mean == 0, inputs**-0.5, mean)
    return torch.where(scale == 0, usual, scale)  # a NaN stays one


class _Silence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, signs: Tensor, scale: Tensor) -> Tensor:
        return signs * (scale != 0).to(signs.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def silence(signs: Tensor, scale: Tensor) -> Tensor:
    """`signs` with 0 in the channels whose scale is 0; the gradient passes there, too. `scale` has shape `(out,)`."""
    # On a CPU this test is cheaper than the pass over the weights. Elsewhere it would have to synchronize.
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if scale.device.type == "cpu" and not traced and not bool((scale == 0).any()):
        return signs
    return _Silence.apply(signs, scale.view(-1, *[1] * (signs.dim() - 1)))


def pack_bits(x: Tensor) -> Tensor:
    """Sign bits of `(out, in)` as uint8 `(out, ceil(in / 8))`: little-endian along the input, bit 1 = negative."""
    bits = F.pad((x < 0).to(torch.uint8), (0, -x.shape[-1] % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=x.device)
    return (bits.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


@cache
def _signs_of_byte(device: torch.device) -> Tensor:
    """Entry b holds the eight int8 signs of byte b, seen as one int64."""
    bits = (torch.arange(256).unsqueeze(-1) >> torch.arange(8)) & 1
    return (1 - 2 * bits).to(torch.int8).contiguous().view(torch.int64).flatten().to(device)


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 `(out, ceil(size / 8))` to int8 signs `(out, size)`."""
    if torch.jit.is_tracing():  # it cannot record a view of other numbers
        shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
        bits = packed.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1).flatten(1)
        return (1 - 2 * bits.to(torch.int8))[:, :size]
    # A table made under a mode may be a fake one, which must not be kept.
    table = _signs_of_byte.__wrapped__ if looked_on() and not torch.compiler.is_compiling() else _signs_of_byte
    signs = table(packed.device).index_select(0, packed.flatten().int())
    return signs.view(torch.int8).view(packed.shape[0], 8 * packed.shape[1])[:, :size]


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T` for int8 signs `(..., in)` and `(out, in)`: exact sums as float32 `(..., out)`.

    Runs as an int8 product with int32 sums where torch has one (CPU; CUDA for the shapes it takes), else in float32,
    which is exact as well for fewer than 2**24 inputs.
    """
    # Contiguous, because torch's int8 product misreads rows of stride 0.
    rows = left.reshape(left.shape[:-1].numel(), left.shape[-1]).contiguous()  # not -1: undefined without inputs
    right = right.contiguous()
    if _int8_product_takes(rows, right):
        sums = torch._int_mm(rows, right.t()).float()
    else:
        sums = exact_matmul(rows.float(), right.t().float())
    return sums.view(*left.shape[:-1], right.shape[0])


def integer_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """The convolution of int8 signs `(N, in, H, W)` and `(out, in / groups, kh, kw)`, zeros at the border: exact sums
    as float32 `(N, out, H', W')`, channels last in memory.
    """
    (kh, kw), (sh, sw), (dh, dw) = weight.shape[2:], stride, dilation
    nhwc = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    n, height, width, channels = nhwc.shape
    out_h, out_w = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    if out_h < 1 or out_w < 1:
        raise ValueError(f"a {kh} x {kw} kernel does not fit into a padded input of {height} x {width}")
    batch, row, column, channel = nhwc.stride()
    windows = nhwc.as_strided(
        (n, out_h, out_w, kh, kw, channels), (batch, row * sh, column * sw, row * dh, column * dw, channel)
    )
    kernels = weight.permute(0, 2, 3, 1)
    outputs, window = n * out_h * out_w, weight[0].numel()  # not -1 below: that is undefined for an empty batch
    if groups == 1:
        sums = integer_product(windows.reshape(outputs, window), kernels.reshape(weight.shape[0], window))
    else:
        grouped = windows.unflatten(-1, (groups, channels // groups))
        rows = grouped.permute(5, 0, 1, 2, 3, 4, 6).reshape(groups, outputs, window)
        columns = kernels.reshape(groups, weight.shape[0] // groups, window).transpose(1, 2)
        sums = exact_matmul(rows.float(), columns.float()).transpose(0, 1)
    return sums.reshape(n, out_h, out_w, weight.shape[0]).permute(0, 3, 1, 2)


def exactly(device: torch.device) -> torch.autocast:
    """A context in which products run in float32 even under autocast: bfloat16 would round sums of signs above 256."""
    return torch.autocast(device.type, enabled=False)


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in float32 even under autocast."""
    with exactly(left.device):
        return left @ right


def cpu_multiplies_int8() -> bool:
    """Whether torch's int8 product is fast here. Without VNNI, x86 takes many times as long for it as for floats."""
    has = torch.cpu.get_capabilities()
    return has.get("architecture") != "x86_64" or any(bool(has.get(name)) for name in ("avx512_vnni", "avx_vnni"))


CPU_MULTIPLIES_INT8 = cpu_multiplies_int8()  # asked once: torch.compile cannot trace a cache


def _int8_product_takes(rows: Tensor, right: Tensor) -> bool:
    if rows.numel() == 0 or right.numel() == 0 or transformed():  # vmap would run it row by row
        return False
    if rows.device.type == "cpu":
        # Of a single input torch 2.13 leaves the sums uninitialised.
        return rows.shape[1] > 1 and (CPU_MULTIPLIES_INT8 or rows.shape[1] >= EXACT_SUMS)
    fits = rows.shape[0] > 16 and rows.shape[1] % 8 == 0 and right.shape[0] % 8 == 0
    return rows.device.type == "cuda" and fits
