"""Which layers become binary: one matcher and one check for all that take patterns, and what stays float by default."""

import json
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import SIZE, TinyConvNet, tiny_config, tiny_float_bert, tiny_float_vit, tiny_model, tiny_resnet, tiny_vit
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_bnn import (
    BinaryBertConfig,
    BinaryBertForSequenceClassification,
    BinaryConfig,
    BinaryResNetConfig,
    BinaryViTConfig,
    binarize_,
    pack_,
)
from hf_bnn.nn.layers import WeightedLayer
from hf_bnn.selection import _ends, choose_layers, default_exclude
from hf_bnn.summary import composition


def binary_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, WeightedLayer)}


def net() -> nn.Sequential:
    """`encoder.0`, `encoder.1` and a `head`."""
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model.add_module("head", nn.Linear(8, 2))
    return model


# All that take patterns: each makes a model with `encoder.*` or its like, and with a head.
MAKERS: dict[str, Callable[..., nn.Module]] = {
    "binarize_": lambda patterns: binarize_(net(), exclude=patterns),
    "binarize_ skip": lambda patterns: binarize_(net(), skip=patterns),
    "bert": lambda patterns: tiny_model(exclude=patterns),
    "bert skip": lambda patterns: tiny_model(skip=patterns),
    "vit": lambda patterns: tiny_vit(exclude=patterns),
    "resnet": lambda patterns: tiny_resnet(exclude=patterns),
    "config": lambda patterns: BinaryConfig(exclude=patterns).apply_(tiny_float_bert()),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_string_in_the_place_of_a_list_is_refused(maker: str):
    with pytest.raises(ValueError, match=r"exclude='\*head': expected a list of patterns, as in exclude=\['lm_head'"):
        MAKERS[maker]("*head")
    with pytest.raises(ValueError, match=r"exclude=\[3\]: expected a list of patterns"):
        MAKERS[maker]([3])


@pytest.mark.parametrize("maker", MAKERS)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(maker: str):
    right = "head" if maker.startswith("binarize_") else "classifier"
    message = rf"the exclude pattern '{right}r' matches no module of \w+; the nearest are \[.*'{right}'"
    with pytest.raises(ValueError, match=message):
        MAKERS[maker]([right, f"{right}r"])
    assert right not in binary_names(MAKERS[maker]([right]))


@pytest.mark.parametrize("maker", ["bert", "config"])
def test_a_pattern_covers_all_within_a_module_with_and_without_the_base_models_prefix(maker: str):
    for pattern in ("bert.encoder.layer.0", "encoder.layer.0", "*.layer.0", "bert.encoder.layer.0.*"):
        names = binary_names(MAKERS[maker](["classifier", "*pooler*", pattern]))
        assert names
        assert all(name.startswith("bert.encoder.layer.1.") for name in names)


def test_a_pattern_covers_all_within_a_module_of_any_model():
    assert binary_names(binarize_(net(), exclude=["encoder"])) == {"head"}
    assert binary_names(binarize_(net(), exclude=())) == {"encoder.0", "encoder.1", "head"}


def test_skip_is_an_older_name_of_exclude():
    assert binary_names(binarize_(net(), skip=["head"])) == {"encoder.0", "encoder.1"}
    config = tiny_config(skip=["classifier"])
    assert config.exclude == config.skip == ["classifier"]
    assert "skip" not in config.to_dict()
    config.skip = ["*pooler*"]
    assert config.exclude == ["*pooler*"]
    with pytest.raises(ValueError, match=r"exclude=\['a'\] and skip=\['b'\]: skip is an older name of exclude"):
        binarize_(net(), exclude=["a"], skip=["b"])
    with pytest.raises(ValueError, match="skip is an older name of exclude"):
        tiny_config(exclude=["a"], skip=["b"])


def test_the_config_of_an_older_checkpoint_is_read(tmp_path):
    model = tiny_model(exclude=["classifier", "*pooler*", "*.layer.1.*"])
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    older = json.loads(config.read_text())
    older["skip"] = older.pop("exclude")
    older.pop("config_sha256")
    config.write_text(json.dumps(older))
    again = BinaryBertForSequenceClassification.from_pretrained(tmp_path)
    assert binary_names(again) == binary_names(model)
    with pytest.raises(ValueError, match="expected a list of patterns"):
        BinaryBertForSequenceClassification.from_pretrained(tmp_path, skip="classifier")


def test_the_families_own_patterns_need_not_match_under_every_head():
    for config in (BinaryBertConfig(), BinaryViTConfig(), BinaryResNetConfig()):
        assert set(config.exclude) <= set(config.family_patterns)
    assert "classifier" not in binary_names(tiny_model())  # which has no `qa_outputs`


def test_a_stored_pattern_that_has_lost_its_module_is_warned_of(tmp_path, caplog, monkeypatch):
    tiny_model(exclude=["classifier", "*pooler*", "*.layer.1.*"]).save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", "hf_bnn"):
        BinaryBertForSequenceClassification.from_pretrained(tmp_path, exclude=["classifer"])
    assert "the exclude patterns ['classifer'] match no module of" in caplog.text


# What stays float by default


class Wrapped(nn.Module):
    """A transformers model within another module, which has a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.own = tiny_float_bert().bert, nn.Linear(32, 2)


def float_resnet() -> ResNetForImageClassification:
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))


@pytest.mark.parametrize("make", [tiny_float_bert, tiny_float_vit, float_resnet])
def test_binarize_leaves_float_what_the_plug_in_does(make: Callable[[], PreTrainedModel]):
    names = binary_names(binarize_(make()))
    assert names == binary_names(BinaryConfig().apply_(make()))
    assert not [name for name in names if "classifier" in name or "pooler" in name or "patch_embed" in name]


def test_a_transformers_model_within_another_module_keeps_its_poolers_float():
    names = binary_names(binarize_(Wrapped()))
    assert "own" in names
    assert "encoder.encoder.layer.0.output.dense" in names
    assert not [name for name in names if "pooler" in name]


def test_gpt2_whose_layers_cannot_be_binary_is_refused_with_what_they_are():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16))
    with pytest.raises(ValueError, match=r"nothing to binarize in GPT2LMHeadModel.*not be binary, are {.*'Conv1D': 8"):
        binarize_(model)


def test_a_model_that_is_itself_a_layer_is_refused():
    with pytest.raises(ValueError, match="nothing to binarize in Linear: no layer outside exclude"):
        binarize_(nn.Linear(4, 4))


def test_every_layer_of_any_other_model_becomes_binary_unless_it_is_excluded():
    assert binary_names(binarize_(TinyConvNet())) == {"0", "2", "4", "9"}


def test_a_layer_whose_weight_is_computed_cannot_be_binary():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"'0' cannot be binary: its weight is computed .* Add '0' to exclude"):
        binarize_(model)
    assert binary_names(binarize_(model, exclude=["0"])) == {"1"}


# Shared modules


class Shared(nn.Module):
    """One layer under three names, and a block of two layers under two."""

    def __init__(self, layer: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.steps, self.again = nn.ModuleList([layer, layer]), layer
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in (*self.steps, self.again, *self.blocks):
            x = step(x)
        return x


def shared(kind: str) -> tuple[Shared, torch.Tensor]:
    if kind == "conv2d":
        return Shared(nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(nn.Conv2d(8, 8, 1))), torch.randn(2, 8, 5, 5)
    return Shared(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))), torch.randn(2, 8)


def layers_of(model: Shared) -> Iterator[set[nn.Module]]:
    yield {*model.steps, model.again}
    yield {block[0] for block in model.blocks}


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_shared_module_is_one_binary_module_under_all_its_names(kind: str):
    model, x = shared(kind)
    binarize_(model).eval()
    assert all(len(found) == 1 and isinstance(*found, WeightedLayer) for found in layers_of(model))
    with torch.no_grad():
        expected = model(x)
        pack_(model)
        assert all(len(found) == 1 for found in layers_of(model))
        assert {value.dtype for name, value in model.state_dict().items() if name.endswith("weight")} == {torch.uint8}
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("pattern", ["steps.0", "steps.1", "again"])
def test_a_shared_module_stays_float_if_any_of_its_names_is_excluded(pattern: str):
    model, _ = shared("linear")
    assert binary_names(binarize_(model, exclude=[pattern])) == {"blocks.0.0"}


# How much became binary


def test_how_much_is_binary_is_said_in_a_line():
    model = binarize_(net(), exclude=["head"])
    expected = "88.9% of the weights are binary (2 layers); largest float blocks: head (11.1%)"
    for layer in (*model.encoder, model.head):
        layer.bias = None
    assert composition(model) == expected
    assert composition(pack_(model)) == expected
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8)) for _ in range(2)))
    assert composition(binarize_(blocks)).endswith("(2 layers); largest float blocks: *.1 (20.0%)")


def test_it_is_said_when_a_float_checkpoint_becomes_binary_and_at_no_other_time(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tiny_float_bert(**{"num_hidden_layers": 1, "vocab_size": SIZE["vocab_size"]}).save_pretrained(tmp_path / "float")
    with caplog.at_level("WARNING", "hf_bnn"):
        model = BinaryBertForSequenceClassification.from_pretrained(tmp_path / "float")
        BinaryConfig().apply_(tiny_float_bert())
    said = [r.getMessage() for r in caplog.records if "of the weights are binary" in r.getMessage()]
    assert [text.split(":")[0] for text in said] == [
        "BinaryBertForSequenceClassification",
        "BertForSequenceClassification",
    ]
    assert "bert.embeddings.word_embeddings" in said[0]
    model.save_pretrained(tmp_path / "latent")
    caplog.clear()
    BinaryBertForSequenceClassification.from_pretrained(tmp_path / "latent")
    assert "of the weights are binary" not in caplog.text


# The parts of the choice


@pytest.mark.parametrize(("channels", "binary"), [(1, False), (3, False), (4, True), (2, True)])
def test_a_convolution_of_as_many_channels_as_an_image_has_stays_float(channels: int, binary: bool):
    model = tiny_float_bert()
    model.bert.extra = nn.Conv2d(channels, 8, 1)
    assert ("bert.extra" not in default_exclude(model)) is binary
    model.config.num_channels = channels
    assert "bert.extra" in default_exclude(model)
    model.bert.extra = nn.Conv2d(channels, channels, 1, groups=channels)  # which mixes no channels
    assert ("bert.extra" in default_exclude(model)) is (channels == 1)


def test_layers_that_are_cast_back_to_float32_stay_float():
    model = tiny_float_bert()
    name = "bert.encoder.layer.0.intermediate.dense"
    assert name not in default_exclude(model)
    model._keep_in_fp32_modules = ["intermediate"]
    assert name in default_exclude(model)


def test_output_layers_are_ends_tied_or_not():
    for tied in (True, False):
        torch.manual_seed(0)
        size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, tie_word_embeddings=tied))
        assert "lm_head" in default_exclude(model)
        assert "model.layers.0.self_attn.q_proj" not in default_exclude(model)


def test_the_ends_are_the_output_embeddings_and_the_last_module_whichever_comes_last():
    ends = {"cls.predictions.decoder", "cls.seq_relationship"}
    assert _ends(BertForPreTraining(BertConfig(**SIZE, tie_word_embeddings=False))) == ends
    assert _ends(BertModel(BertConfig(**SIZE), add_pooling_layer=False)) == {"encoder.layer.1.output.LayerNorm"}


def test_an_include_pattern_that_matches_nothing_is_held_against_the_layers_alone():
    with pytest.raises(ValueError, match=r"include pattern '\*\.LayerNorm' matches no nn\.Linear or nn\.Conv2d of"):
        choose_layers(tiny_float_bert(), ["*.LayerNorm"], [])
    chosen = choose_layers(tiny_float_bert(), ["*.query"], [])
    assert set(chosen.values()) == {f"bert.encoder.layer.{n}.attention.self.query" for n in range(2)}
