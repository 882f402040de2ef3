"""A save that breaks off: what the folder held before can still be loaded."""

import os
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from hf_bnn import BinaryBertForSequenceClassification


def test_a_save_that_fails_at_the_weights_has_not_replaced_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = tiny_model(), tiny_model(weight_scaling="none")
    assert not torch.equal(*(next(model.parameters()) for model in (first, second)))
    first.save_pretrained(tmp_path)
    kept, moved, replace = (tmp_path / "config.json").read_text(), [], os.replace

    def failing(source: str | Path, target: str | Path) -> None:
        if Path(target).suffix == ".safetensors":
            raise OSError("no space left on device")
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match=r"could not save to .*: no space left on device"):
        second.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert "config.json" not in moved
    assert (tmp_path / "config.json").read_text() == kept
    again = BinaryBertForSequenceClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.state_dict().items())
    second.save_pretrained(tmp_path)
    again = BinaryBertForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.weight_scaling == "none"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_config_is_the_last_file_to_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, target: moved.append(Path(target).name) or replace(source, target)
    )
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(moved) > 3
    assert moved[-1] == "config.json"
