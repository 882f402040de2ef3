"""Binary ViT: what is binarized, checkpoints of ViT and DeiT under transformers' names, image sizes, resuming."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import StopAt, arguments
from tiny import VIT_SIZE, different, scramble, tiny_float_vit, tiny_images, tiny_vit
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    BeitConfig,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    set_seed,
)

from hf_bnn import (
    BinaryTrainer,
    BinaryViTConfig,
    BinaryViTForImageClassification,
    BinaryViTForMaskedImageModeling,
    BinaryViTModel,
    Surge,
    pack_,
    summary,
    unpack_,
)
from hf_bnn.integrity import CorruptCheckpointError
from hf_bnn.nn.attention import BinaryMatmul
from hf_bnn.nn.layers import BinaryLinear, binary_layers
from hf_bnn.nn.levels import ElasticLevels, SignedLevels, UnsignedLevels
from hf_bnn.training.checked_trainer import CheckedTrainer

WEIGHTS = "model.safetensors"
HEADS = {
    "model": (ViTModel, BinaryViTModel, AutoModel),
    "classification": (ViTForImageClassification, BinaryViTForImageClassification, AutoModelForImageClassification),
    "masked": (ViTForMaskedImageModeling, BinaryViTForMaskedImageModeling, AutoModelForMaskedImageModeling),
}
VARIANTS = [
    {},
    {"attention": "binary"},
    {"attention": "boolean"},
    {"binarize": "weights"},
    {"binarize": "activations", "levels": "signed"},
    {"levels": "signed", "ffn_levels": "unsigned"},
    {"weight_scaling": "layer", "skip": ["classifier", "decoder*", "*patch_embeddings*", "*layers.1.*"]},
]
every_head = pytest.mark.parametrize("head", HEADS)


@torch.no_grad()
def output(model: nn.Module, **kwargs) -> torch.Tensor:
    """The head's own output in evaluation."""
    images = kwargs.pop("pixel_values", None)
    images = tiny_images(channels=model.config.num_channels)["pixel_values"] if images is None else images
    result = model.eval()(images, **kwargs)
    return getattr(result, "logits", result[0])


# Checkpoints


@every_head
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_tensor_is_restored_from_float_latent_and_packed_files(tmp_path, head, variant):
    float_class, binary_class, auto = HEADS[head]
    scramble(float_class(ViTConfig(**VIT_SIZE))).save_pretrained(tmp_path / "float")
    theirs = float_class.from_pretrained(tmp_path / "float").state_dict()
    latent = binary_class.from_pretrained(tmp_path / "float", **variant)
    ours = latent.state_dict()
    assert not different(theirs, {key: ours[key] for key in theirs})
    assert type(latent.config) is BinaryViTConfig
    scramble(latent).save_pretrained(tmp_path / "latent")
    for cls in (auto, binary_class):
        again = cls.from_pretrained(tmp_path / "latent")
        assert type(again) is binary_class
        assert not different(again.state_dict(), latent.state_dict())
    expected = output(latent)
    assert torch.equal(output(again), expected)
    if variant.get("binarize") == "activations":
        return
    pack_(latent)
    assert torch.equal(output(latent), expected)
    latent.save_pretrained(tmp_path / "packed")
    packed, found = auto.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not different(packed.state_dict(), latent.state_dict())
    assert torch.equal(output(packed), expected)


