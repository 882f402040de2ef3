"""A text family of one's own takes few lines, and is loaded, packed, optimized and saved as BERT is: here ELECTRA."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from test_fused_coverage import SIZES, left_unfused
from tiny import SIZE, different, scramble, tiny_batch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, ElectraConfig, ElectraForMaskedLM, ElectraModel
from transformers.models.electra import modeling_electra
from transformers.models.electra.modeling_electra import ElectraEmbeddings, ElectraLayer, ElectraSelfAttention

from hf_bnn import optimize_, pack_
from hf_bnn.fused.registry import fuses
from hf_bnn.models import register
from hf_bnn.models.text import (
    POOLER,
    BinaryTextMixin,
    CheckedPositions,
    FusedTextAttention,
    FusedTextLayer,
    TextConfigFields,
)
from hf_bnn.nn.embeddings import Int8Embedding
from hf_bnn.nn.layers import binary_layers

# The family


class BinaryElectraConfig(TextConfigFields, ElectraConfig):
    model_type = "hf_bnn_electra"
    float_model_type = "electra"
    family_patterns: ClassVar = ("generator_*", "embeddings_project", *POOLER)


class CheckedElectraEmbeddings(CheckedPositions, ElectraEmbeddings): ...


class BinaryElectraMixin(BinaryTextMixin):
    config_class = BinaryElectraConfig
    attention_classes = (ElectraSelfAttention,)
    checked_embeddings: ClassVar = {ElectraEmbeddings: CheckedElectraEmbeddings}


@fuses(ElectraSelfAttention)
class FusedElectraSelfAttention(FusedTextAttention, ElectraSelfAttention):
    eager = staticmethod(modeling_electra.eager_attention_forward)


@fuses(ElectraLayer)
class FusedElectraLayer(FusedTextLayer, ElectraLayer): ...


class BinaryElectraModel(BinaryElectraMixin, ElectraModel): ...


class BinaryElectraForMaskedLM(BinaryElectraMixin, ElectraForMaskedLM): ...


# Its row of MODELS

ROW = (BinaryElectraConfig, {AutoModel: BinaryElectraModel, AutoModelForMaskedLM: BinaryElectraForMaskedLM})
register(*ROW)

# What it then does

ELECTRA_SIZE = {**SIZE, "embedding_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES[BinaryElectraConfig] = ELECTRA_SIZE
FLOAT = {BinaryElectraModel: ElectraModel, BinaryElectraForMaskedLM: ElectraForMaskedLM}
every_class = pytest.mark.parametrize(("auto", "cls"), ROW[1].items())


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    batch = {key: value for key, value in tiny_batch().items() if key != "labels"}
    return model.eval()(**batch)[0]


@every_class
@pytest.mark.parametrize("settings", [{}, {"embeddings": "binary", "attention": "binary"}], ids=["int8", "binary"])
def test_a_family_of_ones_own_goes_from_a_float_to_an_optimized_model(tmp_path: Path, auto, cls, settings: dict):
    torch.manual_seed(0)
    scramble(FLOAT[cls](ElectraConfig(**ELECTRA_SIZE))).save_pretrained(tmp_path / "float")
    latent, found = cls.from_pretrained(tmp_path / "float", output_loading_info=True, **settings)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert len(binary_layers(latent)) == 12 + 2 * 2 * ("attention" in settings)
    expected = output(scramble(latent))
    packed = pack_(latent)
    assert torch.equal(output(packed), expected)
    assert left_unfused(packed, lambda: output(packed)) == {}
    assert torch.equal(output(packed), expected)
    packed.save_pretrained(tmp_path / "packed")
    again = auto.from_pretrained(tmp_path / "packed")
    assert type(again) is cls
    assert not different(again.state_dict(), packed.state_dict())
    assert torch.equal(output(optimize_(again)), expected)


def test_its_word_table_is_rounded_once_for_encoder_and_output_layer():
    model = BinaryElectraForMaskedLM(BinaryElectraConfig(**ELECTRA_SIZE))
    table = model.electra.embeddings.word_embeddings
    assert type(table) is Int8Embedding
    assert torch.equal(model.generator_lm_head.weight, table.weight)
    assert [key for key in model.state_dict() if key.startswith("generator_lm_head")] == ["generator_lm_head.bias"]
    with pytest.raises(ValueError, match=r"makes 'generator_lm_head' binary, but .* add 'generator_\*'"):
        BinaryElectraForMaskedLM(BinaryElectraConfig(**ELECTRA_SIZE, embeddings="float", exclude=["*.dense"]))


def test_it_refuses_more_tokens_than_positions():
    model = BinaryElectraModel(BinaryElectraConfig(**ELECTRA_SIZE))
    with pytest.raises(ValueError, match="33 tokens are more than the 32 positions"):
        model(torch.ones(1, 33, dtype=torch.long))
