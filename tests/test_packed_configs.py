"""The config in memory says what the weights are; a vocabulary that is resized keeps a binary output layer binary."""

import copy

import pytest
import torch
from tiny import SIZE, scramble, tiny_batch, tiny_images, tiny_model, tiny_resnet, tiny_vit
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_bnn import BinaryBertForMaskedLM, BinaryConfig, BinaryResNetConfig, optimize_, pack_, unpack_
from hf_bnn.nn.layers import BinaryLinear
from hf_bnn.nn.packed import is_packed


@pytest.mark.parametrize("make", [tiny_model, tiny_vit, tiny_resnet])
@torch.no_grad()
def test_a_model_is_made_again_of_its_config_and_its_tensors(make):
    model = scramble(make()).eval()
    inputs = tiny_batch() if make is tiny_model else tiny_images()
    del inputs["labels"]
    for step, expected in ((lambda m: m, "latent"), (pack_, "packed"), (optimize_, "packed"), (unpack_, "latent")):
        step(model).eval()
        assert model.config.weight_format == expected
        config = copy.deepcopy(model.config)
        again = type(model).from_pretrained(None, config=config, state_dict=model.state_dict()).eval()
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_packing_a_copy_says_nothing_of_the_original():
    model = tiny_model()
    assert pack_(copy.deepcopy(model)).config.weight_format == "packed"
    assert model.config.weight_format == "latent"


def test_the_config_of_any_other_architecture_says_so_too():
    model = BinaryConfig().apply_(LlamaForCausalLM(llama()))
    assert pack_(model).config.quantization_config.weight_format == "packed"
    assert unpack_(model).config.quantization_config.weight_format == "latent"


@pytest.mark.filterwarnings("ignore:.*antialias:UserWarning")
@torch.no_grad()
def test_a_network_around_a_packed_backbone_is_reloaded(tmp_path):
    sizes = {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "stem": "cifar"}
    backbone = BinaryResNetConfig(**sizes, out_features=["stage1", "stage2"])
    config = UperNetConfig(backbone_config=backbone, hidden_size=8, pool_scales=[1, 2], use_auxiliary_head=False)
    model = UperNetForSemanticSegmentation(config).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = model(images).logits
    pack_(model).save_pretrained(tmp_path)
    assert torch.equal(model(images).logits, expected)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert is_packed(again)
    assert again.config.backbone_config.weight_format == "packed"
    assert torch.equal(again(images).logits, expected)


def llama() -> LlamaConfig:
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaConfig(**size, num_attention_heads=2, tie_word_embeddings=False)


def with_binary_head(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return BinaryConfig(exclude=[]).apply_(LlamaForCausalLM(llama()))
    config = BinaryBertForMaskedLM.config_class(**SIZE, skip=[], tie_word_embeddings=False)
    return BinaryBertForMaskedLM(config)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(tiny_batch()["input_ids"]).logits


@pytest.mark.parametrize("rows", [70, 50])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_resized_binary_head_stays_binary_and_keeps_its_logits(kind: str, rows: int, tmp_path):
    model = with_binary_head(kind)
    before, kept = logits(model), min(rows, 64)
    model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    assert isinstance(head, BinaryLinear)
    assert head.out_features == rows
    batch = tiny_batch()["input_ids"].clamp_max(kept - 1)
    if rows > 64:
        assert torch.equal(logits(model)[..., :kept], before)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path) if kind == "bert" else AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(batch).logits
        assert torch.equal(again.eval()(batch).logits, expected)
        assert torch.equal(pack_(again)(batch).logits, expected)
    model.train()(batch, labels=batch).loss.backward()
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_packed_head_is_not_resized(kind: str, optimized: bool):
    model = pack_(with_binary_head(kind))
    before = logits(optimize_(model) if optimized else model)
    part = "output layer" if kind == "llama" else "word table"
    with pytest.raises(ValueError, match=rf"the {part} is packed.*hf_bnn.unpack_\(model\), resize"):
        model.resize_token_embeddings(70)
    assert torch.equal(logits(model), before)