def test_files_hold_transformers_names_and_files_with_the_names_in_memory_load_too(tmp_path):
    model = scramble(tiny_vit(attention="binary"))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    attention = "vit.encoder.layer.1.attention."
    assert {f"{attention}attention.query.weight", f"{attention}output.dense.input_levels.width"} <= stored.keys()
    assert f"{attention}binary_attention.context.left_levels.offset" in stored
    assert not [key for key in stored if ".layers." in key or "_proj" in key or ".mlp." in key]
    model.config.weights_sha256 = None
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / WEIGHTS, metadata={"format": "pt"})
    again = BinaryViTForImageClassification.from_pretrained(tmp_path)
    assert not different(again.state_dict(), model.state_dict())
    again.save_pretrained(tmp_path)
    assert not different(BinaryViTForImageClassification.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_packed_model_is_unpacked_trained_on_and_saved_again(tmp_path):
    pack_(tiny_vit()).save_pretrained(tmp_path)
    model = unpack_(BinaryViTForImageClassification.from_pretrained(tmp_path))
    expected = output(model)
    model.save_pretrained(tmp_path / "latent")
    assert torch.equal(output(BinaryViTForImageClassification.from_pretrained(tmp_path / "latent")), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize("target", ["model", "masked"])
def test_a_binary_classifier_gives_its_encoder_to_another_head(tmp_path, packed, target):
    model = scramble(tiny_vit())
    model = pack_(model) if packed else model
    model.save_pretrained(tmp_path / "one")
    other, found = HEADS[target][2].from_pretrained(tmp_path / "one", output_loading_info=True)
    assert type(other) is HEADS[target][1]
    encoder = getattr(other, "vit", other).state_dict()
    theirs = model.vit.state_dict()
    assert not different(theirs, {key: encoder[key] for key in theirs})
    fresh = {"model": {"pooler.dense"}, "masked": {"decoder.0", "vit.embeddings"}}[target]
    assert {key.rpartition(".")[0] for key in found["missing_keys"]} == fresh
    assert bool(output(other).isfinite().all())
    other.save_pretrained(tmp_path / "other")
    assert not different(HEADS[target][1].from_pretrained(tmp_path / "other").state_dict(), other.state_dict())


def test_an_encoder_without_prefix_loads_into_a_head(tmp_path):
    base = scramble(BinaryViTModel(BinaryViTConfig(**VIT_SIZE), add_pooling_layer=False))
    base.save_pretrained(tmp_path / "base")
    model = BinaryViTForImageClassification.from_pretrained(tmp_path / "base")
    assert not different(model.vit.state_dict(), base.state_dict())
    scramble(ViTModel(ViTConfig(**VIT_SIZE))).save_pretrained(tmp_path / "float")
    model = BinaryViTForImageClassification.from_pretrained(tmp_path / "float")
    theirs = ViTModel.from_pretrained(tmp_path / "float", add_pooling_layer=False).state_dict()
    assert not different(theirs, {key: model.vit.state_dict()[key] for key in theirs})


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize("key", ["vit.encoder.layer.0.attention.attention.query.weight", "vit.layernorm.bias"])
def test_a_missing_tensor_is_refused_and_never_random(tmp_path, packed, key):
    model = pack_(tiny_vit()) if packed else tiny_vit()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[key]
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model.config.weights_sha256 = None
    model.config.save_pretrained(tmp_path)
    name = {"vit.layernorm.bias": r"vit\.layernorm\.bias"}.get(key, r"vit\.layers\.0\.attention\.q_proj\.weight")
    with pytest.raises(CorruptCheckpointError, match=f"checkpoint .* lacks '{name}' .*: fetch or save it again"):
        BinaryViTForImageClassification.from_pretrained(tmp_path)


def test_a_truncated_float_file_is_one_clear_error(tmp_path):
    tiny_float_vit().save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorruptCheckpointError, match=r"cannot be read .*: fetch or save it again"):
        BinaryViTForImageClassification.from_pretrained(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    BeitConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a 'beit' model: BinaryViTConfig reads 'vit', 'deit' \(float\) and"):
        BinaryViTForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"BinaryViTModel takes a BinaryViTConfig, not a ViTConfig: make one with"):
        BinaryViTModel(ViTConfig(**VIT_SIZE))


def test_the_config_round_trips(tmp_path):
    config = BinaryViTConfig(**VIT_SIZE, attention="binary", ffn_levels="unsigned")
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["exclude"] == ["*patch_embeddings*", "*pooler*", "classifier", "decoder*"]
    assert stored["model_type"] == "hf_bnn_vit"
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}


@pytest.mark.parametrize("field", ["binarize", "attention", "levels", "ffn_levels"])
def test_a_wrong_choice_is_refused_with_the_right_ones(field):
    with pytest.raises(ValueError, match=f"{field}='int3': expected one of "):
        BinaryViTConfig(**{field: "int3"})


