"""Whole models that scripts/benchmarks/bench_inference.py times: binary ones against the stock model of the same size.

Weights are random: they do not change how long a product takes. What could, is scattered (`scatter_`).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from inference_cases import Call, Case, Contest, Ours, float_forms, given_to, scatter_
from inference_memory import resident_bytes
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel, ResNetForImageClassification, ViTForImageClassification

from hf_bnn import (
    BinaryBertModel,
    BinaryResNetForImageClassification,
    BinaryViTForImageClassification,
    optimize_,
    pack_,
)
from hf_bnn.nn.attention import BinaryAttention
from hf_bnn.nn.packed import PackedConv2d, PackedLinear

LINEARS, FFN, ALL, WEIGHTS = TRANSFORMER = ("linears", "ffn", "all", "w1a32")
PACKED_LAYERS = (PackedLinear, PackedConv2d)


class Variant:
    """The binary parts of a model, as config fields, and whether the packed model is optimized."""

    def __init__(self, optimize: bool = True, **fields: Any):
        self.optimize, self.fields = optimize, fields


VARIANTS = {
    LINEARS: Variant(optimize=False, attention="float"),  # every linear layer on its own
    FFN: Variant(attention="float"),  # one product for query, key and value; the hidden layer stays bits
    ALL: Variant(attention="binary"),  # and both attention products
    WEIGHTS: Variant(binarize="weights"),
    "": Variant(),
    "reactnet": Variant(levels="rsign", block_activation="rprelu"),
}


@dataclass(frozen=True, eq=False)
class Family:
    """A network of one size."""

    name: str
    stock: type[PreTrainedModel]
    binary: type[PreTrainedModel]
    size: dict[str, Any] = field(default_factory=dict)

    @property
    def reads_text(self) -> bool:
        return self.stock is BertModel

    @property
    def convolves(self) -> bool:
        return self.stock is ResNetForImageClassification

    def inputs(self, batch: int, tokens: int | None = None) -> dict[str, Tensor]:
        """A batch of sentences without padding, as from a tokenizer, or of images."""
        if self.reads_text:
            ids = torch.randint(1, self.config_of(self.stock).vocab_size, (batch, tokens))
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        size = getattr(self.config_of(self.stock), "image_size", 224)
        return {"pixel_values": torch.randn(batch, 3, size, size)}

    def config_of(self, model: type[PreTrainedModel], **fields: Any) -> Any:
        return model.config_class(**self.size, **fields)

    def case(self, batch: int, tokens: int | None = None, variants: tuple[str, ...] = (LINEARS, FFN, ALL)) -> Case:
        """A row for each variant: `bert_base_s128_b1_all`."""
        parts = (self.name, f"s{tokens}" if tokens else "", f"b{batch}")
        names = {"_".join(filter(None, (*parts, variant))): variant for variant in variants}

        def make(wanted: tuple[str, ...]) -> Contest:
            inputs = self.inputs(batch, tokens)
            ours = {}
            for name in wanted:
                packed, model = binary_forms(self, names[name])
                ours[name] = Ours(call_of(model, inputs), binary_macs(packed, inputs))
            forms = stock_forms(self).items()
            given = {form: {key: given_to(form, x) for key, x in inputs.items()} for form, _ in forms}
            return Contest(ours, {form: call_of(model, given[form]) for form, model in forms})

        return Case(tuple(names), make)


BERT_BASE = Family("bert_base", BertModel, BinaryBertModel)
MINILM = Family(
    *("minilm", BertModel, BinaryBertModel),
    {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
)
VIT = Family("vit_b16", ViTForImageClassification, BinaryViTForImageClassification, {"num_labels": 1000})
RESNET18 = Family(
    *("resnet18", ResNetForImageClassification, BinaryResNetForImageClassification),
    {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "num_labels": 1000},
)
RESNET50 = Family("resnet50", ResNetForImageClassification, BinaryResNetForImageClassification, {"num_labels": 1000})


def model_cases() -> Iterator[Case]:
    """Batches and lengths of five networks. Rows of the same network follow each other: it is made once."""
    for batch, tokens in ((1, 32), (8, 32), (1, 128), (8, 128), (1, 384), (1, 512)):
        yield BERT_BASE.case(batch, tokens)
    for tokens in (1, 128):  # one token: the products of a decoder's step
        yield BERT_BASE.case(1, tokens, variants=(WEIGHTS,))
    for batch in (1, 32):
        yield MINILM.case(batch, 64)
    for batch in (1, 8):
        yield VIT.case(batch)
    for batch in (1, 8):
        yield RESNET18.case(batch, variants=("", "reactnet"))
    for batch in (1, 8):
        yield RESNET50.case(batch, variants=("",))


@lru_cache(maxsize=1)
def stock_forms(family: Family) -> dict[str, nn.Module]:
    """The stock model in torch's precisions. A ResNet has hardly a linear layer to quantize."""
    model = scatter_(family.stock(family.config_of(family.stock)).eval())
    return float_forms(model, int8=not family.convolves, layouts=family.convolves)


@lru_cache(maxsize=len(TRANSFORMER))
def binary_forms(family: Family, variant: str) -> tuple[nn.Module, nn.Module]:
    """(plain packed model, the model that is timed)."""
    chosen = VARIANTS[variant]
    model = family.binary(family.config_of(family.binary, **chosen.fields))
    packed = pack_(scatter_(model))
    return packed, optimize_(copy.deepcopy(packed)) if chosen.optimize else packed


def call_of(model: nn.Module, inputs: dict[str, Tensor]) -> Call:
    return lambda: model(**inputs)


def binary_macs(packed: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Multiply-accumulates of bits by bits in a call of a plain packed model."""
    total = 0

    def count(module: nn.Module, given: tuple, y: Tensor | tuple) -> None:
        nonlocal total
        if isinstance(module, BinaryAttention):
            query, key = given[:2]
            total += 2 * query.numel() * key.shape[2]
        elif module.binary_inputs:
            total += y.numel() * module.weight.shape[2:].numel() * weights_per_tap(module)

    layers = [m for m in packed.modules() if isinstance(m, (*PACKED_LAYERS, BinaryAttention))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        packed(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def weights_per_tap(layer: PackedLinear | PackedConv2d) -> int:
    """The number of inputs of an output at one position."""
    return layer.in_features if isinstance(layer, PackedLinear) else layer.in_channels // layer.groups


def encoder_memory(family: Family = BERT_BASE) -> dict[str, float]:
    """Bytes of the tensors of a BERT's encoder after a call, including caches."""
    packed, optimized = binary_forms(family, FFN)
    models = {f"{family.name}_encoder_fp32": stock_forms(family)["fp32"], "packed": packed, "optimized": optimized}
    inputs = family.inputs(1, 8)
    for model in models.values():
        model(**inputs)
    found = {f"{name}_bytes": resident_bytes(model.encoder) for name, model in models.items()}
    return {**found, "ratio": found[f"{family.name}_encoder_fp32_bytes"] / found["optimized_bytes"]}
