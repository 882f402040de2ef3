"""BinaryConfig: any architecture through from_pretrained(quantization_config=...), trained, packed and reloaded."""

import copy
import json
import pickle
import re
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_trainer import arguments, rows
from tiny import tiny_batch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForObjectDetection,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.trainer_utils import set_seed

from hf_bnn import BinaryConfig, BinaryTrainer, Surge, calibrate_, install_method, pack_, unpack_
from hf_bnn.integrity import CorruptCheckpointError
from hf_bnn.nn.layers import binary_layers
from hf_bnn.nn.levels import ElasticLevels, SignedLevels
from hf_bnn.nn.packed import is_packed
from hf_bnn.training import parameter_roles

WEIGHTS = "model.safetensors"
TEXT = {"vocab_size": 64, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 64, "dropout": 0.0}
BACKBONE = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
DETR = {
    "backbone_config": BACKBONE,
    "d_model": 32,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    "num_queries": 4,
}


def images(size: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))}


def sentences(**labels: Any) -> dict[str, Any]:
    batch = tiny_batch(4)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **labels}


CLASSES = {"labels": torch.tensor([0, 1, 0, 1])}
TOKENS = {"labels": tiny_batch(4)["input_ids"]}
BOXES = {"labels": [{"class_labels": torch.tensor([i % 2]), "boxes": torch.full((1, 4), 0.4)} for i in range(4)]}


class Case(NamedTuple):
    """An architecture without a binary class, a batch for it, and its layers that follow a ReLU or stay float."""

    auto: type
    model: type[PreTrainedModel]
    config: Any
    batch: dict[str, Any]
    float_layers: list[str]  # the expected automatic `exclude`
    unsigned: list[str] | None = None

    def make(self) -> PreTrainedModel:
        """A random float model; its batch normalizations know the batch."""
        model = self.model(copy.deepcopy(self.config)).train()
        with torch.no_grad():
            for _ in range(30 * any(isinstance(module, nn.BatchNorm2d) for module in model.modules())):
                model(pixel_values=self.batch["pixel_values"])
        return model.eval()

    def binary(self, folder, **kwargs: Any) -> PreTrainedModel:
        """A float checkpoint, saved and loaded as a latent binary model."""
        self.make().save_pretrained(folder / "float")
        structure = {"unsigned": self.unsigned, **kwargs}
        return self.auto.from_pretrained(folder / "float", quantization_config=BinaryConfig(**structure))

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> torch.Tensor:
        return model.eval()(**{key: value for key, value in self.batch.items() if key != "labels"}).logits


