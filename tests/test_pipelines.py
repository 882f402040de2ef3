"""transformers' pipelines on packed models from a folder, with a tokenizer or an image processor beside them."""

import re

import pytest
import torch
from PIL import Image
from tiny import VIT_SIZE, tiny_config
from transformers import BertTokenizer, ViTImageProcessorPil, pipeline
from transformers.utils import logging

from hf_bnn import (
    BinaryBertForMaskedLM,
    BinaryBertForSequenceClassification,
    BinaryBertForTokenClassification,
    BinaryBertModel,
    BinaryViTConfig,
    BinaryViTForImageClassification,
    pack_,
)
from hf_bnn.fused.base import Fused

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "sat", "on", "mat", "##s"]
TEXT = "the cat sat on the mat"


@pytest.fixture(autouse=True)
def complaints(monkeypatch):
    """The errors that transformers logs: it reports an unknown model class only there."""
    said: list[str] = []
    for module in ("pipelines.base", "modeling_utils", "tokenization_utils_base"):
        for level in ("warning", "error"):
            monkeypatch.setattr(
                f"transformers.{module}.logger.{level}", lambda text, *args, **kwargs: said.append(text)
            )
    logging.set_verbosity_warning()
    yield said
    logging.set_verbosity_error()
    assert not said


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(str(tmp_path / "vocab.txt"))


def save(model: torch.nn.Module, processor, folder) -> torch.nn.Module:
    """A folder with `model`, packed, and its tokenizer or image processor."""
    pack_(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def bert(cls: type, tokenizer, folder, **kwargs) -> torch.nn.Module:
    return save(cls(tiny_config(vocab_size=len(WORDS), **kwargs)), tokenizer, folder)


@torch.no_grad()
def expected(model: torch.nn.Module, tokenizer, text: str = TEXT) -> torch.Tensor:
    return model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)


def test_text_classification(tmp_path, tokenizer):
    model = bert(BinaryBertForSequenceClassification, tokenizer, tmp_path, num_labels=3)
    pipe = pipeline("text-classification", model=str(tmp_path), device="cpu")
    found = pipe(TEXT, top_k=None)
    assert type(pipe.model) is BinaryBertForSequenceClassification
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        {f"LABEL_{i}": score.item() for i, score in enumerate(expected(model, tokenizer))}
    )


def test_text_classification_with_an_optimized_model(tmp_path, tokenizer):
    model = bert(BinaryBertForSequenceClassification, tokenizer, tmp_path, num_labels=3)
    options = {"optimize": True}
    pipe = pipeline("text-classification", model=str(tmp_path), device="cpu", model_kwargs=options)
    assert any(isinstance(module, Fused) for module in pipe.model.modules())
    scores = sorted(expected(model, tokenizer).tolist(), reverse=True)
    assert [row["score"] for row in pipe(TEXT, top_k=None)] == pytest.approx(scores)


def test_fill_mask(tmp_path, tokenizer):
    model = bert(BinaryBertForMaskedLM, tokenizer, tmp_path)
    text = "the [MASK] sat on the mat"
    found = pipeline("fill-mask", model=str(tmp_path), device="cpu")(text, top_k=3)
    scores = expected(model, tokenizer, text)[2].topk(3)
    assert [row["token"] for row in found] == scores.indices.tolist()
    assert [row["score"] for row in found] == pytest.approx(scores.values.tolist())


def test_token_classification(tmp_path, tokenizer):
    model = bert(BinaryBertForTokenClassification, tokenizer, tmp_path, num_labels=3)
    found = pipeline("token-classification", model=str(tmp_path), device="cpu", ignore_labels=[])(TEXT)
    scores = expected(model, tokenizer)[1:-1].max(-1)
    assert [row["entity"] for row in found] == [f"LABEL_{i}" for i in scores.indices.tolist()]
    assert [row["score"] for row in found] == pytest.approx(scores.values.tolist())


def test_feature_extraction(tmp_path, tokenizer):
    model = bert(BinaryBertModel, tokenizer, tmp_path)
    found = pipeline("feature-extraction", model=str(tmp_path), device="cpu", return_tensors=True)(TEXT)
    with torch.no_grad():
        assert torch.equal(found, model(**tokenizer(TEXT, return_tensors="pt")).last_hidden_state)


def test_image_classification_without_torchvision(tmp_path):
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    model = save(BinaryViTForImageClassification(BinaryViTConfig(**VIT_SIZE)), processor, tmp_path)
    image = Image.fromarray(torch.randint(256, (12, 20, 3), dtype=torch.uint8).numpy())
    found = pipeline("image-classification", model=str(tmp_path), device="cpu")(image)
    with torch.no_grad():
        scores = model(**processor(image, return_tensors="pt")).logits[0].softmax(-1)
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        {f"LABEL_{i}": score.item() for i, score in enumerate(scores)}
    )


def test_a_class_that_a_pipeline_does_not_know_is_complained_of(tmp_path, tokenizer, complaints):
    model = bert(BinaryBertForTokenClassification, tokenizer, tmp_path)
    pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    (text,) = complaints
    assert re.match("The model 'BinaryBertForTokenClassification' is not supported for text-classification", text)
    complaints.clear()
