"""Levels have one dimension, and checkpoints in which they have none still load: as files, in memory, and to resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantizer import CASES
from test_trainer import StopAt, trainer
from tiny import different, scramble, tiny_batch, tiny_images, tiny_model, tiny_vit
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from hf_bnn import pack_
from hf_bnn.integrity import file_digest, write_manifest
from hf_bnn.nn.levels import BooleanLevels, ElasticLevels
from hf_bnn.nn.scalar_levels import take_scalar_states


def with_scalars(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As it was saved when the parameters of elastic levels were scalars."""
    old = {
        key: t.view(()) if key.endswith((".width", ".offset")) and t.shape == (1,) else t for key, t in state.items()
    }
    assert any(tensor.dim() == 0 for tensor in old.values())
    return old


def make_old(folder: Path) -> None:
    """Write a saved model again as it would have been written then, with the digests of then."""
    (path,) = folder.glob("*.safetensors")
    save_file(with_scalars(load_file(path)), path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.get("quantization_config", config)["weights_sha256"] = {path.name: file_digest(path)}
    (folder / "config.json").write_text(json.dumps(config))


def bert(folder: Path) -> tuple[PreTrainedModel, type, dict]:
    return tiny_model(attention="boolean"), AutoModelForSequenceClassification, tiny_batch()


def vit(folder: Path) -> tuple[PreTrainedModel, type, dict]:  # its files have other names than its modules
    return tiny_vit(attention="binary"), AutoModelForImageClassification, tiny_images()


def distilbert(folder: Path) -> tuple[PreTrainedModel, type, dict]:
    case = CASES["distilbert"]
    return case.binary(folder), case.auto, case.batch


def deit(folder: Path) -> tuple[PreTrainedModel, type, dict]:
    case = CASES["deit"]
    return case.binary(folder), case.auto, case.batch


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize("make", [bert, vit, distilbert, deit])
def test_a_checkpoint_with_scalar_levels_loads_and_computes_the_same(make, packed: bool, tmp_path: Path):
    model, auto, batch = make(tmp_path)
    scramble(model).eval()
    model = pack_(model) if packed else model
    model.save_pretrained(tmp_path / "old")
    make_old(tmp_path / "old")
    loaded, report = auto.from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert different(loaded.state_dict(), model.state_dict()) == []
    levels = [module for module in loaded.modules() if isinstance(module, ElasticLevels)]
    assert levels
    assert {parameter.shape for module in levels for parameter in module.parameters()} == {(1,)}
    assert not any(module.fresh for module in levels)  # fitted ones must not be fitted anew
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)
    loaded.save_pretrained(tmp_path / "new")
    assert different(auto.from_pretrained(tmp_path / "new").state_dict(), model.state_dict()) == []


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
def test_a_state_dict_with_scalar_levels_loads(packed: bool):
    model, other = scramble(tiny_model(attention="boolean")), tiny_model(attention="boolean")
    model, other = (pack_(model), pack_(other)) if packed else (model, other)
    old = with_scalars(model.state_dict())
    other.load_state_dict(old)
    assert different(other.state_dict(), model.state_dict()) == []
    model.config.weight_format = "packed" if packed else "latent"  # what says how to read the tensors
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=old)
    assert different(loaded.state_dict(), model.state_dict()) == []


def test_a_run_whose_checkpoint_has_scalar_levels_resumes_exactly(tmp_path: Path):
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", **run)
    whole.train()
    first = trainer(tmp_path / "cut", **run)
    first.add_callback(StopAt(2))
    first.train()
    folder = tmp_path / "cut" / "checkpoint-2"
    make_old(folder)
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    scalars = 0
    for moments in state["state"].values():
        for key, value in moments.items():
            if value.shape == (1,):
                moments[key], scalars = value.view(()), scalars + 1
    assert scalars
    torch.save(state, folder / "optimizer.pt")
    write_manifest(folder)
    again = trainer(tmp_path / "cut", **run)
    again.train(resume_from_checkpoint=str(folder))
    assert different(again.model.state_dict(), whole.model.state_dict()) == []


def test_only_what_belongs_to_a_parameter_of_one_number_is_given_a_dimension():
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.Adam(parameters)
    take_scalar_states(optimizer)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.tensor(3.0)
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], torch.tensor([3.0]))
    assert {state["step"].dim() for state in optimizer.state.values()} == {0}
    optimizer.step()


@pytest.mark.parametrize("levels", [ElasticLevels(), ElasticLevels(signed=False), BooleanLevels()])
def test_levels_have_parameters_of_one_dimension_and_thresholds_of_none(levels: ElasticLevels):
    assert {name: p.shape for name, p in levels.named_parameters()} == {"width": (1,), "offset": (1,)}
    assert torch.as_tensor(levels.threshold()).dim() == 0
    assert {torch.as_tensor(part).dim() for part in levels.affine()} == {0}
