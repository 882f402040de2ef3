"""Latent weights learn in float32 or float64, and a cast leaves the scales of a packed model alone."""

import copy
import logging

import pytest
import torch
from test_trainer import trainer
from tiny import scramble, tiny_batch, tiny_float_bert, tiny_images, tiny_model, tiny_resnet, tiny_vit
from torch import nn
from transformers import BertForSequenceClassification, TrainerCallback

from hf_bnn import BinaryBertForSequenceClassification, BinaryConfig, binarize_, pack_
from hf_bnn.nn.layers import HALF, BinaryLinear
from hf_bnn.training.precision import upcast_


class Start(TrainerCallback):
    """Keeps the parameters with which the training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}


def from_half_checkpoint(folder, kind: str, dtype: torch.dtype) -> nn.Module:
    """A binary model as from_pretrained makes it of a float checkpoint in `dtype`."""
    tiny_float_bert().to(dtype).save_pretrained(folder)
    if kind == "class":
        return BinaryBertForSequenceClassification.from_pretrained(folder, dtype="auto")
    return BertForSequenceClassification.from_pretrained(folder, dtype="auto", quantization_config=BinaryConfig())


@pytest.mark.parametrize(("kind", "dtype"), [("class", torch.bfloat16), ("quantizer", torch.float16)], ids=str)
def test_a_half_precision_checkpoint_is_trained_and_saved_in_float32(tmp_path, kind, dtype, caplog):
    model, start = from_half_checkpoint(tmp_path / "half", kind, dtype), Start()
    assert model.bert.encoder.layer[0].output.dense.weight.dtype == dtype
    with caplog.at_level(logging.WARNING):
        one = trainer(tmp_path, model, max_steps=3, learning_rate=5e-4, callbacks=[start])
    assert f"was in {str(dtype)[6:]}, in which most updates of latent weights are rounded away" in caplog.text
    one.train()
    moved = {name: float((p != start.values[name]).float().mean()) for name, p in model.named_parameters()}
    for part in ("query.weight", "LayerNorm.weight", "width"):
        assert min(share for name, share in moved.items() if name.endswith(part)) > 0.9
    one.args.save_packed = False
    one.save_model()
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again(**tiny_batch()).logits, model.eval()(**tiny_batch()).logits)


def test_what_is_float32_or_does_not_learn_stays_as_it_is(caplog):
    with caplog.at_level(logging.WARNING):
        assert upcast_(tiny_model().double()).dtype == torch.float64
        assert upcast_(tiny_model().bfloat16().requires_grad_(False)).dtype == torch.bfloat16
        assert upcast_(tiny_float_bert().bfloat16()).dtype == torch.bfloat16
    assert not caplog.records


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("binarize", ["both", "weights", "activations"])
@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(8, 8, 1)], ids=["linear", "conv2d"])
def test_a_hand_loop_on_half_precision_latents_is_refused(layer, binarize, dtype):
    model = binarize_(nn.Sequential(copy.deepcopy(layer)), binarize=binarize).to(dtype).train()
    x = torch.randn(2, 8, dtype=dtype) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 3, 3, dtype=dtype)

    def step() -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(x).sum().backward()
        optimizer.step()

    model(x).sum().backward()  # gradients alone are no fault
    step()
    with pytest.raises(ValueError, match=rf"latent weights in {dtype} do not learn: .* Call model\.float\(\)"):
        step()
    with torch.no_grad():
        model(x)
    model.eval()(x)
    copy.deepcopy(model).train()(x)
    model.train()[0].master_weights = True
    step()
    step()
    model[0].master_weights = False
    model.float()
    x = x.float()
    step()
    step()


@pytest.mark.parametrize("kind", ["class", "quantizer"])
def test_a_hand_loop_on_a_half_precision_model_is_refused(tmp_path, kind):
    model = from_half_checkpoint(tmp_path, kind, torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(**tiny_batch()).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"latent weights in torch\.bfloat16 do not learn"):
        model(**tiny_batch())


def test_autocast_leaves_the_latents_in_float32_and_is_allowed():
    model = binarize_(nn.Sequential(nn.Linear(8, 8))).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 8)).sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


# float64

MODELS = {
    "bert": (tiny_model, tiny_batch),
    "bert with binary tables and attention": (
        lambda: tiny_model(embeddings="binary", attention="binary"),
        tiny_batch,
    ),
    "vit": (tiny_vit, tiny_images),
    "resnet": (tiny_resnet, tiny_images),
}


@torch.no_grad()
def double_logits(model, batch):
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("name", MODELS)
def test_in_float64_packed_equals_latent_whichever_came_first_and_reloaded(tmp_path, name):
    make, batch = MODELS[name]
    latent = scramble(make())
    cast_later = pack_(copy.deepcopy(latent)).double()
    expected = double_logits(latent.double(), batch())
    assert expected.dtype == torch.float64
    packed = pack_(copy.deepcopy(latent))
    assert torch.equal(double_logits(packed, batch()), expected)
    assert torch.equal(double_logits(cast_later, batch()), expected)
    packed.save_pretrained(tmp_path)
    assert torch.equal(double_logits(type(packed).from_pretrained(tmp_path), batch()), expected)


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_a_cast_and_back_leaves_a_packed_model_as_it_was(dtype):
    model = pack_(scramble(tiny_model(embeddings="binary")))
    scales = {name: b.clone() for name, b in model.named_buffers() if name.endswith("weight_scale")}
    model.to(dtype)
    now = dict(model.named_buffers())
    assert scales
    assert all(now[name].dtype == scale.dtype and torch.equal(now[name], scale) for name, scale in scales.items())


def test_half_precision_latents_beside_packed_layers_are_refused():
    layer = BinaryLinear(8, 8).bfloat16()
    with pytest.raises(ValueError, match="is in part packed and in part latent"):
        upcast_(nn.ModuleList([layer, pack_(binarize_(nn.Sequential(nn.Linear(8, 8))))]))