# DeiT

DEIT = {
    DeiTModel: BinaryViTModel,
    DeiTForImageClassification: BinaryViTForImageClassification,
    DeiTForImageClassificationWithTeacher: BinaryViTForImageClassification,
    DeiTForMaskedImageModeling: BinaryViTForMaskedImageModeling,
}


@pytest.mark.parametrize("source", DEIT, ids=lambda cls: cls.__name__)
def test_a_deit_loads_without_its_distillation_token(tmp_path, source, monkeypatch):
    deit = scramble(source(DeiTConfig(**VIT_SIZE)))
    deit.save_pretrained(tmp_path / "deit")
    warnings = []
    monkeypatch.setattr("hf_bnn.models.vit.logger.warning", warnings.append)
    model, found = DEIT[source].from_pretrained(tmp_path / "deit", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    theirs, ours = getattr(deit, "deit", deit).state_dict(), getattr(model, "vit", model).state_dict()
    del theirs["embeddings.distillation_token"]
    rows = theirs.pop("embeddings.position_embeddings")
    assert torch.equal(ours.pop("embeddings.position_embeddings"), torch.cat((rows[:, :1], rows[:, 2:]), 1))
    assert not different(theirs, {key: ours[key] for key in theirs})
    if hasattr(model, "classifier"):
        classifier = getattr(deit, "cls_classifier", None) or deit.classifier
        assert torch.equal(model.classifier.weight, classifier.weight)
    (text,) = warnings
    assert "embeddings.distillation_token" in text
    assert ("distillation_classifier.weight" in text) == (source is DeiTForImageClassificationWithTeacher)
    assert "and the token's row of the position embeddings are dropped from this DeiT checkpoint" in text
    model.save_pretrained(tmp_path / "binary")
    again = AutoModel.from_pretrained(tmp_path / "binary") if source is DeiTModel else None
    again = again or type(model).from_pretrained(tmp_path / "binary")
    assert not different(again.state_dict(), model.state_dict())
    assert len(warnings) == 1


def test_a_deit_without_binary_layers_computes_what_deits_class_token_sees():
    """The oracle of the names: with float layers, a token less is all that differs; here it attends to nothing."""
    deit = scramble(DeiTForImageClassification(DeiTConfig(**VIT_SIZE))).eval()
    model = BinaryViTForImageClassification.from_pretrained(
        None, config=BinaryViTConfig(**VIT_SIZE, binarize="none"), state_dict=deit.state_dict()
    )
    images = tiny_images()["pixel_values"]
    mask = torch.ones(len(images), 6)
    mask[:, 1] = 0
    with torch.no_grad():
        expected = deit(images, attention_mask=mask).logits
    torch.testing.assert_close(output(model), expected)


# What is binary


def test_the_recipe_puts_each_layer_on_its_levels():
    model = tiny_vit(attention="binary")
    linear = {name: m for name, m in model.named_modules() if isinstance(m, BinaryLinear)}
    attention, mlp = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"), ("fc1", "fc2")
    assert set(linear) == {f"vit.layers.{i}.{n}" for i in (0, 1) for n in (*attention, *(f"mlp.{m}" for m in mlp))}
    for name, layer in linear.items():
        assert isinstance(layer.input_levels, ElasticLevels)
        assert layer.input_levels.signed is not name.endswith("fc2")
    products = [layer for layer in binary_layers(model) if isinstance(layer, BinaryMatmul)]
    assert [p.left_levels.signed for p in products] == [True, False] * 2
    plain = tiny_vit(levels="signed", ffn_levels="unsigned")
    assert {type(layer.input_levels) for layer in binary_layers(plain)} == {SignedLevels, UnsignedLevels}


@every_head
def test_heads_pooler_and_patches_are_float(head):
    model = HEADS[head][1](BinaryViTConfig(**VIT_SIZE))
    binary = {id(layer) for layer in binary_layers(model)}
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and id(m) not in binary]
    expected = {"model": ["pooler.dense"], "classification": ["classifier"], "masked": ["decoder.0"]}[head]
    assert others == [("" if head == "model" else "vit.") + "embeddings.patch_embeddings.projection", *expected]
    assert len(binary) == 12


