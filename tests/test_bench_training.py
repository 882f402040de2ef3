"""The benchmark's figures have the shape that README's tables are made from. No time is asserted."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_bnn import binarize_
from hf_bnn.methods import METHODS, Site, Step

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmarks" / "bench_training.py"
TINY = ["--inputs", "16", "--outputs", "8", "--rounds", "3"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_training", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_json_has_one_row_per_layer_and_number_of_tokens(bench, tmp_path: Path, capsys):
    output = tmp_path / "bench.json"
    bench.main([*TINY, "--tokens", "4", "6", "--output", str(output)])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert set(found) == {"environment", "rows"}
    assert {"cpu", "cores", "torch", "threads", "rounds", "inputs", "outputs"} <= set(found["environment"])

    names = [row["name"] for row in found["rows"] if row["tokens"] == 4]
    assert names[0] == "nn.Linear"
    assert {f"surge-{aux}" for aux in ("own", "shared", "lowrank", "leaky")} < set(names)
    assert names[1] == "inlined"
    assert {"stompp-clipped", "stompp-mixed", "stompp-signs", "elastic"} < set(names)
    assert {name.partition("-")[0] for name in names[2:]} == set(METHODS) | {"elastic"}
    assert [row["name"] for row in found["rows"] if row["tokens"] == 6] == names
    for row in found["rows"]:
        assert set(row) == {"name", "tokens", "ms_median", "ms_q1", "ms_q3", "over_linear", "over_ste", "over_inlined"}
        assert 0 < row["ms_q1"] <= row["ms_median"] <= row["ms_q3"]
    assert found["rows"][0]["over_linear"] == 1
    assert [row["over_ste"] for row in found["rows"] if row["name"] == "ste"] == [1, 1]

    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(found["rows"])
    assert table[0].split()[:3] == ["layer", "tokens", "median"]


def test_every_contestant_takes_steps(bench):
    for name, contestant in bench.contestants().items():
        run = bench.make_run(name, contestant, 4, 16, 8)
        run()
        run()
        assert (contestant is None) == (name in (bench.LINEAR, bench.INLINED))


def test_stompps_three_rows_are_its_three_phases(bench):
    fractions = {}
    for name, contestant in bench.contestants().items():
        if name.startswith("stompp"):
            step = Step(contestant.start, bench.TOTAL, 0.1)
            fractions[name] = contestant.method.fraction(Site(1, 2), step)
    assert fractions["stompp-clipped"] == 0
    assert 0.01 < fractions["stompp-mixed"] < 0.99
    assert fractions["stompp-signs"] == 1


def test_the_layer_written_by_hand_computes_what_the_binary_one_does(bench):
    torch.manual_seed(0)
    by_hand = bench.InlinedSTE(16, 8)
    layer = binarize_(nn.Sequential(nn.Linear(16, 8)))[0]
    layer.load_state_dict(by_hand.state_dict())
    x, grad = torch.randn(5, 16), torch.randn(5, 8)
    results = []
    for module in (by_hand, layer):
        z = x.clone().requires_grad_()
        y = module(z)
        y.backward(grad)
        results.append((y.detach(), z.grad, module.weight.grad, module.bias.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_ratio_is_the_median_over_rounds(bench):
    assert bench.median_ratio([2.0, 4.0, 300.0], [1.0, 2.0, 3.0]) == 2.0


def test_fewer_than_two_rounds_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "1"])
    assert "--rounds 1: expected at least 2" in capsys.readouterr().err
