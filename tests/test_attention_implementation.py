"""Binary attention stays binary, whoever changes the implementation; masks of every kind; cross-attention."""

import copy

import pytest
import torch
from tiny import scramble, tiny_batch, tiny_config, tiny_images, tiny_model, tiny_vit
from torch import Tensor, nn
from transformers import BertConfig, BertModel, EncoderDecoderModel

from hf_bnn import BinaryBertModel, kernels, optimize_, pack_
from hf_bnn.fused.attention import fuse_attention
from hf_bnn.nn.attention import BinaryAttention, BooleanAttention

STATES = {"latent": lambda model: model.eval(), "packed": pack_, "optimized": lambda model: optimize_(pack_(model))}


def run(model: nn.Module, **more: Tensor) -> Tensor:
    batch = tiny_images() if hasattr(model.config, "num_channels") else tiny_batch()
    batch = {**batch, **more}
    del batch["labels"]
    with torch.no_grad():
        return model(**batch)[0]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("attention", ["binary", "boolean"])
@pytest.mark.parametrize("make", [tiny_model, tiny_vit])
def test_binary_attention_cannot_be_made_float(make, attention: str, state: str):
    model = STATES[state](scramble(make(attention=attention)))
    before = run(model)
    expected = f"computes float attention, but this model has attention='{attention}'.*output_attentions=True"
    for asked in ("sdpa", "eager", {"": "eager"}):
        with pytest.raises(ValueError, match=expected):
            model.set_attn_implementation(asked)
    with pytest.raises(ValueError, match=expected):
        model.config._attn_implementation = "sdpa"
    model.set_attn_implementation("hf_bnn")
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("make", [tiny_model, tiny_vit])
@pytest.mark.parametrize("settings", [{}, {"binarize": "none", "attention": "binary"}])
def test_float_attention_cannot_be_made_binary(make, settings: dict):
    model = make(**settings).eval()
    with pytest.raises(ValueError, match=r"is for binary attention, but this model has attention=.*choose 'sdpa'"):
        model.set_attn_implementation("hf_bnn")
    eager, sdpa = [(model.set_attn_implementation(name), run(model))[1] for name in ("eager", "sdpa")]
    torch.testing.assert_close(eager, sdpa)


def test_a_model_around_a_binary_one_cannot_make_it_float():
    float_decoder = BertModel(BertConfig(**tiny_config().to_diff_dict() | {"is_decoder": True}))
    float_decoder.config.add_cross_attention = True
    model = EncoderDecoderModel(encoder=BinaryBertModel(tiny_config(attention="binary")), decoder=float_decoder)
    with pytest.raises(ValueError, match="attn_implementation='sdpa' computes float attention"):
        model.set_attn_implementation("sdpa")
    assert model.encoder.config._attn_implementation == "hf_bnn"


@pytest.mark.parametrize("asked", ["eager", "sdpa", None])
def test_loading_keeps_binary_attention_whatever_is_asked(asked, tmp_path):
    model = pack_(scramble(tiny_model(attention="boolean")))
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path, attn_implementation=asked).eval()), run(model))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("attention", ["binary", "boolean"])
def test_a_boolean_mask_of_four_dimensions_shuts_tokens_out(attention: str, state: str):
    model = STATES[state](scramble(tiny_model(attention=attention)))
    padding = tiny_batch()["attention_mask"]
    mask = padding.bool()[:, None, None, :].expand(-1, 1, padding.shape[1], -1)
    assert torch.equal(run(model, attention_mask=mask), run(model))
    assert not torch.equal(run(model, attention_mask=torch.ones_like(mask)), run(model))
    with pytest.raises(ValueError, match=r"mask of torch.int64 and shape \(4, 1, 6, 6\).*mask.bool\(\)"):
        run(model, attention_mask=mask.long())


@pytest.mark.parametrize("kind", [BinaryAttention, BooleanAttention])
@torch.no_grad()
def test_a_boolean_mask_equals_the_additive_one(kind: type):
    plain = scramble(kind()).eval()
    fused = copy.deepcopy(plain)
    fuse_attention(fused)
    inputs, allowed = torch.randn(3, 2, 2, 5, 8), torch.rand(2, 1, 5, 5) > 0.3
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    for attention in (plain, fused):
        found = attention(*inputs, mask=allowed, scaling=0.3)[0]
        assert torch.equal(found, plain(*inputs, mask=added, scaling=0.3)[0])
    with pytest.raises(ValueError, match=r"a mask of torch.bool: expected floats, which are added to the scores"):
        kernels.attention(*inputs, fused.kernel_levels, 0.3, allowed)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("attention", ["float", "binary", "boolean"])
@torch.no_grad()
def test_cross_attention_is_binary_too_and_heeds_its_mask(attention: str, state: str):
    config = tiny_config(attention=attention, is_decoder=True, add_cross_attention=True)
    latent = scramble(BinaryBertModel(config, add_pooling_layer=False)).eval()
    cross = latent.encoder.layer[0].crossattention.self
    assert hasattr(cross, "binary_attention") == (attention != "float")
    ids, memory = tiny_batch()["input_ids"], torch.randn(4, 5, 32)
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[:, 3:] = 0
    expected = latent(ids, encoder_hidden_states=memory, encoder_attention_mask=mask)[0]
    model = STATES[state](latent)
    found = model(ids, encoder_hidden_states=memory, encoder_attention_mask=mask)[0]
    assert torch.equal(found, expected)
    memory[:, 3:] += 1
    assert torch.equal(model(ids, encoder_hidden_states=memory, encoder_attention_mask=mask)[0], expected)
    memory[:, :3] += 1
    assert not torch.equal(model(ids, encoder_hidden_states=memory, encoder_attention_mask=mask)[0], expected)


def test_cross_attention_learns():
    model = BinaryBertModel(tiny_config(attention="binary", is_decoder=True, add_cross_attention=True)).train()
    model(tiny_batch()["input_ids"], encoder_hidden_states=torch.randn(4, 5, 32))[0].sum().backward()
    assert model.encoder.layer[0].crossattention.self.query.weight.grad.abs().sum() > 0