@pytest.mark.parametrize("attention", ["binary", "boolean"])
def test_binary_attention_is_used_and_is_not_what_config_json_says(attention: str, tmp_path: Path):
    model = tiny_vit(attention=attention)
    assert model.config._attn_implementation == "hf_bnn"
    float_products = tiny_vit()
    float_products.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(output(model), output(float_products), atol=1e-4)
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "hf_bnn"
    attentions = again(tiny_images()["pixel_values"], output_attentions=True).attentions
    assert [tuple(a.shape) for a in attentions] == [(4, 2, 5, 5)] * 2


@pytest.mark.parametrize("attention", ["binary", "boolean"])
def test_a_masked_patch_is_not_attended_to(attention: str):
    model = tiny_vit(attention=attention)
    images = tiny_images()["pixel_values"]
    other = images.clone()
    other[:, :, 4:, 4:] = 7.0  # the last patch
    mask = torch.ones(4, 5)
    mask[:, -1] = 0
    assert torch.equal(output(model, attention_mask=mask), output(model, pixel_values=other, attention_mask=mask))
    assert not torch.equal(output(model), output(model, pixel_values=other))


@pytest.mark.parametrize(
    "size", [{"image_size": 12}, {"patch_size": 2}, {"num_channels": 1}, {"qkv_bias": False}], ids=str
)
def test_other_image_sizes_patches_and_channels_train_pack_and_reload(tmp_path, size):
    model = tiny_vit(**size)
    batch = tiny_images(size=model.config.image_size, channels=model.config.num_channels)
    model.train()(**batch).loss.backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in binary_layers(model))
    expected = output(model, pixel_values=batch["pixel_values"])
    pack_(model).save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(output(again, pixel_values=batch["pixel_values"]), expected)


def test_larger_images_are_seen_through_interpolated_positions():
    model = tiny_vit()
    images = tiny_images(size=16)["pixel_values"]
    with pytest.raises(ValueError, match="doesn't match model"):
        output(model, pixel_values=images)
    expected = output(model, pixel_values=images, interpolate_pos_encoding=True)
    assert torch.equal(output(pack_(model), pixel_values=images, interpolate_pos_encoding=True), expected)


def test_masked_image_modeling_learns_to_fill_in():
    model = BinaryViTForMaskedImageModeling(BinaryViTConfig(**VIT_SIZE)).train()
    images = tiny_images()["pixel_values"]
    masked = torch.tensor([[True, False, False, True]]).expand(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    losses = []
    for _ in range(40):
        loss = model(images, bool_masked_pos=masked).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_bits_are_a_thirty_second_of_the_float_matrices(tmp_path):
    model = tiny_vit()
    counts = summary(model)
    matrices = [layer.weight for layer in binary_layers(model)]
    assert counts.binary_weights == sum(weight.numel() for weight in matrices) == 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert counts.matrix_bytes_float == 32 * counts.matrix_bytes_bits
    pack_(model).save_pretrained(tmp_path)
    assert summary(model) == counts
    stored = [value for value in load_file(tmp_path / WEIGHTS).values() if value.dtype == torch.uint8]
    assert sum(value.nbytes for value in stored) == counts.matrix_bytes_bits
    odd = tiny_vit(hidden_size=36, intermediate_size=60)  # 36 bits: 4 of the last byte's are padding
    assert summary(odd).matrix_bytes_bits == 2 * (4 * 36 * 5 + 60 * 5 + 36 * 8)


# Training goes on (upstream's trap: Trainer reads the file's names as the model's)


def images(count: int = 16) -> list[dict[str, torch.Tensor]]:
    batch = tiny_images(count)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def trainer(folder: Path, model: nn.Module | None = None, **kwargs) -> BinaryTrainer:
    set_seed(0)
    method = kwargs.pop("method", None)
    model = tiny_vit() if model is None else model
    args = arguments(folder, save_strategy="steps", **kwargs)
    return BinaryTrainer(model, args, method=method, train_dataset=images(), eval_dataset=images(8))


def float_trainer(folder: Path, **kwargs) -> CheckedTrainer:
    set_seed(0)
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 0.01}
    args = TrainingArguments(str(folder), per_device_train_batch_size=4, save_strategy="steps", **settings, **kwargs)
    return CheckedTrainer(tiny_float_vit(), args, train_dataset=images(), eval_dataset=images(8))


