"""Uploads to the Hub: the model and its own card, without tokens or local paths."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from fake_hub import FakeHub
from test_trainer import trainer
from tiny import tiny_model, tiny_resnet, tiny_vit
from transformers import BertTokenizer, RobertaConfig, RobertaForSequenceClassification

from hf_bnn import BinaryBertForSequenceClassification, BinaryConfig, pack_
from hf_bnn.model_card import TO_DO, without_paths
from hf_bnn.training.uploads import public

TOKEN = "hf_secretSecretSecret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub(lfs_over=10**8) as server:
        constants = huggingface_hub.constants
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        yield server


def roberta():
    config = RobertaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    return BinaryConfig().apply_(RobertaForSequenceClassification(config))


@pytest.mark.parametrize("make", [tiny_model, tiny_vit, tiny_resnet, roberta])
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_that_is_pushed_has_a_card_of_its_own(hub, make, packed):
    model = pack_(make()) if packed else make()
    model.push_to_hub("tester/tiny", token=TOKEN)
    files = hub.files("model", "tester/tiny")
    card = files["README.md"].decode()
    assert f"A `{type(model).__name__}` of hf_bnn" in card
    assert ("The file holds bits." in card) == packed
    assert 'from_pretrained("tester/tiny"' in card
    assert "automatically generated" not in card
    assert re.match(r"---\n(.*\n)*tags:\n- binary\n- hf_bnn\n(.*\n)*?---\n", card)
    assert json.loads(files["config.json"])


def test_a_card_that_someone_has_written_stays(hub):
    hub.add("model", "tester/tiny", {"README.md": b"---\nlicense: mit\n---\n# Mine\n"})
    pack_(tiny_model()).push_to_hub("tester/tiny", token=TOKEN)
    assert "# Mine" in hub.files("model", "tester/tiny")["README.md"].decode()


def test_saving_with_push_pushes_the_card_too(hub, tmp_path):
    pack_(tiny_model()).save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="tester/saved", token=TOKEN)
    assert "The file holds bits." in hub.files("model", "tester/saved")["README.md"].decode()


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_a_trainer_uploads_no_token_and_no_path_of_the_machine(hub, tmp_path, strategy):
    tiny_model().save_pretrained(tmp_path / "base")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    run = trainer(
        tmp_path / "run",
        BinaryBertForSequenceClassification.from_pretrained(tmp_path / "base"),
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id="tester/run",
        hub_token=TOKEN,
        hub_strategy=strategy,
        hub_always_push=True,
    )
    run.processing_class = BertTokenizer(vocab=vocabulary)
    run.train()
    run.save_state()
    run.push_to_hub(finetuned_from=str(tmp_path / "base"), dataset=str(tmp_path / "data"))
    assert run.args.hub_token == TOKEN
    assert run.args.output_dir == str(tmp_path / "run")
    files = hub.files("model", "tester/run")
    assert {"README.md", "config.json", "model.safetensors"} <= files.keys()
    assert "training_args.bin" not in files
    assert ("last-checkpoint/training_args.bin" in files) == (strategy == "checkpoint")
    for name, data in files.items():
        assert TOKEN.encode() not in data, name
        if not name.startswith("last-checkpoint/"):
            assert str(tmp_path).encode() not in data, name
    for path in (tmp_path / "run").rglob("training_args.bin"):
        assert TOKEN.encode() not in path.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()


def test_the_arguments_that_are_saved_can_be_read_and_the_trainers_own_stay(tmp_path):
    run = trainer(tmp_path, hub_token=TOKEN, max_steps=1)
    run.save_model(str(tmp_path / "out"))
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)  # written by this test
    assert saved.hub_token is None
    assert saved.output_dir == tmp_path.name
    assert saved.max_steps == run.args.max_steps
    assert run.args.hub_token == TOKEN
    assert public(run.args).learning_rate == run.args.learning_rate


def test_a_card_names_no_local_folder(tmp_path):
    card = f"---\nbase_model: {tmp_path}\ntags:\n---\nA version of [{tmp_path}](https://huggingface.co/{tmp_path}).\n"
    assert without_paths(card, [str(tmp_path), None]) == f"---\ntags:\n---\nA version of {tmp_path.name}.\n"
    assert without_paths("base_model: google/bert\n", ["google/bert"]) == "base_model: google/bert\n"


def test_the_trainers_card_tells_its_users_a_name_and_no_folder(tmp_path):
    run = trainer(tmp_path / "here", max_steps=1)
    run.train()
    run.create_model_card()
    card = (tmp_path / "here" / "README.md").read_text()
    assert 'from_pretrained("here", optimize=True)' in card
    assert str(tmp_path) not in card
    assert TO_DO in card
