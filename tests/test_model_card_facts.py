"""The facts that a model card is made of, taken from a model and its configs."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from hf_bnn import binarize_, pack_
from hf_bnn.model_card import facts_of


def model(binary_config: dict[str, Any], **config: Any) -> nn.Module:
    made = binarize_(nn.Sequential(nn.Linear(64, 8, bias=False), nn.LayerNorm(8)))
    made.binary_config, made.config = SimpleNamespace(to_dict=lambda: binary_config), SimpleNamespace(**config)
    return made


TRAINED = {"name": "surge", "clip": 1.0, "eta": 0.3}


@pytest.mark.parametrize(
    ("binary_config", "config", "said"),
    [
        ({"method": TRAINED}, {}, "surge (clip=1.0, eta=0.3)"),
        ({"method": TRAINED}, {"method": {"name": "ste"}}, "surge (clip=1.0, eta=0.3)"),
        ({}, {"method": TRAINED}, "surge (clip=1.0, eta=0.3)"),
        ({"method": None}, {"method": {"name": "ste"}}, "ste"),
        ({"method": {"name": "ste", "class": "Method"}}, {}, "ste"),
        ({}, {"method": None}, "unknown"),
        ({}, {}, "unknown"),
    ],
)
def test_the_method_is_the_binary_configs_else_the_configs_else_unknown(binary_config: dict, config: dict, said: str):
    assert facts_of(model(binary_config, **config), packed=False).method == said


def test_the_facts_are_those_of_the_model_and_its_record():
    binary_config = {"quant_method": "hf_bnn", "levels": "signed"}
    facts = facts_of(model(binary_config), packed=False)
    assert facts.architecture == "Sequential"
    assert facts.structure == binary_config
    assert facts.binary_share == 512 / (512 + 16)
    assert facts.matrix_compression == 4 * 512 / (64 + 32)
    assert (facts.packed, facts.plugged_in) == (False, True)
    facts = facts_of(pack_(model({})), packed=True)
    assert (facts.packed, facts.plugged_in) == (True, False)
    assert facts.matrix_compression == 4 * 512 / (64 + 32)


def test_without_binary_weights_there_is_nothing_to_compress():
    made = nn.Sequential(nn.Linear(4, 4))
    made.binary_config, made.config = SimpleNamespace(to_dict=dict), SimpleNamespace()
    facts = facts_of(made, packed=False)
    assert (facts.binary_share, facts.matrix_compression) == (0.0, None)
