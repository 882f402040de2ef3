"""Binary BERT: what is binarized, the three kinds of checkpoints, sizes, and the padding mask."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import SIZE, tiny_batch, tiny_config, tiny_float_bert, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, RobertaConfig

from hf_bnn import BinaryBertConfig, BinaryBertForSequenceClassification, pack_, summary
from hf_bnn.nn.attention import BinaryMatmul
from hf_bnn.nn.embeddings import BinaryEmbedding, Int8Embedding
from hf_bnn.nn.layers import BinaryLinear, binary_layers
from hf_bnn.nn.levels import ElasticLevels, SignedLevels, UnsignedLevels
from hf_bnn.nn.packed import PackedLinear

VARIANTS = [
    {},
    {"embeddings": "float"},
    {"embeddings": "binary"},
    {"attention": "binary"},
    {"attention": "boolean"},
    {"binarize": "weights"},
    {"binarize": "activations"},
    {"levels": "signed", "ffn_levels": "unsigned"},
    {"skip": ["classifier", "*pooler*", "*.1.*"]},
]


@torch.no_grad()
def logits(model: nn.Module, **changes) -> torch.Tensor:
    batch = {**tiny_batch(), **changes}
    return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_float_latent_and_packed_checkpoints_come_through_the_same_call(tmp_path, variant):
    tiny_float_bert().save_pretrained(tmp_path / "float")
    latent = BinaryBertForSequenceClassification.from_pretrained(tmp_path / "float", **variant)
    assert torch.equal(latent.bert.encoder.layer[0].attention.self.query.weight, float_query(tmp_path))
    expected = logits(latent)
    latent.save_pretrained(tmp_path / "latent")
    again = BinaryBertForSequenceClassification.from_pretrained(tmp_path / "latent")
    assert torch.equal(logits(again), expected)
    pack_(latent)
    assert torch.equal(logits(latent), expected)
    latent.save_pretrained(tmp_path / "packed")
    for auto in (AutoModelForSequenceClassification, BinaryBertForSequenceClassification):
        packed = auto.from_pretrained(tmp_path / "packed")
        assert torch.equal(logits(packed), expected)
        assert packed.state_dict().keys() == latent.state_dict().keys()


def float_query(folder: Path) -> torch.Tensor:
    return load_file(folder / "float" / "model.safetensors")["bert.encoder.layer.0.attention.self.query.weight"]


def test_the_recipe_puts_each_layer_on_its_levels():
    model = tiny_model(attention="binary")
    linear = {name: m for name, m in model.named_modules() if isinstance(m, BinaryLinear)}
    assert len(linear) == 12
    assert not [name for name in linear if "pooler" in name or "classifier" in name]
    for name, layer in linear.items():
        down = name.endswith("output.dense") and "attention" not in name
        assert isinstance(layer.input_levels, ElasticLevels)
        assert layer.input_levels.signed is not down
    products = [m for m in binary_layers(model) if isinstance(m, BinaryMatmul)]
    assert len(products) == 4
    assert isinstance(model.bert.embeddings.word_embeddings, Int8Embedding)
    plain = tiny_model(levels="signed", ffn_levels="unsigned")
    kinds = {type(layer.input_levels) for layer in binary_layers(plain)}
    assert kinds == {SignedLevels, UnsignedLevels}


def test_binary_embeddings_take_positions_and_pooler_along():
    model = tiny_model(embeddings="binary")
    assert isinstance(model.bert.embeddings.word_embeddings, BinaryEmbedding)
    assert isinstance(model.bert.embeddings.position_embeddings, BinaryEmbedding)
    assert isinstance(model.bert.pooler.dense, BinaryLinear)


def test_the_packed_file_holds_bits_under_the_key_weight(tmp_path):
    model = tiny_model()
    latent = model.bert.encoder.layer[0].intermediate.dense.weight.detach().clone()
    pack_(model).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["bert.encoder.layer.0.intermediate.dense.weight"]
    assert (stored.dtype, stored.shape) == (torch.uint8, (64, 4))
    bits = (stored.unsqueeze(-1) >> torch.arange(8)) & 1  # little-endian, bit 1 = negative
    assert torch.equal(bits.flatten(1).bool(), latent < 0)
    assert isinstance(model.bert.encoder.layer[0].intermediate.dense, PackedLinear)


def test_the_config_round_trips_and_the_automatic_exclude_list_is_stored(tmp_path):
    config = tiny_config(attention="binary", embeddings="binary", method={"name": "ste", "clip": 1.0})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["exclude"] == ["classifier", "cls.*", "qa_outputs"]
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is BinaryBertConfig
    assert again.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}


@pytest.mark.parametrize("field", ["binarize", "attention", "embeddings", "levels", "ffn_levels"])
def test_a_wrong_choice_is_refused_with_the_right_ones(field):
    with pytest.raises(ValueError, match=f"{field}='int3': expected one of "):
        tiny_config(**{field: "int3"})


def test_an_exclude_list_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"no layer outside exclude=\['\*'\] is one of \['Linear', 'Conv2d'\]"):
        tiny_model(exclude=["*"])


def test_another_architecture_is_refused(tmp_path):
    RobertaConfig(**SIZE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a 'roberta' model: BinaryBertConfig reads 'bert' .* 'hf_bnn_bert'"):
        BinaryBertForSequenceClassification.from_pretrained(tmp_path)


def test_a_float_config_is_refused_with_the_way_out():
    with pytest.raises(
        TypeError, match=r"takes a BinaryBertConfig, not a BertConfig: make one with BinaryBertConfig\("
    ):
        BinaryBertForSequenceClassification(BertConfig(**SIZE))
    config = BinaryBertConfig(**BertConfig(**SIZE).to_dict())
    assert config.model_type == "hf_bnn_bert"
    BinaryBertForSequenceClassification(config)


@pytest.mark.parametrize("attention", ["float", "binary", "boolean"])
def test_padding_changes_nothing(attention):
    model = tiny_model(attention=attention)
    ids = tiny_batch()["input_ids"]
    other = ids.clone()
    other[1::2, -2:] = 7  # under the mask
    assert torch.allclose(logits(model, input_ids=ids), logits(model, input_ids=other), atol=1e-6)
    seen = logits(model, attention_mask=torch.ones_like(ids), input_ids=other)
    assert not torch.allclose(logits(model, attention_mask=torch.ones_like(ids)), seen, atol=1e-6)


def test_a_new_head_on_a_latent_checkpoint_is_made_and_nothing_else(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = BinaryBertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == 5


def test_weights_only_training_goes_on_with_binary_inputs(tmp_path):
    tiny_model(binarize="weights").save_pretrained(tmp_path)
    model = BinaryBertForSequenceClassification.from_pretrained(tmp_path, binarize="both")
    levels = [layer.input_levels for layer in binary_layers(model)]
    assert all(level.width == 1.0 and level.fresh for level in levels)


def test_fresh_levels_start_at_their_initial_values_not_in_uninitialised_memory(tmp_path):
    tiny_float_bert().save_pretrained(tmp_path)
    model = BinaryBertForSequenceClassification.from_pretrained(tmp_path, attention="binary")
    levels = [module for module in model.modules() if isinstance(module, ElasticLevels)]
    assert {(round(level.width.item(), 6), level.offset.item()) for level in levels} == {(1.0, 0.0), (0.1, 0.0)}
    model.save_pretrained(tmp_path / "latent")
    again = BinaryBertForSequenceClassification.from_pretrained(tmp_path / "latent")
    assert not any(module.fresh for module in again.modules() if isinstance(module, ElasticLevels))


def test_without_the_package_opening_is_a_clear_error(tmp_path):
    pack_(tiny_model()).save_pretrained(tmp_path)
    code = (
        "import sys\n"
        "from transformers import AutoModelForSequenceClassification\n"
        f"AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})\n"
        "print('hf_bnn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode != 0
    assert "hf_bnn_bert" in done.stderr
    assert "does not recognize this architecture" in done.stderr


# Sizes


def packed_bytes(config: BinaryBertConfig, folder: Path) -> tuple[int, nn.Module]:
    model = pack_(BinaryBertForSequenceClassification(config))
    model.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size, model


MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def test_a_bert_base_with_binary_embeddings_is_at_most_14_mebibytes(tmp_path):
    size, model = packed_bytes(BinaryBertConfig(embeddings="binary"), tmp_path)
    assert size <= 14 * 2**20
    assert summary(model).matrix_compression >= 31


def test_the_packed_minilm_is_6_times_smaller_with_int8_and_20_times_with_binary_embeddings(tmp_path):
    floats = sum(
        p.numel() * 4 for p in AutoModelForSequenceClassification.from_config(BertConfig(**MINILM)).parameters()
    )
    int8, model = packed_bytes(BinaryBertConfig(**MINILM), tmp_path / "int8")
    binary, _ = packed_bytes(BinaryBertConfig(embeddings="binary", **MINILM), tmp_path / "binary")
    assert floats / int8 >= 6
    assert floats / binary >= 20
    counts = summary(model)
    assert counts.matrix_bytes_bits * 32 == counts.matrix_bytes_float
    assert counts.matrix_compression >= 30


def test_the_summary_agrees_with_the_file_on_disk(tmp_path):
    _, model = packed_bytes(tiny_config(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    matrices = [name for name, value in stored.items() if value.dtype == torch.uint8]
    scales = sum(stored[f"{name}_scale"].nbytes for name in matrices)
    counts = summary(model)
    assert counts.matrix_bytes_packed == sum(stored[name].nbytes for name in matrices) + scales
    assert counts == summary(tiny_model())
    assert counts.weights - counts.binary_weights == sum(p.numel() for p in tiny_float_bert().parameters()) - sum(
        m.weight.numel() for m in binary_layers(tiny_model())
    )