CASES = {
    "mobilenet_v2": Case(
        AutoModelForImageClassification,
        MobileNetV2ForImageClassification,
        MobileNetV2Config(depth_multiplier=0.25, image_size=32, finegrained_output=False),
        {**images(32), **CLASSES},
        ["mobilenet_v2.conv_stem.first_conv.convolution", "classifier"],
        unsigned=["*conv_3x3", "*reduce_1x1"],
    ),
    "deit": Case(
        AutoModelForImageClassification,
        DeiTForImageClassification,
        DeiTConfig(image_size=16, patch_size=8, **SIZE),
        {**images(16), **CLASSES},
        ["deit.embeddings.patch_embeddings.projection", "classifier"],
    ),
    "distilbert": Case(
        AutoModelForSequenceClassification,
        DistilBertForSequenceClassification,
        DistilBertConfig(**DISTILBERT),
        sentences(**CLASSES),
        ["pre_classifier", "classifier"],
    ),
    "roberta": Case(
        AutoModelForSequenceClassification,
        RobertaForSequenceClassification,
        RobertaConfig(**TEXT, **SIZE),
        sentences(**CLASSES),
        ["classifier.dense", "classifier.out_proj"],
    ),
    "roberta_lm": Case(
        AutoModelForMaskedLM,
        RobertaForMaskedLM,
        RobertaConfig(**TEXT, **SIZE),
        sentences(**TOKENS),
        ["lm_head.dense", "lm_head.decoder"],
    ),
    "detr": Case(
        AutoModelForObjectDetection,
        DetrForObjectDetection,
        DetrConfig(**DETR),
        {**images(32), **BOXES},
        ["model.backbone.model.embedder.embedder.convolution", "class_labels_classifier"]
        + [f"bbox_predictor.layers.{i}" for i in range(3)],
        unsigned=["*backbone*"],
    ),
    "yolos": Case(
        AutoModelForObjectDetection,
        YolosForObjectDetection,
        YolosConfig(image_size=[16, 16], patch_size=8, num_detection_tokens=3, **SIZE),
        {**images(16), **BOXES},
        ["vit.embeddings.patch_embeddings.projection"]
        + [f"{head}.layers.{i}" for head in ("class_labels_classifier", "bbox_predictor") for i in range(3)],
    ),
    "llama": Case(
        AutoModelForCausalLM,
        LlamaForCausalLM,
        LlamaConfig(**TEXT, **SIZE, num_key_value_heads=1, tie_word_embeddings=True),
        sentences(**TOKENS),
        ["lm_head"],
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def distilbert(folder, **kwargs: Any) -> PreTrainedModel:
    return CASES["distilbert"].binary(folder, **kwargs)


def stored(folder) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# Every architecture


def test_what_stays_float_by_default_is_settled_and_stored(case, tmp_path):
    model = case.binary(tmp_path)
    assert model.config.quantization_config.exclude == case.float_layers
    kept = {name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}
    assert kept == set(case.float_layers)
    model.save_pretrained(tmp_path)
    assert stored(tmp_path)["exclude"] == case.float_layers


def test_a_float_checkpoint_is_trained_packed_and_reloaded_bit_for_bit(case, tmp_path):
    model = case.binary(tmp_path)
    calibrate_(model, lambda: case.logits(model)).train()
    latent = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(**case.batch).loss.backward()
    optimizer.step()
    weights = {id(p) for p in parameter_roles(model).latent}
    assert weights
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, latent[name])}
    assert {name for name, p in model.named_parameters() if id(p) in weights} <= moved

    expected = case.logits(model)
    model.save_pretrained(tmp_path / "latent")
    again = case.auto.from_pretrained(tmp_path / "latent")
    assert torch.equal(case.logits(again), expected)
    assert len(binary_layers(again)) == len(binary_layers(model))

    pack_(again).save_pretrained(tmp_path / "packed")
    assert torch.equal(case.logits(again), expected)
    packed = case.auto.from_pretrained(tmp_path / "packed")
    assert is_packed(packed)
    assert not binary_layers(packed)
    assert torch.equal(case.logits(packed), expected)
    assert [stored(tmp_path / name)["weight_format"] for name in ("latent", "packed")] == ["latent", "packed"]


def test_training_lowers_the_loss(case, tmp_path):
    model = case.binary(tmp_path).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        loss = model(**case.batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0]


def test_llama_generates_the_same_from_packed_weights(tmp_path):
    case = CASES["llama"]
    model = case.binary(tmp_path)
    calibrate_(model, lambda: case.logits(model))
    ids = case.batch["input_ids"][:1]
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    pack_(model).save_pretrained(tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(packed.generate(ids, attention_mask=torch.ones_like(ids), **settings), expected)
    assert expected.shape[1] > ids.shape[1]


# The config


def test_the_config_survives_json(tmp_path):
    given = {"binarize": "weights", "levels": "signed", "weight_scaling": "layer", "include": ["*attention*"]}
    model = distilbert(tmp_path, **given, exclude=["*.out_lin"])
    model.save_pretrained(tmp_path)
    again = DistilBertForSequenceClassification.from_pretrained(tmp_path).config.quantization_config
    assert isinstance(again, BinaryConfig)
    assert again.to_dict() == model.config.quantization_config.to_dict()
    assert {key: getattr(again, key) for key in given} == given
    assert {layer.binarize for layer in binary_layers(model)} == {"weights"}
    assert [name.split(".")[-1] for name, m in model.named_modules() if m in binary_layers(model)] == [
        *("q_lin", "k_lin", "v_lin")
    ] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"binarize": "all"}, "binarize='all': expected one of both, weights, activations"),
        ({"levels": "ternary"}, "levels='ternary': expected one of elastic, signed"),
        ({"weight_scaling": "row"}, "weight_scaling='row': expected one of channel, layer, none"),
        ({"weight_format": "float"}, "weight_format='float': expected one of latent, packed"),
        ({"quant_method": "bnb"}, "quant_method='bnb': expected one of hf_bnn"),
        ({"exclude": "lm_head"}, r"exclude='lm_head': expected a list of patterns, as in exclude=\['lm_head', "),
        ({"include": [1]}, r"include=\[1\]: expected a list of patterns"),
    ],
)
def test_a_wrong_value_is_named_with_the_choices(settings, message):
    with pytest.raises(ValueError, match=message):
        BinaryConfig(**settings)


