"""The benchmark's figures have the shape that README's tables are made from. No time is asserted."""

import importlib.util
import json
from pathlib import Path

import pytest

from hf_bnn.methods import METHODS

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_training.py"
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
    assert {name.partition("-")[0] for name in names[1:]} == set(METHODS)
    assert [row["name"] for row in found["rows"] if row["tokens"] == 6] == names
    for row in found["rows"]:
        assert set(row) == {"name", "tokens", "ms_median", "ms_q1", "ms_q3", "over_linear", "over_ste"}
        assert 0 < row["ms_q1"] <= row["ms_median"] <= row["ms_q3"]
    assert found["rows"][0]["over_linear"] == 1
    assert [row["over_ste"] for row in found["rows"] if row["name"] == "ste"] == [1, 1]

    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(found["rows"])
    assert table[0].split()[:3] == ["layer", "tokens", "median"]


def test_every_contestant_learns_something(bench):
    for name, method in bench.contestants().items():
        bench.make_run(method, 4, 16, 8)()
        assert (method is None) == (name == bench.LINEAR)


def test_a_ratio_is_the_median_over_rounds(bench):
    assert bench.median_ratio([2.0, 4.0, 300.0], [1.0, 2.0, 3.0]) == 2.0


def test_fewer_than_two_rounds_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "1"])
    assert "--rounds 1: expected at least 2" in capsys.readouterr().err
