"""Files, configs and tensors that were altered since they were saved are refused, each with one clear error."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import different, scramble, tiny_batch, tiny_images, tiny_model, tiny_resnet, tiny_vit
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
)

from hf_bnn import (
    BinaryBertConfig,
    BinaryBertForSequenceClassification,
    BinaryBertForTokenClassification,
    BinaryBertModel,
    BinaryConfig,
    pack_,
)
from hf_bnn.integrity import CorruptCheckpointError, file_digest
from hf_bnn.models.checkpoint import check_sizes, structure_digest

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def distilbert() -> PreTrainedModel:
    config = DistilBertConfig(
        vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=32, dropout=0.0
    )
    return BinaryConfig().apply_(DistilBertForSequenceClassification(config))


MAKERS = {"bert": tiny_model, "vit": tiny_vit, "resnet": tiny_resnet, "distilbert": distilbert}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[], PreTrainedModel]:
    return MAKERS[request.param]


@pytest.fixture(params=["latent", "packed"])
def saved(request: pytest.FixtureRequest, make, tmp_path: Path) -> Path:
    """A folder with a model of each family in both states."""
    model = make() if request.param == "latent" else pack_(make())
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(params=["latent", "packed"])
def saved_state(request: pytest.FixtureRequest) -> Callable[[PreTrainedModel], PreTrainedModel]:
    return pack_ if request.param == "packed" else lambda model: model


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    config = json.loads((folder / "config.json").read_text())
    images = "Image" in config["architectures"][0]
    return (AutoModelForImageClassification if images else AutoModelForSequenceClassification).from_pretrained(
        folder, **kwargs
    )


def edit(folder: Path, change: Callable[[dict, dict], object], digests: str = "kept") -> None:
    """Change config.json by `change(config, binary_config)`; digests: kept, recomputed or none."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    binary_config = config.get("quantization_config", config)
    change(config, binary_config)
    if digests == "none":
        binary_config.pop("config_sha256", None)
        binary_config.pop("weights_sha256", None)
    elif digests == "recomputed":
        files = [p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name.endswith("index.json")]
        binary_config["weights_sha256"] = {p.name: file_digest(p) for p in files}
        binary_config["config_sha256"] = structure_digest(config)
    path.write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], digests: str = "recomputed") -> None:
    """Change the tensors in the weight file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit(folder, lambda *_: None, digests)


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return not different(one.state_dict(), other.state_dict())


# Files


def test_an_old_file_beside_newer_shards_is_refused(make, tmp_path):
    pack_(make()).save_pretrained(tmp_path / "old")
    pack_(scramble(make())).save_pretrained(tmp_path / "new", max_shard_size="1KB")
    shutil.copy(tmp_path / "old" / WEIGHTS, tmp_path / "new")
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors is not among the files .* from another save"):
        load(tmp_path / "new")


def test_a_variant_that_no_digest_covers_is_refused(saved):
    shutil.copy(saved / WEIGHTS, saved / "model.fp32.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"model\.fp32\.safetensors is not among the files"):
        load(saved, variant="fp32")


def test_pickled_weights_are_refused(saved):
    torch.save(load_file(saved / WEIGHTS), saved / "pytorch_model.bin")
    (saved / WEIGHTS).unlink()
    with pytest.raises(CorruptCheckpointError, match=r"pytorch_model\.bin would be loaded, but .* safetensors only"):
        load(saved)


@pytest.mark.parametrize("outside", ["../old/model.safetensors", "ABSOLUTE"])
def test_an_index_that_leaves_the_folder_is_refused(make, tmp_path, outside):
    pack_(make()).save_pretrained(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    (tmp_path / "new" / WEIGHTS).unlink()
    outside = str(tmp_path / "old" / WEIGHTS) if outside == "ABSOLUTE" else outside
    (tmp_path / "new" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"x": outside}}))
    with pytest.raises(CorruptCheckpointError, match=r"is outside of the checkpoint's folder .* its index names"):
        load(tmp_path / "new")


def test_an_index_that_was_altered_or_omits_a_shard_is_refused(make, tmp_path):
    pack_(make()).save_pretrained(tmp_path, max_shard_size="1KB")
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if name != shards[-1]}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpointError, match=r"index\.json .* is truncated or was altered"):
        load(tmp_path)
    edit(tmp_path, lambda *_: None, "recomputed")
    with pytest.raises(CorruptCheckpointError, match=f"{shards[-1]} is left out by the index of its shards"):
        load(tmp_path)


def test_each_save_keeps_the_digests_of_other_variants(make, tmp_path):
    first, second = make(), scramble(make())
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, variant="fp32", max_shard_size="40KB")
    assert same(load(tmp_path), first)
    assert same(load(tmp_path, variant="fp32"), second)
    path = next(tmp_path.glob("model.fp32*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert same(load(tmp_path), first)
    with pytest.raises(CorruptCheckpointError, match="is truncated or was altered"):
        load(tmp_path, variant="fp32")


def test_digests_of_files_that_are_gone_go_too(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    model.save_pretrained(tmp_path, variant="fp32")
    model.save_pretrained(tmp_path)
    listed = json.loads((tmp_path / "config.json").read_text())["weights_sha256"]
    assert listed.keys() == {WEIGHTS, "model.fp32.safetensors"}
    pack_(model).save_pretrained(tmp_path)  # the config is no longer that of the other variant
    assert json.loads((tmp_path / "config.json").read_text())["weights_sha256"].keys() == {WEIGHTS}


# The config

STRUCTURAL = {
    "bert": {
        "binarize": "weights",
        "levels": "signed",
        "ffn_levels": "unsigned",
        "attention": "boolean",
        "embeddings": "float",
        "weight_scaling": "layer",
        "skip": ["classifier"],
        "hidden_act": "relu",
        "layer_norm_eps": 0.1,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "dtype": "float64",
        "unheard_of": 1,
    },
    "vit": {"attention": "binary", "qkv_bias": False, "layer_norm_eps": 0.1, "patch_size": 2},
    "resnet": {"shortcut": "pad", "stem": "imagenet", "block_activation": "rprelu", "levels": "elastic", "depths": [1]},
    "distilbert": {"activation": "relu", "n_heads": 4, "sinusoidal_pos_embds": True, "unheard_of": 1},
}


@pytest.mark.parametrize("family", MAKERS)
def test_every_field_that_says_what_the_bits_mean_is_under_the_digest(family, tmp_path):
    pack_(MAKERS[family]()).save_pretrained(tmp_path)
    original = (tmp_path / "config.json").read_text()
    for field, value in STRUCTURAL[family].items():
        edit(tmp_path, lambda config, binary_config, field=field, value=value: config.update({field: value}))
        with pytest.raises(
            CorruptCheckpointError, match=r"config\.json was altered .* take config_sha256 out"
        ) as error:
            load(tmp_path)
        assert "\n" not in str(error.value), field
        (tmp_path / "config.json").write_text(original)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("levels", "signed"),
        ("binarize", "weights"),
        ("weight_scaling", "layer"),
        ("unsigned", ["*lin1"]),
        ("exclude", []),
    ],
)
def test_the_fields_of_a_quantization_config_are_under_the_digest_too(tmp_path, field, value):
    pack_(distilbert()).save_pretrained(tmp_path)
    edit(tmp_path, lambda config, binary_config: binary_config.update({field: value}))
    with pytest.raises((CorruptCheckpointError, ValueError), match=r"was altered after it was saved|cannot be binary"):
        load(tmp_path)


def test_names_paths_versions_and_the_record_of_training_may_change(saved):
    before = load(saved)

    def rename(config: dict, binary_config: dict) -> None:
        config["id2label"] = {key: f"class {key}" for key in config["id2label"]} if "id2label" in config else {}
        config["label2id"] = {f"class {key}": int(key) for key in config["id2label"]}
        config.update({"transformers_version": "9.9", "_name_or_path": "elsewhere", "finetuning_task": "sst2"})
        if not config["id2label"]:
            del config["id2label"], config["label2id"]
        binary_config["method"] = {"name": "ste"} if binary_config is config else None
        if binary_config is not config:
            del binary_config["method"]

    edit(saved, rename)
    assert same(load(saved), before)


def test_more_labels_are_another_structure(tmp_path):
    pack_(tiny_model()).save_pretrained(tmp_path)
    edit(tmp_path, lambda config, binary_config: config.update(id2label={"0": "a", "1": "b", "2": "c"}))
    with pytest.raises(CorruptCheckpointError, match=r"config\.json was altered"):
        load(tmp_path)


def test_fields_that_later_versions_add_to_configs_do_not_break_older_digests(monkeypatch, tmp_path):
    model = pack_(tiny_model())
    model.save_pretrained(tmp_path)
    post_init = BinaryBertConfig.__post_init__

    def newer(self, **kwargs):
        post_init(self, **kwargs)
        self.added_later = kwargs.get("added_later", 3)

    monkeypatch.setattr(BinaryBertConfig, "__post_init__", newer)
    assert load(tmp_path).config.added_later == 3


def test_checkpoints_without_a_digest_of_the_config_load(saved):
    before = load(saved)

    def as_before(config: dict, binary_config: dict) -> None:
        del binary_config["config_sha256"]

    edit(saved, as_before)
    assert same(load(saved), before)
    edit(saved, lambda *_: None, "none")
    assert same(load(saved), before)


def test_a_config_that_its_user_saves_anew_has_no_stale_digest(tmp_path):
    pack_(tiny_model()).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert not hasattr(config, "config_sha256")
    config.hidden_dropout_prob = 0.3
    config.save_pretrained(tmp_path)
    assert load(tmp_path).config.hidden_dropout_prob == 0.3


def test_what_a_caller_asks_for_is_not_blamed_on_the_file(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    cls = BinaryBertForSequenceClassification
    with pytest.raises(ValueError, match="levels='ternary': expected one of") as error:
        cls.from_pretrained(tmp_path, levels="ternary")
    assert not isinstance(error.value, CorruptCheckpointError)
    with pytest.raises(ValueError, match="holds a 'hf_bnn_bert' model"):
        tiny_vit().from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes") as error:
        cls.from_pretrained(tmp_path, num_labels=5)
    assert not isinstance(error.value, CorruptCheckpointError)
    with pytest.raises(OSError, match=r"fp16"):
        cls.from_pretrained(tmp_path, variant="fp16")
    assert cls.from_pretrained(tmp_path, levels="signed").config.levels == "signed"
    assert cls.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True).num_labels == 5


def test_a_packed_checkpoint_is_not_loaded_as_another_model(tmp_path):
    pack_(tiny_model()).save_pretrained(tmp_path)
    for asked in ({"levels": "signed"}, {"binarize": "weights"}, {"attention": "binary"}, {"ffn_levels": "unsigned"}):
        with pytest.raises(ValueError, match=r"holds packed weights, and \w+='\w+' would make another model of them"):
            load(tmp_path, **asked)


BROKEN = {
    "a size of another type": ("hidden_size", "x"),
    "a negative size": ("hidden_size", -32),
    "a huge size": ("hidden_size", 10**12),
    "a size that does not fit in memory": ("hidden_size", 10**6),
    "a huge depth": ("num_hidden_layers", 10**9),
    "a depth below the file's": ("num_hidden_layers", 1),
    "a depth above the file's": ("num_hidden_layers", 3),
    "heads that do not divide": ("num_attention_heads", 5),
    "a dtype that is none": ("dtype", "int32"),
    "a dtype that torch lacks": ("dtype", "float9"),
    "a function that is unknown": ("hidden_act", "geluu"),
    "levels that are unknown": ("levels", "ternary"),
    "a vocabulary that memory cannot hold": ("vocab_size", 10**9),
    "positions that memory cannot hold": ("max_position_embeddings", 10**9),
    "more labels than names": ("num_labels", 10**9),
    "levels that the file has not": ("levels", "signed"),
    "weights that are said to be float": ("weight_format", "float"),
    "weights that are said to be latent": ("weight_format", "latent"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("auto", [False, True])
def test_a_broken_config_is_one_error_even_with_new_digests(tmp_path, case, auto):
    pack_(tiny_model()).save_pretrained(tmp_path)
    edit(tmp_path, lambda config, binary_config: binary_config.update(dict([BROKEN[case]])), "recomputed")
    cls = AutoModelForSequenceClassification if auto else BinaryBertForSequenceClassification
    with pytest.raises(CorruptCheckpointError, match="fetch or save it again") as error:
        cls.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_config_is_one_error(tmp_path):
    pack_(tiny_model()).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"has no config\.json: fetch or save it again"):
        BinaryBertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1', "\xff"])
def test_a_config_that_is_not_json_is_one_error(tmp_path, text):
    pack_(tiny_model()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptCheckpointError, match=r"config\.json .*: fetch or save it again"):
        BinaryBertForSequenceClassification.from_pretrained(tmp_path)


def test_sizes_of_real_models_are_plausible_and_others_are_named():
    check_sizes(GPT2Config(n_layer=999, vocab_size=2**20, rope_theta=10**9).to_dict())
    check_sizes({"image_size": [224, 224], "depths": [3, 4, 6, 3], "layer_norm_eps": 1e-12, "num_experts": 512})
    with pytest.raises(CorruptCheckpointError, match=r"config\.json says text_config\.n_layer=1000000000, but at most"):
        check_sizes({"text_config": {"n_layer": 10**9}})
    with pytest.raises(CorruptCheckpointError, match="depths=1002, but at most 1000 is plausible"):
        check_sizes({"depths": [1, 1001]})
    with pytest.raises(CorruptCheckpointError, match="hidden_sizes=-4, but a size is at least 0"):
        check_sizes({"hidden_sizes": [8, -4]})


# The tensors


def packed_key(tensors: dict[str, torch.Tensor]) -> str:
    """A packed weight's key: bits, not the integers of a table."""
    return next(key for key, tensor in sorted(tensors.items()) if tensor.dtype == torch.uint8)


