"""Packed models made fast, in place: kernels' own layouts, and products fused with what is around them."""

from torch import nn

from ..nn.attention import BinaryAttention, BooleanAttention
from ..nn.packed import PackedConv2d, PackedLinear, is_packed
from .attention import fuse_attention
from .base import Fused
from .layers import KernelConv2d, KernelLinear
from .registry import FUSERS


def _take_conv2d(layer: PackedConv2d) -> None:
    if layer.binary_inputs and layer.has_kernel:
        KernelConv2d.replace_class(layer)


# Model families add their blocks, with the decorator `registry.fuses`.
FUSERS |= {
    PackedLinear: KernelLinear.replace_class,
    PackedConv2d: _take_conv2d,
    BinaryAttention: fuse_attention,
    BooleanAttention: fuse_attention,
}


def optimize_(model: nn.Module) -> nn.Module:
    """Make a packed model fast, in place, for inference: it computes what it did, and is saved as the packed model.

    BERT's and ViT's attention makes queries, keys and values in one product, and its binary products run on bits;
    hidden values of a feed-forward block stay bits; ResNet's blocks run channels last, with normalization, shortcut
    and sign in one pass. Results equal the packed model's, bit for bit, but for weights-only layers, whose float
    sums are added in another order. `unpack_` undoes it.

    Each weight is held once, laid out for this machine's kernels (without any, as int8 signs, in a fourth of
    float32's memory); a state dict has the checkpoint's bits again. Move the model to its device first.

    Whatever is written to its parameters is seen, through `.data` and numpy as well: layers whose tensors someone has
    looked up compare them in each call, which takes a few microseconds. A program that torch.compile or torch.export
    has made keeps the values that it was made with.

    Raises ValueError if nothing in `model` is packed.

    >>> from hf_bnn import binarize_, pack_
    >>> model = optimize_(pack_(binarize_(nn.Sequential(nn.Linear(8, 8)))))
    >>> model.state_dict()["0.weight"].shape
    torch.Size([8, 1])
    """
    if not is_packed(model):
        raise ValueError(
            f"nothing to optimize: {type(model).__name__} has no packed layer. Call hf_bnn.pack_(model) first, which "
            "replaces the weights by their bits"
        )
    for module in reversed(list(model.modules())):
        fuse = FUSERS.get(type(module))
        if fuse is not None:
            fuse(module)
    return model.eval()


def restore_(model: nn.Module) -> nn.Module:
    """Undo `optimize_`, in place."""
    for module in list(model.modules()):
        if isinstance(module, Fused):
            module.restore()
    return model
