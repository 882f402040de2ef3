"""Half and double precision: packed and optimized models run in them, and compute what the latent one does."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import (
    different,
    scramble,
    tiny_batch,
    tiny_config,
    tiny_float_bert,
    tiny_images,
    tiny_model,
    tiny_resnet,
    tiny_vit,
)
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_bnn import (
    BinaryBertForMaskedLM,
    BinaryBertForMultipleChoice,
    BinaryBertForQuestionAnswering,
    BinaryBertForSequenceClassification,
    BinaryBertForTokenClassification,
    BinaryBertModel,
    BinaryConfig,
    BinaryResNetBackbone,
    BinaryResNetConfig,
    BinaryViTConfig,
    BinaryViTForMaskedImageModeling,
    optimize_,
    pack_,
    unpack_,
)
from hf_bnn.nn.embeddings import BinaryEmbedding, Int8Embedding
from hf_bnn.nn.packed import PACKED, is_packed

DTYPES = [torch.bfloat16, torch.float16, torch.float64]
ONE = {"num_hidden_layers": 1}


def run(model: nn.Module) -> Tensor:
    if "pixel_values" in model.main_input_name:
        batch = {"pixel_values": tiny_images(rows=2)["pixel_values"].to(next(model.parameters()).dtype)}
    else:
        batch = {key: value for key, value in tiny_batch(rows=4).items() if key != "labels"}
    if "MultipleChoice" in type(model).__name__:
        batch = {key: value.view(2, 2, -1) for key, value in batch.items()}
    with torch.no_grad():
        output = model(**batch)[0]
    return output[0] if isinstance(output, tuple) else output


MODELS = {
    "bert": lambda: tiny_model(**ONE),
    "bert-signed": lambda: tiny_model(levels="signed", ffn_levels="unsigned", **ONE),
    "bert-binary": lambda: tiny_model(attention="binary", embeddings="binary", **ONE),
    "bert-boolean": lambda: tiny_model(attention="boolean", **ONE),
    "bert-weights": lambda: tiny_model(binarize="weights", **ONE),
    "bert-model": lambda: BinaryBertModel(tiny_config(**ONE)),
    "bert-tokens": lambda: BinaryBertForTokenClassification(tiny_config(**ONE)),
    "bert-choice": lambda: BinaryBertForMultipleChoice(tiny_config(**ONE)),
    "bert-answers": lambda: BinaryBertForQuestionAnswering(tiny_config(**ONE)),
    "bert-masked": lambda: BinaryBertForMaskedLM(tiny_config(**ONE)),
    "vit": lambda: tiny_vit(attention="binary", **ONE),
    "vit-masked": lambda: BinaryViTForMaskedImageModeling(
        BinaryViTConfig(
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=8,
            patch_size=4,
            encoder_stride=4,
            **ONE,
        )
    ),
    "resnet": lambda: tiny_resnet(levels="rsign", block_activation="rprelu"),
    "resnet-elastic": lambda: tiny_resnet(levels="elastic", layer_type="bottleneck", hidden_sizes=[32, 64]),
    "backbone": lambda: BinaryResNetBackbone(
        BinaryResNetConfig(layer_type="basic", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], stem="cifar")
    ),
}


def exact(model: nn.Module) -> bool:
    """Whether products are of signs alone, and sums so exact: a kernel adds floats in an order of its own."""
    return all(getattr(m, "binary_inputs", True) for m in model.modules())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_packed_and_optimized_equal_latent(name: str, dtype: torch.dtype):
    latent = scramble(MODELS[name]()).to(dtype).eval()
    expected = run(latent)
    assert expected.dtype == dtype
    packed = pack_(latent)
    assert torch.equal(run(packed), expected)
    optimized = optimize_(packed)
    if exact(optimized):
        assert torch.equal(run(optimized), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bert", "bert-binary", "bert-masked", "vit", "resnet"])
def test_a_packed_model_can_be_cast_and_keeps_its_scales(name: str, dtype: torch.dtype):
    packed = pack_(scramble(MODELS[name]()))
    optimized = optimize_(copy.deepcopy(packed))
    scales = {key: value for key, value in packed.state_dict().items() if key.endswith("weight_scale")}
    expected = run(packed.to(dtype))
    assert expected.dtype == dtype
    assert torch.equal(run(optimized.to(dtype)), expected)
    for model in (packed, optimized):
        assert not different(scales, {key: value for key, value in model.state_dict().items() if key in scales})
    assert run(packed.float()).dtype == run(optimized.float()).dtype == torch.float32
    assert torch.equal(run(packed), run(optimized))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
@pytest.mark.parametrize("kind", [Int8Embedding, BinaryEmbedding])
def test_a_table_puts_out_what_it_is_cast_to(kind: type, cast: Callable):
    latent = cast(kind(10, 12))
    table, ids = PACKED[kind].from_latent(latent), torch.arange(10)
    assert torch.equal(table(ids), latent(ids))
    assert table(ids).dtype == latent.weight.dtype == table.to_latent().weight.dtype
    assert torch.equal(cast(table.float())(ids), latent(ids))


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_packed_checkpoint_is_loaded_in_another_dtype(dtype: torch.dtype, optimize: bool, tmp_path):
    packed = pack_(scramble(tiny_model(**ONE)))
    packed.save_pretrained(tmp_path)
    loaded = BinaryBertForSequenceClassification.from_pretrained(tmp_path, dtype=dtype, optimize=optimize).eval()
    assert loaded.dtype == dtype
    assert torch.equal(run(loaded), run(packed.to(dtype)))


def test_a_bfloat16_checkpoint_trains_packs_and_reloads(tmp_path):
    tiny_float_bert(**ONE).to(torch.bfloat16).save_pretrained(tmp_path / "float")
    model = BinaryBertForSequenceClassification.from_pretrained(tmp_path / "float", dtype="auto")
    assert model.dtype == torch.bfloat16
    model(**tiny_batch()).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    expected = run(model.eval())
    pack_(model).save_pretrained(tmp_path / "packed")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed").eval()
    assert is_packed(again)
    assert torch.equal(run(again), expected)
    assert torch.equal(run(optimize_(again)), expected)
    assert run(unpack_(again).eval()).dtype == torch.bfloat16


def test_any_other_architecture_is_loaded_packed_in_bfloat16(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = BinaryConfig().apply_(LlamaForCausalLM(config)).to(torch.bfloat16).eval()
    ids = tiny_batch()["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        pack_(model).save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        assert torch.equal(again(ids).logits, expected)
        assert torch.equal(optimize_(again)(ids).logits, expected)
