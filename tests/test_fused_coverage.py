"""No family is optimized less than the others unnoticed: `optimize_` covers every block of every class of MODELS."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from tiny import SIZE, VIT_SIZE, scramble, tiny_batch, tiny_images
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

from hf_bnn import (
    BinaryBertConfig,
    BinaryBertForMultipleChoice,
    BinaryBertModel,
    BinaryResNetConfig,
    BinaryResNetModel,
    BinaryViTConfig,
    BinaryViTModel,
    optimize_,
    pack_,
)
from hf_bnn.fused.blocks import FusedFeedForward, FusedProjections
from hf_bnn.fused.convolutions import FusedBlock
from hf_bnn.fused.registry import FUSERS, fuses
from hf_bnn.models import MODELS
from hf_bnn.models.base import BinaryModelMixin
from hf_bnn.models.resnet import BiRealBasicLayer, BiRealBottleNeckLayer
from hf_bnn.nn.packed import PackedConv2d, PackedLinear
from hf_bnn.selection import covered

RESNET_SIZE = {"stem": "cifar", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
SIZES = {
    BinaryBertConfig: SIZE,
    BinaryViTConfig: VIT_SIZE,
    BinaryResNetConfig: RESNET_SIZE,
}
CLASSES = [cls for models in MODELS.values() for cls in models.values()]
CROSS_ATTENTION = {"is_decoder": True, "add_cross_attention": True}


def packed_model(cls: type[BinaryModelMixin], **settings) -> nn.Module:
    """A tiny packed model of the class; `settings` go to its config."""
    torch.manual_seed(0)
    return pack_(scramble(cls(cls.config_class(**{**SIZES[cls.config_class], **settings}))))


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    """A batch without labels."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": tiny_images()["pixel_values"]}
    batch = {key: value for key, value in tiny_batch().items() if key != "labels"}
    if isinstance(model, BinaryBertForMultipleChoice):
        return {key: value.view(2, 2, -1) for key, value in batch.items()}
    return batch


@torch.no_grad()
def layers_in_blocks(model: nn.Module, run: Callable[[], object]) -> dict[str, str]:
    """{name: kind of block} of every packed layer of binary inputs in a block, as `run()` of the packed model shows.

    - attention: linear layers that read the same tensor.
    - feed-forward: two linear layers in succession, of which the first widens and the second narrows again.
    - residual: every convolution.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, PackedLinear | PackedConv2d)}
    names = {module: name for module, name in names.items() if module.binary_inputs}
    read: dict[nn.Module, Tensor] = {}  # in the order of execution; tensors stay alive, so that identities differ
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: read.setdefault(layer, inputs[0])) for layer in names
    ]
    run()
    for hook in hooks:
        hook.remove()
    kinds = {names[layer]: "residual" for layer in read if isinstance(layer, PackedConv2d)}
    linear = [layer for layer in read if isinstance(layer, PackedLinear)]
    for layer in linear:
        if sum(read[other] is read[layer] for other in linear) > 1:
            kinds[names[layer]] = "attention"
    for first, second in pairwise(linear):
        sizes = (first.out_features, first.in_features)
        if sizes == (second.in_features, second.out_features) and sizes[0] > sizes[1]:
            kinds |= {names[first]: "feed-forward", names[second]: "feed-forward"}
    return kinds


def layers_in_fused_blocks(model: nn.Module) -> set[nn.Module]:
    """The layers of an optimized model that run as parts of a fused block."""
    found: set[nn.Module] = set()
    for block in model.modules():
        if isinstance(block, FusedProjections) and block.joined:
            found.update(block.projections())
        if isinstance(block, FusedFeedForward) and block.call is not None:
            found.update(layer for layer in block.layers() if isinstance(layer, nn.Module))
        if isinstance(block, FusedBlock):
            found.update(block.modules())
    return found


def left_unfused(model: nn.Module, run: Callable[[], object]) -> dict[str, str]:
    """{name: kind of block} of the layers that `optimize_`, in place, leaves outside fused blocks without a reason."""
    kinds = layers_in_blocks(model, run)
    assert kinds
    fused = layers_in_fused_blocks(optimize_(model))
    return {
        name: kind
        for name, kind in kinds.items()
        if model.get_submodule(name) not in fused and not covered(name, model.unfused)
    }


@pytest.mark.parametrize("cls", CLASSES)
def test_optimize_fuses_every_block_of_every_family(cls: type[BinaryModelMixin]):
    model = packed_model(cls)
    assert left_unfused(model, lambda: model(**batch_of(model))) == {}


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_optimize_fuses_both_kinds_of_residual_blocks(layer_type: str):
    model = packed_model(BinaryResNetModel, layer_type=layer_type)
    assert left_unfused(model, lambda: model(**batch_of(model))) == {}


def test_a_family_may_declare_what_stays_unfused(monkeypatch: pytest.MonkeyPatch):
    model = packed_model(BinaryBertModel, **CROSS_ATTENTION)
    batch = {**batch_of(model), "encoder_hidden_states": torch.randn(4, 3, SIZE["hidden_size"])}
    assert left_unfused(model, lambda: model(**batch)) == {}
    assert all(reason for cls in CLASSES for reason in cls.unfused.values())
    monkeypatch.setattr(BinaryBertModel, "unfused", {})
    model = packed_model(BinaryBertModel, **CROSS_ATTENTION)
    left = [f"encoder.layer.{i}.crossattention.self.{name}" for i in (0, 1) for name in ("key", "value")]
    assert left_unfused(model, lambda: model(**batch)) == dict.fromkeys(left, "attention")


@pytest.mark.parametrize(
    ("block", "cls", "layer_type", "kind", "layers"),
    [
        (BertSelfAttention, BinaryBertModel, None, "attention", 6),
        (BertLayer, BinaryBertModel, None, "feed-forward", 4),
        (ViTAttention, BinaryViTModel, None, "attention", 6),
        (ViTMLP, BinaryViTModel, None, "feed-forward", 4),
        (BiRealBasicLayer, BinaryResNetModel, "basic", "residual", 4),
        (BiRealBottleNeckLayer, BinaryResNetModel, "bottleneck", "residual", 6),
    ],
)
def test_a_block_that_no_family_registered_is_noticed(
    monkeypatch: pytest.MonkeyPatch, block: type, cls: type, layer_type: str | None, kind: str, layers: int
):
    monkeypatch.delitem(FUSERS, block)
    model = packed_model(cls, **({"layer_type": layer_type} if layer_type else {}))
    assert list(left_unfused(model, lambda: model(**batch_of(model))).values()) == [kind] * layers


def test_a_block_is_fused_by_one_class_only():
    with pytest.raises(ValueError, match="BertLayer already has a fused class: Other would replace it"):

        @fuses(BertLayer)
        class Other(FusedFeedForward, BertLayer): ...
