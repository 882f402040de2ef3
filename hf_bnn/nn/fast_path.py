"""torch's fast path for transformer encoders, which reads weights instead of calling layers."""

from torch import nn

from .layers import BinaryLayer
from .packed import PACKED


def leave_fast_path_(model: nn.Module) -> nn.Module:
    """Keep encoder layers of torch that hold binary layers off their fast path, in place: they then call each layer.

    In evaluation without gradients `nn.TransformerEncoderLayer` hands all its weights to one fused operation, and
    `nn.TransformerEncoder` makes nested tensors for it. Each checks one of its own attributes first. Copies, pickles
    and packed models keep these attributes.
    """
    binary = (BinaryLayer, *PACKED.values())
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) and any(
            isinstance(part, binary) for part in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0  # "neither ReLU nor GELU": the fused operation has only these
            else:
                module.use_nested_tensor = False
    return model