def test_unknown_keys_of_a_stored_config_are_refused(tmp_path):
    distilbert(tmp_path).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["groups"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unknown keys \['groups'\]: this hf_bnn knows .* Upgrade hf_bnn if a newer"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"exclude": ["clasifier"]},
            r"the exclude pattern 'clasifier' matches no module .* nearest are \['classifier'",
        ),
        ({"include": ["*LayerNorm"]}, r"the include pattern '\*LayerNorm' matches no nn.Linear or nn.Conv2d of Distil"),
        ({"unsigned": ["nowhere"]}, "the unsigned pattern 'nowhere' matches no nn.Linear"),
        ({"exclude": ["*"]}, r"nothing to binarize in DistilBertForSequenceClassification: .*exclude=\['\*'\]"),
        (
            {"weight_format": "packed"},
            r"weight_format='packed' says .* leave it out, train the model, and call hf_bnn\.p",
        ),
    ],
)
def test_patterns_and_formats_that_do_not_fit_the_model_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        distilbert(tmp_path, **settings)


def test_a_pattern_covers_what_is_in_a_module_with_or_without_the_prefix(tmp_path):
    for pattern in ("distilbert.transformer.layer.0", "transformer.layer.0", "*.layer.0.*"):
        model = distilbert(tmp_path, include=[pattern])
        assert len(binary_layers(model)) == 6


def test_patterns_can_make_layers_unsigned_and_a_head_binary(tmp_path):
    model = distilbert(tmp_path, unsigned=["*.lin2"], exclude=[])
    assert not model.distilbert.transformer.layer[0].ffn.lin2.input_levels.signed
    assert model.distilbert.transformer.layer[0].ffn.lin1.input_levels.signed
    assert model.classifier in binary_layers(model)
    model = distilbert(tmp_path, levels="signed")
    assert type(model.distilbert.transformer.layer[0].ffn.lin1.input_levels) is SignedLevels


def test_a_config_can_be_used_for_several_models(tmp_path):
    config = BinaryConfig()
    for case in (CASES["distilbert"], CASES["deit"]):
        case.make().save_pretrained(tmp_path)
        model = case.model.from_pretrained(tmp_path, quantization_config=config)
        assert model.config.quantization_config.exclude == case.float_layers
        BinaryConfig.apply_(config, case.make())
    assert config.exclude is None


def test_a_model_of_other_layers_is_refused_with_their_kinds(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, **TEXT)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"nothing to binarize in GPT2LMHeadModel: .*cannot be binary, are .*'Conv1D': 4"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BinaryConfig())


def reflecting() -> PreTrainedModel:
    model = CASES["mobilenet_v2"].make()
    model.mobilenet_v2.conv_1x1.convolution.padding_mode = "reflect"
    return model


def test_a_layer_that_cannot_be_binary_stays_float_or_is_named():
    model = BinaryConfig().apply_(reflecting())
    assert "mobilenet_v2.conv_1x1.convolution" in model.config.quantization_config.exclude
    named = (
        r"'mobilenet_v2\.conv_1x1\.convolution' cannot be binary: padding_mode='reflect'.* Add 'mob.*tion' to exclude"
    )
    with pytest.raises(ValueError, match=named):
        BinaryConfig(exclude=["classifier"]).apply_(reflecting())


def test_a_binary_model_is_not_made_binary_again():
    model = BinaryConfig().apply_(CASES["distilbert"].make())
    with pytest.raises(
        ValueError, match="DistilBertForSequenceClassification is binary already: leave BinaryConfig out"
    ):
        BinaryConfig().apply_(model)


