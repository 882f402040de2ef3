"""A model card's statements follow from the model's config, its tensors and its training run."""

import json
import re
from pathlib import Path

import pytest
import write_model_cards
from tiny import tiny_batch, tiny_model, tiny_resnet
from transformers import RobertaConfig, RobertaForSequenceClassification

from hf_bnn import BinaryConfig, BinaryTrainer, BinaryTrainingArguments, Surge, pack_, summary
from hf_bnn.model_card import TO_DO, completed, description, facts_of, usage

CARDS = Path(__file__).parents[1] / "model_cards"


def rows(text: str) -> dict[str, str]:
    """The table of a description."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))


def test_a_description_says_what_is_binary():
    model = tiny_model(attention="binary", binarize="weights")
    found = rows(description(facts_of(pack_(model), packed=True)))
    assert found["binary"].startswith("weights (inputs are float)")
    assert found["products of attention"] == "binary"
    assert found["word embeddings"] == "int8"
    assert found["float"] == "`classifier`, `cls.*`, `qa_outputs`, `*pooler*`"
    counted = summary(model)
    assert found["weights of which only the sign is used"] == f"{counted.binary_share:.1%} of all"
    assert found["their size, scales included"] == f"{counted.matrix_compression:.1f} times smaller than float32"


def test_it_does_not_speak_of_what_a_family_lacks():
    found = rows(description(facts_of(pack_(tiny_resnet()), packed=True)))
    assert not {"products of attention", "word embeddings", "levels of the inputs behind GELU"} & found.keys()
    assert found["levels of the inputs"] == "signed"


@pytest.mark.parametrize(
    ("binarize", "said"),
    [("activations", "inputs (weights are float)"), ("none", "nothing: a float network of the same structure")],
)
def test_it_claims_no_binary_weights_where_there_are_none(binarize, said):
    found = rows(description(facts_of(tiny_resnet(binarize=binarize), packed=False)))
    assert found["binary"].startswith(said)
    assert found["weights of which only the sign is used"] == "0.0% of all"
    assert "their size, scales included" not in found
    assert ("figures here are of the binary model" in usage(facts_of(tiny_resnet(binarize=binarize), False), "x")) == (
        binarize != "none"
    )


def test_it_tells_bits_from_latent_weights():
    model = tiny_model()
    assert "The file holds bits." in description(facts_of(model, packed=True))
    assert "it is no smaller than a float model's" in description(facts_of(model, packed=False))
    assert "optimize=True" in usage(facts_of(model, packed=True), "me/model")
    assert "optimize=True" not in usage(facts_of(model, packed=False), "me/model")


def test_the_usage_of_a_stock_class_imports_the_plug_in_first():
    config = RobertaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = BinaryConfig().apply_(RobertaForSequenceClassification(config))
    facts = facts_of(pack_(model), packed=True)
    code = usage(facts, "me/model")
    assert code.index("import hf_bnn") < code.index("from transformers import RobertaForSequenceClassification")
    assert "optimize" not in code
    assert "RobertaForSequenceClassification" in description(facts)


def test_usage_can_be_run(tmp_path):
    model = pack_(tiny_model())
    model.save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", usage(facts_of(model, packed=True), tmp_path.as_posix()), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["model"].config.weight_format == "packed"


@pytest.mark.parametrize("save_packed", [True, False])
def test_the_trainer_completes_its_draft(tmp_path, save_packed):
    arguments = BinaryTrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_packed=save_packed, disable_tqdm=True
    )
    rows_of_batch = [
        dict(zip(tiny_batch(), values, strict=True)) for values in zip(*tiny_batch().values(), strict=True)
    ]
    trainer = BinaryTrainer(tiny_model(), arguments, method=Surge(eta=0.1), train_dataset=rows_of_batch)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card.count(TO_DO) == 1  # of the data, which the trainer does not know
    found = rows(card)
    assert found["training method"].startswith("surge (clip=1.0, eta=0.1")
    assert ("The file holds bits" in card) == save_packed
    assert "## Model description\n\nA `BinaryBertForSequenceClassification`" in card


def test_a_card_without_open_sections_stays_as_it_is():
    assert completed("# mine\n", facts_of(tiny_model(), packed=True), "x") == "# mine\n"


def test_the_committed_cards_are_those_of_the_committed_runs():
    expected = write_model_cards.cards()
    assert expected == {path.name: path.read_text(encoding="utf-8") for path in CARDS.glob("*.md")}
    runs = {path.stem for path in write_model_cards.RESULTS.glob("quickstart*.json")}
    assert {name.removesuffix(".md") for name in expected} == runs


def test_a_card_has_the_figures_of_its_run():
    results = json.loads((write_model_cards.RESULTS / "quickstart.json").read_text())
    card = write_model_cards.card({**results, "accuracy_binary": 0.123, "seed": 17}, "name")
    assert "12.3%" in card
    assert "seed 17" in card
