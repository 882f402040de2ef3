"""The benchmark of inference writes the figures that README's tables are made from. No time is asserted."""

import json
from pathlib import Path

import bench_inference as bench
import pytest
import torch

FIELDS = {
    "name",
    "ms_median",
    "ms_q1",
    "ms_q3",
    "speedup_fp32",
    "speedup_fp32_q1",
    "speedup_fp32_q3",
    "speedup_bf16",
    "speedup_int8",
    "roofline_percent",
    "gmacs",
}


def test_the_rows_have_the_names_that_the_tables_ask_for():
    names = [case.name for case in bench.cases()]
    assert len(set(names)) == len(names)
    assert {"linear_m128_k768_n768", "linear_m1024_k768_n3072", "linear_m8_k768_n768", "linear_m1_k768_n768"} <= {
        *names
    }
    assert {"ffn_m128", "resnet18_body_b1", "resnet18_body_b8", "w1a32_m1_k768_n3072"} <= {*names}


@pytest.mark.parametrize("name", ["linear_m8_k768_n768", "w1a32_m1_k768_n768", "conv_c512_n512_k3_s1_hw7_b1", "ffn_m8"])
def test_the_json_has_a_row_with_every_figure(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "bench.json"
    bench.main(["--threads", "1", "--rounds", "2", "--only", name, "--output", str(output)])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert {"cpu", "torch", "threads", "rounds", "backend"} <= set(found["environment"])
    (row,) = found["rows"]
    assert set(row) == FIELDS
    assert row["name"] == name
    assert row["ms_q1"] <= row["ms_median"] <= row["ms_q3"]
    assert row["speedup_fp32"] > 0
    assert (row["speedup_int8"] is None) == name.startswith("conv")
    assert row["roofline_percent"] is None or not name.startswith("w1a32")
    assert capsys.readouterr().out.splitlines()[1].split()[0] == name


def test_the_body_of_resnet18_has_its_nineteen_convolutions_and_their_work():
    body = bench.resnet18_body()
    assert len(body) == 19
    with torch.inference_mode():
        assert round(bench.conv_case("body", 1, body).macs / 1e6) == 1696


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        bench.main(["--only", "no such row"])
    assert "--only no such row: no row has that in its name" in capsys.readouterr().err


def test_a_single_round_is_refused(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "1"])
    assert "--rounds 1: expected at least 2, a spread needs them" in capsys.readouterr().err
