"""The heads of binary BERT: what is float in them, loading across heads, and the masked-language head's word table."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import StopAt, arguments
from tiny import SIZE, different, scramble, tiny_batch, tiny_config
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    set_seed,
)
from transformers.utils import logging

from hf_bnn import (
    BinaryBertForMaskedLM,
    BinaryBertForMultipleChoice,
    BinaryBertForQuestionAnswering,
    BinaryBertForSequenceClassification,
    BinaryBertForTokenClassification,
    BinaryBertModel,
    BinaryTrainer,
    pack_,
    summary,
    unpack_,
)
from hf_bnn.integrity import CorruptCheckpointError
from hf_bnn.nn.embeddings import BinaryEmbedding, Int8Embedding
from hf_bnn.nn.layers import BinaryLinear, binary_layers
from hf_bnn.training.checked_trainer import CheckedTrainer

WEIGHTS = "model.safetensors"
HEADS = {
    "model": (BertModel, BinaryBertModel, AutoModel),
    "masked_lm": (BertForMaskedLM, BinaryBertForMaskedLM, AutoModelForMaskedLM),
    "sequence": (
        BertForSequenceClassification,
        BinaryBertForSequenceClassification,
        AutoModelForSequenceClassification,
    ),
    "token": (BertForTokenClassification, BinaryBertForTokenClassification, AutoModelForTokenClassification),
    "choice": (BertForMultipleChoice, BinaryBertForMultipleChoice, AutoModelForMultipleChoice),
    "question": (BertForQuestionAnswering, BinaryBertForQuestionAnswering, AutoModelForQuestionAnswering),
}
FLOAT_LAYERS = {
    "model": {"pooler.dense"},
    "masked_lm": {"cls.predictions.transform.dense"},
    "sequence": {"bert.pooler.dense", "classifier"},
    "token": {"classifier"},
    "choice": {"bert.pooler.dense", "classifier"},
    "question": {"qa_outputs"},
}
every_head = pytest.mark.parametrize("head", HEADS)
every_table = pytest.mark.parametrize("embeddings", ["int8", "binary", "float"])
packed_or_not = pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    batch = {key: value for key, value in tiny_batch().items() if key != "labels"}
    choice = isinstance(model, BertForMultipleChoice)
    return {key: value.view(2, 2, -1) for key, value in batch.items()} if choice else batch


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    """All outputs of the head in evaluation, in one tensor."""
    return torch.cat([value.flatten() for value in model.eval()(**inputs(model)).to_tuple()])


def binary(head: str, **kwargs) -> nn.Module:
    return HEADS[head][1](tiny_config(**kwargs))


@every_head
@every_table
def test_every_head_loads_float_latent_and_packed_files_whole(tmp_path, head, embeddings):
    float_class, binary_class, auto = HEADS[head]
    scramble(float_class(BertConfig(**SIZE))).save_pretrained(tmp_path / "float")
    theirs = float_class.from_pretrained(tmp_path / "float").state_dict()
    latent, found = binary_class.from_pretrained(tmp_path / "float", embeddings=embeddings, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    ours = latent.state_dict()
    assert not different(
        {key: value for key, value in theirs.items() if key in ours}, {k: ours[k] for k in theirs if k in ours}
    )
    assert theirs.keys() - ours.keys() <= {"cls.predictions.decoder.weight"}
    scramble(latent).save_pretrained(tmp_path / "latent")
    again = auto.from_pretrained(tmp_path / "latent")
    assert type(again) is binary_class
    assert not different(again.state_dict(), latent.state_dict())
    expected = output(latent)
    assert torch.equal(output(again), expected)
    pack_(latent)
    assert torch.equal(output(latent), expected)
    latent.save_pretrained(tmp_path / "packed")
    packed, found = auto.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not different(packed.state_dict(), latent.state_dict())
    assert torch.equal(output(packed), expected)


@every_head
def test_heads_and_pooler_are_float(head):
    model = binary(head)
    layers = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, kind in layers.items() if kind is nn.Linear} == FLOAT_LAYERS[head]
    assert len(binary_layers(model)) == 12


@every_head
def test_every_head_learns(head):
    model = binary(head).train()
    batch = tiny_batch()
    labels = {
        "masked_lm": {"labels": batch["input_ids"]},
        "sequence": {"labels": batch["labels"]},
        "token": {"labels": batch["input_ids"] % 2},
        "choice": {"labels": batch["labels"][:2]},
        "question": {"start_positions": batch["labels"], "end_positions": batch["labels"] + 1},
    }.get(head)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    losses = []
    for _ in range(15):
        result = model(**inputs(model), **(labels or {}))
        loss = result.pooler_output.square().mean() if labels is None else result.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Across heads


@packed_or_not
@pytest.mark.parametrize("source", ["sequence", "masked_lm", "model"])
@every_head
def test_a_binary_encoder_moves_to_another_head(tmp_path, source, head, packed):
    model = scramble(binary(source))
    model = pack_(model) if packed else model
    model.save_pretrained(tmp_path)
    # A classifier of choices has one output: as in transformers, one of another size is not taken unless told to.
    settings = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    other, found = HEADS[head][2].from_pretrained(tmp_path, **settings)
    assert type(other) is HEADS[head][1]
    theirs, ours = (getattr(m, "bert", m).state_dict() for m in (model, other))
    assert {key.rpartition(".")[0] for key in theirs.keys() ^ ours.keys()} <= {"pooler.dense"}
    shared = theirs.keys() & ours.keys()
    assert not different({key: theirs[key] for key in shared}, {key: ours[key] for key in shared})
    assert found["missing_keys"] <= {key for key in other.state_dict() if "encoder" not in key and "embed" not in key}
    assert bool(output(other).isfinite().all())


@pytest.mark.parametrize("head", ["sequence", "masked_lm", "question"])
@pytest.mark.parametrize("source", [BertModel, BertForMaskedLM], ids=lambda cls: cls.__name__)
def test_a_float_encoder_moves_to_another_head(tmp_path, source, head):
    model = scramble(source(BertConfig(**SIZE)))
    model.save_pretrained(tmp_path)
    other = HEADS[head][1].from_pretrained(tmp_path)
    theirs, ours = getattr(model, "bert", model).state_dict(), other.bert.state_dict()
    shared = theirs.keys() & ours.keys()
    assert theirs.keys() - shared <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert not different({key: theirs[key] for key in shared}, {key: ours[key] for key in shared})


def test_a_fresh_head_is_reported_as_in_transformers(tmp_path, monkeypatch):
    pack_(binary("sequence")).save_pretrained(tmp_path)
    reports = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning", lambda text, *args: reports.append(text))
    logging.set_verbosity_warning()
    try:
        BinaryBertForQuestionAnswering.from_pretrained(tmp_path)
    finally:
        logging.set_verbosity_error()
    (report,) = reports
    assert "qa_outputs" in report
    assert "MISSING" in report
    assert "encoder" not in report


@pytest.mark.parametrize(
    ("key", "kwargs"),
    [
        ("bert.encoder.layer.0.output.dense.weight", {}),
        ("bert.encoder.layer.1.output.LayerNorm.bias", {}),
        ("bert.embeddings.word_embeddings.weight", {}),
        ("bert.embeddings.position_embeddings.weight", {}),
        ("classifier.weight", {"skip": ["*pooler*"]}),
        ("bert.pooler.dense.weight", {"embeddings": "binary"}),
    ],
    ids=str,
)
def test_packed_bits_and_encoders_must_be_complete(tmp_path, key, kwargs):
    model = pack_(binary("sequence", **kwargs))
    without(model, key, tmp_path)
    with pytest.raises(CorruptCheckpointError, match=f"the packed checkpoint .* lacks '{key}' .* fetch or save it"):
        BinaryBertForSequenceClassification.from_pretrained(tmp_path)


@packed_or_not
def test_a_float_pooler_and_head_may_be_missing(tmp_path, packed):
    model = pack_(binary("sequence")) if packed else binary("sequence")
    without(model, "bert.pooler.dense.weight", tmp_path)
    _, found = BinaryBertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert found["missing_keys"] == {"bert.pooler.dense.weight"}


def without(model: nn.Module, key: str, folder) -> None:
    """Save `model`, and take one tensor out of the file."""
    model.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    del tensors[key]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.weights_sha256 = None
    model.config.save_pretrained(folder)


# The masked-language head


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize("embeddings", ["int8", "binary"])
def test_the_word_table_is_in_the_file_once(tmp_path, embeddings, packed):
    model = binary("masked_lm", embeddings=embeddings, vocab_size=50)
    model = pack_(model) if packed else model
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert [key for key in stored if key.startswith("cls.predictions.decoder")] == []
    table = stored["bert.embeddings.word_embeddings.weight"]
    assert table.dtype == ({"int8": torch.int8, "binary": torch.uint8}[embeddings] if packed else torch.float32)
    vocabulary = [key for key, value in stored.items() if value.dim() == 2 and len(value) == 50]
    assert vocabulary == ["bert.embeddings.word_embeddings.weight"]


@pytest.mark.parametrize(("embeddings", "table"), [("int8", Int8Embedding), ("binary", BinaryEmbedding)])
def test_the_decoder_sees_the_rows_as_the_table_rounds_them(embeddings, table):
    model = binary("masked_lm", embeddings=embeddings)
    decoder, x = model.cls.predictions.decoder, torch.randn(3, SIZE["hidden_size"])
    weight = model.bert.embeddings.word_embeddings.weight
    integers, scale = table.quantize(weight.detach())
    rounded = integers.float() * scale.float().unsqueeze(-1)
    y = decoder(x)
    assert torch.equal(y, x @ rounded.T + model.cls.predictions.bias)
    assert not torch.allclose(y, x @ weight.T + model.cls.predictions.bias, atol=1e-6)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    torch.testing.assert_close(weight.grad, direction.T @ x)  # straight through, the padding token's row included
    assert weight.grad[0].abs().sum() > 0
    assert weight.grad is model.get_output_embeddings().weight.grad


def test_an_untied_decoder_is_a_layer_of_its_own(tmp_path):
    model = scramble(binary("masked_lm", tie_word_embeddings=False))
    assert type(model.cls.predictions.decoder) is nn.Linear
    expected = output(model)
    pack_(model).save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored["cls.predictions.decoder.weight"].dtype == torch.float32
    assert torch.equal(output(AutoModelForMaskedLM.from_pretrained(tmp_path)), expected)


def test_a_tied_decoder_of_a_float_table_cannot_be_binary():
    with pytest.raises(
        ValueError, match=r"makes 'cls\.predictions\.decoder' binary, but it is tied to float .* 'cls\.\*'"
    ):
        binary("masked_lm", embeddings="float", skip=["*pooler*"])
    model = binary("masked_lm", embeddings="float", skip=["*pooler*"], tie_word_embeddings=False)
    assert type(model.cls.predictions.decoder) is BinaryLinear


@every_table
def test_a_latent_vocabulary_is_resized_and_a_packed_one_is_refused(tmp_path, embeddings):
    model = binary("masked_lm", embeddings=embeddings)
    before = output(model).view(4, -1, SIZE["vocab_size"])
    model.resize_token_embeddings(SIZE["vocab_size"] + 3, mean_resizing=False)
    after = output(model).view(4, -1, SIZE["vocab_size"] + 3)
    assert torch.equal(after[..., : SIZE["vocab_size"]], before)
    assert type(model.bert.embeddings.word_embeddings) is type(
        binary("model", embeddings=embeddings).get_input_embeddings()
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModelForMaskedLM.from_pretrained(tmp_path)).view_as(after), after)
    pack_(model)
    assert torch.equal(output(model).view_as(after), after)
    if embeddings == "float":
        return
    with pytest.raises(ValueError, match=r"the word table is packed: .* Call hf_bnn\.unpack_\(model\), resize"):
        model.resize_token_embeddings(SIZE["vocab_size"])
    unpack_(model).resize_token_embeddings(SIZE["vocab_size"])
    torch.testing.assert_close(output(model), before.flatten())


def test_a_copy_of_a_masked_model_has_a_table_of_its_own():
    model = binary("masked_lm")
    expected = output(model)
    twin = pack_(copy.deepcopy(model))
    scramble(model)
    assert torch.equal(output(twin), expected)
    assert not torch.equal(output(model), expected)


def test_a_masked_model_compiles_without_a_graph_break():
    model = binary("masked_lm", num_hidden_layers=1).eval().requires_grad_(False)
    torch.compiler.reset()
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(**inputs(model)).logits, model(**inputs(model)).logits)


# A checkpoint has tied tensors once, the model has them twice: resuming must not take that for a misfit.


def masked_trainer(folder, **kwargs) -> BinaryTrainer:
    set_seed(0)
    return BinaryTrainer(binary("masked_lm"), arguments(folder, **kwargs), train_dataset=masked_rows())


def float_masked_trainer(folder, **kwargs) -> CheckedTrainer:
    set_seed(0)
    args = arguments(folder, **kwargs)
    return CheckedTrainer(BertForMaskedLM(BertConfig(**SIZE)), args, train_dataset=masked_rows())


def masked_rows() -> list[dict[str, torch.Tensor]]:
    ids = tiny_batch(16)["input_ids"]
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("make", [masked_trainer, float_masked_trainer])
def test_a_masked_run_ends_bit_for_bit_where_the_uninterrupted_one_does(tmp_path, make):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = make(tmp_path / "straight", **settings)
    straight.train()
    cut = make(tmp_path / "cut", **settings)
    cut.add_callback(StopAt(2))
    cut.train()
    resumed = make(tmp_path / "cut", **settings)
    scramble(resumed.model)
    resumed.train(resume_from_checkpoint=True)
    assert not different(resumed.model.state_dict(), straight.model.state_dict())


def test_the_summary_counts_a_tied_bias_once():
    model = BinaryBertForMaskedLM(tiny_config(levels="signed", ffn_levels="unsigned"))
    assert summary(model).weights == sum(p.numel() for p in {*model.parameters()})