def norm_key(tensors: dict[str, torch.Tensor]) -> str:
    return next(key for key in sorted(tensors) if re.search(r"(?i)norm.*\.weight$", key))


CHANGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "bits held as signed integers": (
        lambda t: t.update({packed_key(t): t[packed_key(t)].view(torch.int8)}),
        r"as torch\.int8, not as torch\.uint8",
    ),
    "bits held as floats": (
        lambda t: t.update({packed_key(t): t[packed_key(t)].float()}),
        r"as torch\.float32, not as torch\.uint8",
    ),
    "integers for a float parameter": (
        lambda t: t.update({norm_key(t): t[norm_key(t)].view(torch.int32)}),
        r"as torch\.int32, not as torch\.float32",
    ),
    "a weight of another shape": (
        lambda t: t.update({packed_key(t): t[packed_key(t)][:-1].contiguous()}),
        r"lacks .* \(or they have another shape\)",
    ),
    "a scale that is gone": (
        lambda t: t.pop(packed_key(t).replace("weight", "weight_scale")),
        "lacks '.*weight_scale'",
    ),
    "levels that the model has not": (
        lambda t: t.update({packed_key(t).replace("weight", "input_levels.slope"): torch.ones(1)}),
        r"input_levels\.slope' and 0 more tensors for which this \w+ has no place",
    ),
    "the scale of a float layer": (
        lambda t: t.update({norm_key(t) + "_scale": torch.ones(1)}),
        "for which this .* has no place",
    ),
    "a head that is gone": (
        lambda t: t.pop(next(key for key in sorted(t) if "classifier" in key)),
        "lacks 'classifier",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_are_not_the_models_are_refused(make, tmp_path, change):
    pack_(make()).save_pretrained(tmp_path)
    alter, message = CHANGES[change]
    rewrite(tmp_path, alter)
    with pytest.raises(CorruptCheckpointError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_bits_behind_the_end_of_a_row_are_refused(tmp_path):
    model = pack_(tiny_model(hidden_size=36, intermediate_size=60))
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors[packed_key(tensors)][0, -1:].bitwise_or_(0x80))
    with pytest.raises(CorruptCheckpointError, match="has bits set behind the end of its rows of 36"):
        load(tmp_path)


def test_another_head_may_be_put_on_a_binary_encoder(tmp_path):
    pack_(tiny_model()).save_pretrained(tmp_path)
    encoder = BinaryBertModel.from_pretrained(tmp_path)
    other = BinaryBertForTokenClassification.from_pretrained(tmp_path)
    assert not different(encoder.encoder.state_dict(), other.bert.encoder.state_dict())
    rewrite(tmp_path, lambda t: t.pop("bert.encoder.layer.1.output.dense.weight"))
    for cls in (BinaryBertModel, BinaryBertForTokenClassification):
        with pytest.raises(CorruptCheckpointError, match=r"lacks .*layer\.1\.output\.dense\.weight"):
            cls.from_pretrained(tmp_path)


def test_a_latent_checkpoint_goes_on_with_other_levels_only_if_asked_to(tmp_path):
    model = tiny_model(binarize="weights", levels="signed", ffn_levels="unsigned")
    model.save_pretrained(tmp_path)
    both = BinaryBertForSequenceClassification.from_pretrained(tmp_path, binarize="both", levels="elastic")
    both.save_pretrained(tmp_path / "both")
    rewrite(tmp_path / "both", lambda t: t.pop(next(key for key in sorted(t) if "input_levels" in key)))
    with pytest.raises(CorruptCheckpointError, match=r"lacks .*input_levels"):
        load(tmp_path / "both")


def test_a_class_that_leaves_computed_tensors_out_of_its_files_is_reloaded(tmp_path):
    sizes = dict.fromkeys(["encoder_layers", "decoder_layers"], 1) | {"vocab_size": 64, "d_model": 32}
    sizes |= dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
    sizes |= dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 64) | {"max_position_embeddings": 32}
    tokens = {"pad_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    model = BinaryConfig().apply_(MarianMTModel(MarianConfig(**sizes, **tokens)))
    for name in ("latent", "packed"):
        model = pack_(model) if name == "packed" else model
        model.save_pretrained(tmp_path / name)
        assert same(MarianMTModel.from_pretrained(tmp_path / name), model)


def test_adapters_are_saved_beside_the_weights_and_loaded_from_there(saved_state, tmp_path):
    model = saved_state(tiny_model())
    model.save_pretrained(tmp_path)
    adapted = BinaryBertForSequenceClassification.from_pretrained(tmp_path)
    adapted.add_adapter(LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    again = BinaryBertForSequenceClassification.from_pretrained(tmp_path)
    again.load_adapter(str(tmp_path / "adapter"))
    inputs = {key: value for key, value in tiny_batch().items() if key != "labels"}
    with torch.no_grad():
        expected = adapted.eval()(**inputs).logits
        assert torch.equal(again.eval()(**inputs).logits, expected)
        assert not torch.equal(model.eval()(**inputs).logits, expected)


# Offloading


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_learned_levels_cannot_be_offloaded(family, saved_state, tmp_path):
    model = saved_state(MAKERS[family]())
    model.save_pretrained(tmp_path)
    modules = {name: "cpu" for name, _ in model.named_children()}
    places = {**modules, "classifier": "disk"}
    with pytest.raises(ValueError, match=r"learned levels cannot be offloaded .* levels='signed'"):
        type(model).from_pretrained(tmp_path, device_map=places, offload_folder=str(tmp_path / "off"))
    assert load(tmp_path, device_map="cpu")
    for offload in (cpu_offload, lambda m, **kwargs: disk_offload(m, str(tmp_path / "off"), **kwargs)):
        with pytest.raises(ValueError, match="learned levels cannot be offloaded"):
            offload(load(tmp_path), execution_device=torch.device("cpu"))


def test_fixed_levels_can_be_offloaded(saved_state, tmp_path):
    for model, batch in (
        (tiny_model(levels="signed", ffn_levels="unsigned"), tiny_batch()),
        (tiny_resnet(), tiny_images(size=16)),
    ):
        model = saved_state(model.eval())
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            expected = model(**inputs).logits
            cpu_offload(model, execution_device=torch.device("cpu"))
            assert torch.equal(model(**inputs).logits, expected)
