"""The benchmark of training steps of blocks: cases, arms and the JSON. No time is asserted."""

import json
from pathlib import Path

import bench_training_blocks as bench
import pytest
import torch

from hf_bnn.nn.layers import binary_layers


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch):
    """No setting of the process outlives a test."""
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: True)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SMALL = {
    "linear": lambda: bench.linear(4, 16, 8),
    "layer": lambda: bench.bert_layer(2, 4, 16, 2),
    "block": lambda: bench.resnet_block(2, 8, 4),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_case_has_the_same_modules_with_and_without_binary_layers(name: str):
    case = SMALL[name]()
    binary, plain = case.make(True), case.make(False)
    assert binary_layers(binary)
    assert not binary_layers(plain)
    weights = [{key for key in module.state_dict() if key.endswith("weight")} for module in (binary, plain)]
    assert weights[1] <= weights[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_the_json_has_a_row_per_arm(name: str, autocast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(bench, "CASES", SMALL)
    output = tmp_path / "blocks.json"
    bench.main(["--cases", name, "--rounds", "2", "--output", str(output), *(["--autocast"] if autocast else [])])
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [row["arm"] for row in rows] == [bench.FLOAT, *bench.ARMS]
    assert all(row["autocast"] is autocast and row["ms_median"] > 0 for row in rows)
    assert rows[0]["over_float"] == 1
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_an_unknown_case_is_named(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--cases", "transformer-xl"])
    assert "--cases transformer-xl: no case has such a name; there are linear 768->768" in capsys.readouterr().err