def test_a_model_in_memory_becomes_what_loading_makes_of_it(tmp_path):
    case = CASES["distilbert"]
    loaded = case.binary(tmp_path)
    applied = BinaryConfig().apply_(case.auto.from_pretrained(tmp_path / "float"))
    assert torch.equal(case.logits(applied), case.logits(loaded))
    applied.save_pretrained(tmp_path / "latent")
    assert torch.equal(case.logits(case.auto.from_pretrained(tmp_path / "latent")), case.logits(loaded))


def test_a_model_without_memory_can_be_made_binary():
    with torch.device("meta"):
        model = BinaryConfig().apply_(CASES["distilbert"].make())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(binary_layers(model)) == 12


# Loading


def test_levels_are_initialised_and_not_reported_missing(tmp_path):
    CASES["distilbert"].make().save_pretrained(tmp_path)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=BinaryConfig(), output_loading_info=True
    )
    assert (set(report["missing_keys"]), set(report["unexpected_keys"])) == (set(), set())
    levels = [module for module in model.modules() if isinstance(module, ElasticLevels)]
    assert {(level.width.item(), level.offset.item(), level.fresh) for level in levels} == {(1.0, 0.0, True)}
    model.save_pretrained(tmp_path / "latent")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "latent")
    assert not any(module.fresh for module in again.modules() if isinstance(module, ElasticLevels))


