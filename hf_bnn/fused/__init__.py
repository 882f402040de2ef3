"""Makes packed models fast, in place: weights laid out for kernels, and products fused with their neighbours."""

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


# How to fuse a module of exactly this class, once its children are fused. Model families add their blocks with
# the decorator `registry.fuses`.
FUSERS |= {
    PackedLinear: KernelLinear.replace_class,
    PackedConv2d: _take_conv2d,
    BinaryAttention: fuse_attention,
    BooleanAttention: fuse_attention,
}


def optimize_(model: nn.Module) -> nn.Module:
    """Make a packed model fast, in place, for inference.

    Attention of BERT and ViT computes queries, keys and values in one product, and its binary products run on bits.
    The hidden values of a feed-forward block stay bits. ResNet blocks run channels last, with normalization, shortcut
    and sign in one pass. Results equal those of the packed model bit for bit. The exception is weights-only layers,
    which add floats in another order. `unpack_` undoes the change.

    Each weight is held once, in the layout of this machine's kernels; without kernels, as int8 signs in a fourth of
    the memory of float32. The state dict is that of the packed model, and so is what is saved. Move the model to its
    device before the call.

    Later writes to parameters take effect, also through `.data` and numpy: layers whose tensors other code has read
    compare them in each call, which takes a few microseconds. Programs made by torch.compile or torch.export keep the
    values from when they were made.

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