def surge_trainer(folder: Path, **kwargs) -> BinaryTrainer:
    return trainer(folder, method=Surge(), **kwargs)


def binary_attention_trainer(folder: Path, **kwargs) -> BinaryTrainer:
    set_seed(0)
    return trainer(folder, tiny_vit(attention="binary"), **kwargs)


every_trainer = pytest.mark.parametrize("make", [trainer, surge_trainer, binary_attention_trainer, float_trainer])


@every_trainer
def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(tmp_path, make):
    settings = {"num_train_epochs": 2, "save_steps": 3}
    straight = make(tmp_path / "straight", **settings)
    straight.train()
    first = make(tmp_path / "cut", **settings)
    first.add_callback(StopAt(3))
    first.train()
    second = make(tmp_path / "cut", **settings)
    scramble(second.model)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == straight.state.global_step == 8
    assert not different(second.model.state_dict(), straight.model.state_dict())


@every_trainer
def test_load_best_model_at_end_restores_the_best_weights(tmp_path, make):
    settings = {"max_steps": 4, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    one = make(tmp_path, load_best_model_at_end=True, metric_for_best_model="runtime", **settings)
    one._determine_best_metric = lambda metrics, trial: best_at(one, 2)  # not the last: something must be loaded
    one.train()
    assert Path(one.state.best_model_checkpoint).name == "checkpoint-2"
    saved = type(one.model).from_pretrained(tmp_path / "checkpoint-2").state_dict()
    last = type(one.model).from_pretrained(tmp_path / "checkpoint-4").state_dict()
    ours = {key: value for key, value in one.model.state_dict().items() if key in saved}
    assert not different(saved, ours)
    assert different(saved, last)


def best_at(one: Trainer, step: int) -> bool:
    """Trainer's own bookkeeping of a best model, with the given step's."""
    if one.state.global_step == step:
        one.state.best_metric, one.state.best_global_step = 0.0, step
    return one.state.global_step == step


def test_transformers_own_loading_would_leave_most_tensors_as_they_are(tmp_path):
    one = trainer(tmp_path, max_steps=1, save_steps=1)
    one.train()
    trained = {key: value.clone() for key, value in one.model.state_dict().items()}
    scramble(one.model)
    Trainer._load_from_checkpoint(one, str(tmp_path / "checkpoint-1"))
    wrong = different(one.model.state_dict(), trained)
    assert len(wrong) > len(trained) / 2
    assert "vit.layers.0.attention.q_proj.weight" in wrong
    one._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert not different(one.model.state_dict(), trained)


def test_a_run_goes_on_from_a_checkpoint_with_the_names_in_memory(tmp_path):
    one = trainer(tmp_path, max_steps=1, save_steps=1)
    one.train()
    trained = {key: value.clone() for key, value in one.model.state_dict().items()}
    save_file(trained, tmp_path / "checkpoint-1" / WEIGHTS)
    scramble(one.model)
    one._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert not different(one.model.state_dict(), trained)


@pytest.mark.parametrize("make", [trainer, float_trainer])
def test_a_checkpoint_of_another_model_is_refused_with_the_name_of_a_tensor(tmp_path, make):
    make(tmp_path, max_steps=1, save_steps=1).train()
    other = make(tmp_path, max_steps=2)
    other.model.vit.layers.append(other.model.vit.layers[0])
    with pytest.raises(CorruptCheckpointError, match=r"'vit\.layers\.2\..*' is in only one of the two"):
        other.train(resume_from_checkpoint=True)


def test_the_final_model_is_packed_and_computes_what_was_trained(tmp_path):
    one = trainer(tmp_path, method=Surge(), max_steps=3, save_steps=3)
    one.train()
    one.save_model()
    packed = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert packed.config.weight_format == "packed"
    assert torch.equal(output(packed), output(one.model))
    latent = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(output(latent), output(one.model))