def drop(folder, change) -> None:
    """Alter the tensors of a saved model, and forget their digests."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weights_sha256"] = None
    (folder / "config.json").write_text(json.dumps(config))


LIN1 = "distilbert.transformer.layer.0.ffn.lin1"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("key", [f"{LIN1}.weight", f"{LIN1}.bias", "distilbert.embeddings.LayerNorm.weight"])
def test_a_missing_or_misshapen_tensor_is_refused_and_never_random(tmp_path, packed, key):
    model = distilbert(tmp_path)
    for change in (lambda tensors: tensors.pop(key), lambda tensors: tensors.update({key: tensors[key][:-1].clone()})):
        (pack_(copy.deepcopy(model)) if packed else model).save_pretrained(tmp_path)
        drop(tmp_path, change)
        with pytest.raises(
            CorruptCheckpointError, match=f"lacks '{re.escape(key)}' and 0 more tensors .*save it again"
        ):
            AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_missing_scale_of_packed_weights_is_refused(tmp_path):
    pack_(distilbert(tmp_path)).save_pretrained(tmp_path)
    drop(tmp_path, lambda tensors: tensors.pop(f"{LIN1}.weight_scale"))
    with pytest.raises(CorruptCheckpointError, match=f"the packed checkpoint .* lacks '{LIN1}.weight_scale'"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


T5_BATCH = {"input_ids": tiny_batch()["input_ids"], "decoder_input_ids": tiny_batch()["input_ids"]}


def t5(folder, **kwargs: Any) -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(folder)
    return AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=BinaryConfig(**kwargs))


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_tensors_that_are_tied_are_not_missing(tmp_path, packed):
    model = t5(tmp_path)
    assert "encoder.embed_tokens.weight" in model.all_tied_weights_keys
    expected = model(**T5_BATCH).logits
    (pack_(model) if packed else model).save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again")(**T5_BATCH).logits, expected)


@torch.no_grad()
def test_inputs_that_the_model_casts_to_the_dtype_of_packed_weights_are_refused(tmp_path):
    model = t5(tmp_path, exclude=["lm_head"])
    model(**T5_BATCH)
    with pytest.raises(
        TypeError, match=r"given torch\.uint8 inputs: perhaps the model casts them .* leave that layer float"
    ):
        pack_(model)(**T5_BATCH)


def test_an_altered_weight_file_is_refused(tmp_path):
    pack_(distilbert(tmp_path)).save_pretrained(tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (tmp_path / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(CorruptCheckpointError, match="is truncated or was altered after it was saved"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_without_digests_a_truncated_file_is_still_one_clear_error(tmp_path):
    distilbert(tmp_path).save_pretrained(tmp_path)
    drop(tmp_path, lambda tensors: None)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors cannot be read .*: fetch or save it again"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_another_head_takes_the_binary_encoder_and_gets_a_float_head(tmp_path, packed):
    model = CASES["roberta_lm"].binary(tmp_path)
    (pack_(model) if packed else model).save_pretrained(tmp_path)
    other = RobertaForSequenceClassification.from_pretrained(tmp_path)
    batch = CASES["roberta"].batch
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert type(other.classifier.dense) is nn.Linear
    bare = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    with torch.no_grad():
        expected = model.eval().roberta(**inputs).last_hidden_state
        assert torch.equal(other.roberta(**inputs).last_hidden_state, expected)
        assert torch.equal(bare(**inputs).last_hidden_state, expected)
    other.save_pretrained(tmp_path / "other")
    again = RobertaForSequenceClassification.from_pretrained(tmp_path / "other")
    assert torch.equal(CASES["roberta"].logits(again), CASES["roberta"].logits(other))


@pytest.mark.parametrize("packed", [False, True])
def test_loading_in_bfloat16_and_on_a_device_map_agrees_with_the_model_that_was_saved(tmp_path, packed):
    case = CASES["distilbert"]
    model = case.binary(tmp_path)
    model.save_pretrained(tmp_path / "latent")
    expected = case.logits(model)
    pack_(model).save_pretrained(tmp_path / "packed")
    folder = tmp_path / ("packed" if packed else "latent")
    for device_map in ("auto", "cpu", {"": "cpu"}):
        assert torch.equal(case.logits(case.auto.from_pretrained(folder, device_map=device_map)), expected)
    half = case.auto.from_pretrained(folder, dtype=torch.bfloat16)
    logits = case.logits(half)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    half.save_pretrained(tmp_path / "half")
    assert torch.equal(case.logits(case.auto.from_pretrained(tmp_path / "half", dtype="auto")), logits)
    if not packed:
        assert torch.equal(case.logits(pack_(half)), logits)
        half.save_pretrained(tmp_path / "half")
        assert torch.equal(case.logits(case.auto.from_pretrained(tmp_path / "half", dtype="auto")), logits)


@pytest.mark.parametrize("packed", [False, True])
def test_layers_can_be_offloaded_unless_their_levels_are_learned(tmp_path, packed):
    case = CASES["distilbert"]
    place = dict.fromkeys(["distilbert.embeddings", "pre_classifier", "classifier"], "cpu")
    place |= {"distilbert.transformer.layer.0": "disk", "distilbert.transformer.layer.1": "cpu"}
    for levels in ("signed", "elastic"):
        model = case.binary(tmp_path, levels=levels)
        expected = case.logits(model)
        (pack_(model) if packed else model).save_pretrained(tmp_path / levels)
        settings = {"device_map": place, "offload_folder": str(tmp_path / "offloaded")}
        if levels == "signed":
            assert torch.equal(case.logits(case.auto.from_pretrained(tmp_path / levels, **settings)), expected)
        else:
            with pytest.raises(ValueError, match=r"learned levels cannot be offloaded .* levels='signed'"):
                case.auto.from_pretrained(tmp_path / levels, **settings)


def test_another_number_of_classes_takes_a_new_head(tmp_path):
    case = CASES["deit"]
    model = case.binary(tmp_path)
    for source in (tmp_path / "float", tmp_path / "latent"):
        settings = {"num_labels": 5, "ignore_mismatched_sizes": True}
        if source.name == "float":
            settings["quantization_config"] = BinaryConfig()
        else:
            model.save_pretrained(source)
        other = case.auto.from_pretrained(source, **settings)
        assert case.logits(other).shape == (4, 5)
        assert other.classifier.weight.isfinite().all()
        assert torch.equal(other.deit.layers[0].mlp.fc1.weight, model.deit.layers[0].mlp.fc1.weight)


# Saving


def test_the_given_state_dict_is_what_is_saved(tmp_path):
    """A quantizer's own state dict takes its place upstream: weights gathered by FSDP and ZeRO would be lost."""
    model = distilbert(tmp_path)
    gathered = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == gathered.keys()
    assert all(torch.equal(found[name], gathered[name]) for name in found)
    assert model.hf_quantizer is not None


def test_upstream_still_ignores_the_given_state_dict(tmp_path):
    """When this fails, the workaround can be removed."""
    model = distilbert(tmp_path)
    gathered = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    PreTrainedModel.save_pretrained(model, tmp_path, state_dict=gathered)
    found = load_file(tmp_path / WEIGHTS)
    assert not torch.equal(found[f"{LIN1}.weight"], gathered[f"{LIN1}.weight"])


def test_the_state_of_a_method_is_left_out(tmp_path):
    model = install_method(distilbert(tmp_path), Surge())
    assert [name for name in model.state_dict() if ".around.aux" in name]
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / WEIGHTS) if "around" in name]
    AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_folder_and_the_model_as_they_were(tmp_path, monkeypatch):
    model = distilbert(tmp_path)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def no_space(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", no_space)
    with pytest.raises(
        OSError, match=r"could not save to .* No space left on device\. Nothing that was there has changed"
    ):
        pack_(model).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert model.hf_quantizer is not None


def test_saving_over_shards_leaves_one_whole_model(tmp_path):
    case = CASES["distilbert"]
    model = case.binary(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(stored(tmp_path)["weights_sha256"]) > 1
    assert torch.equal(case.logits(case.auto.from_pretrained(tmp_path)), case.logits(model))
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == [WEIGHTS]


def test_the_model_keeps_its_class_and_can_be_copied_and_pickled(tmp_path):
    case = CASES["distilbert"]
    model = case.binary(tmp_path)
    assert isinstance(model, DistilBertForSequenceClassification)
    assert type(model).__name__ == "DistilBertForSequenceClassification"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.logits(twin), case.logits(model))
        pack_(twin).save_pretrained(tmp_path / "packed")
        assert torch.equal(case.logits(type(model).from_pretrained(tmp_path / "packed")), case.logits(model))
    assert not is_packed(model)
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["architectures"] == [type(model).__name__]


# Training


def deit_rows() -> Dataset:
    batch = CASES["deit"].batch
    return Dataset.from_dict({key: (value.tolist() * 4) for key, value in batch.items()}).with_format("torch")


RUNS = {"distilbert": rows, "deit": deit_rows}  # the names of DeiT's tensors in files are not those in memory


def trainer(name: str, folder, model=None, **kwargs: Any) -> BinaryTrainer:
    set_seed(0)
    model = CASES[name].binary(folder) if model is None else model
    return BinaryTrainer(model, arguments(folder / "run", **kwargs), method=Surge(), train_dataset=RUNS[name]())


@pytest.mark.parametrize("name", RUNS)
def test_training_resumes_exactly_and_the_final_model_is_packed(name, tmp_path):
    case, checkpoints = CASES[name], {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(name, tmp_path, **checkpoints)
    whole.train()
    again = trainer(name, tmp_path, **checkpoints)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert stored(tmp_path / "run" / "checkpoint-4")["weight_format"] == "latent"

    whole.save_model(tmp_path / "final")
    assert stored(tmp_path / "final")["weight_format"] == "packed"
    final = case.auto.from_pretrained(tmp_path / "final")
    assert is_packed(final)
    assert torch.equal(case.logits(final), case.logits(whole.model))


def test_packed_weights_are_refused_by_the_trainer_and_trained_after_unpacking(tmp_path):
    pack_(distilbert(tmp_path)).save_pretrained(tmp_path / "packed")
    packed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="is packed: its weights are bits and cannot be trained"):
        trainer("distilbert", tmp_path, packed)
    run = trainer("distilbert", tmp_path, unpack_(packed), max_steps=1)
    run.train()
    assert run.state.global_step == 1


def test_transformers_own_trainer_takes_it_too(tmp_path):
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 1, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path / "run"), per_device_train_batch_size=4, **settings)
    assert Trainer(distilbert(tmp_path), arguments, train_dataset=rows()).train().global_step == 1


def test_a_family_with_its_own_class_is_taken_as_well(tmp_path):
    BertForSequenceClassification(BertConfig(**TEXT, **SIZE)).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=BinaryConfig())
    assert model.config.quantization_config.exclude == ["bert.pooler.dense", "classifier"]
