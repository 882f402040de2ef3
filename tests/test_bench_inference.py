"""The benchmark of inference writes the figures that README's tables are made from. No time is asserted."""

import json
from pathlib import Path

import bench_inference as bench
import pytest
import torch
from inference_cases import Case, Contest, Ours, given_to, scatter_
from inference_layers import layer_cases, resnet18_body
from inference_memory import resident_bytes
from inference_models import (
    ALL,
    FFN,
    LINEARS,
    RESNET18,
    WEIGHTS,
    Family,
    binary_forms,
    binary_macs,
    encoder_memory,
    model_cases,
)
from tiny import SIZE, VIT_SIZE
from torch import Tensor, nn
from transformers import BertModel, ResNetForImageClassification, ViTForImageClassification

from hf_bnn import (
    BinaryBertConfig,
    BinaryBertModel,
    BinaryResNetForImageClassification,
    BinaryViTForImageClassification,
    kernels,
)
from hf_bnn.functional import pack_bits
from hf_bnn.nn.levels import ElasticLevels

FIELDS = {
    "name",
    "rounds",
    "ms_median",
    "ms_q1",
    "ms_q3",
    "ms_fp32",
    "ms_bf16",
    "ms_int8",
    "speedup_fp32",
    "speedup_fp32_q1",
    "speedup_fp32_q3",
    "speedup_bf16",
    "speedup_int8",
    "fp32_channels_last",
    "roofline_percent",
    "gmacs",
}
TINY_BERT = Family("tiny", BertModel, BinaryBertModel, SIZE)
TINY_VIT = Family("tiny_vit", ViTForImageClassification, BinaryViTForImageClassification, VIT_SIZE)
TINY_RESNET = Family(
    *("tiny_resnet", ResNetForImageClassification, BinaryResNetForImageClassification),
    {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
)


def names_of(*cases: Case) -> list[str]:
    return [name for case in cases for name in case.rows]


def test_the_rows_have_the_names_that_the_tables_ask_for():
    names = names_of(*layer_cases(), *model_cases())
    assert len(set(names)) == len(names)
    assert {"linear_m128_k768_n768", "linear_m1024_k768_n3072", "linear_m8_k768_n768", "linear_m1_k768_n768"} <= {
        *names
    }
    assert {"ffn_m128", "resnet18_body_b1", "resnet18_body_b8", "w1a32_m1_k768_n3072"} <= {*names}
    assert {"bert_base_s128_b1_linears", "bert_base_s128_b1_ffn", "bert_base_s128_b1_all"} <= {*names}
    assert {"minilm_s64_b1_all", "vit_b16_b1_all", "resnet18_b1", "resnet50_b8", "linear_m1_k64_n64"} <= {*names}


@pytest.mark.parametrize("name", ["linear_m8_k768_n768", "w1a32_m1_k768_n768", "conv_c512_n512_k3_s1_hw7_b1", "ffn_m8"])
def test_the_json_has_a_row_with_every_figure(name: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "bench.json"
    bench.main(["--threads", "1", "--rounds", "2", "--only", name, "--output", str(output)])
    found = json.loads(output.read_text(encoding="utf-8"))
    assert {"cpu", "torch", "threads", "backend"} <= set(found["environment"])
    (row,) = found["rows"]
    assert set(row) == FIELDS
    assert (row["name"], row["rounds"]) == (name, 2)
    assert row["ms_q1"] <= row["ms_median"] <= row["ms_q3"]
    assert row["speedup_fp32"] > 0
    assert (row["speedup_int8"] is None) == (row["ms_int8"] is None) == name.startswith("conv")
    assert row["roofline_percent"] is None or not name.startswith("w1a32")
    assert found["slower_than_fp32"] == ([name] if row["speedup_fp32"] < 1 else [])
    assert "memory" not in found
    _, printed, losers = capsys.readouterr().out.splitlines()
    assert printed.split()[0] == name
    assert losers == f"slower than float32: {', '.join(found['slower_than_fp32']) or 'none'}"


@pytest.mark.parametrize(
    ("case", "int8"),
    [
        (TINY_BERT.case(2, 8, (LINEARS, FFN, ALL, WEIGHTS)), True),
        (TINY_VIT.case(2), True),
        (TINY_RESNET.case(1, variants=("", "reactnet")), False),
    ],
    ids=["bert", "vit", "resnet"],
)
def test_whole_models_have_a_row_for_each_variant(case: Case, int8: bool):
    with torch.no_grad():
        contest = case.make(case.rows)
    rows = bench.measure(contest, rounds=2, seconds=0)
    assert [row["name"] for row in rows] == [*case.rows]
    for row in rows:
        assert set(row) == FIELDS
        assert (row["speedup_int8"] is not None) == int8
        assert (row["gmacs"] is None) == row["name"].endswith(WEIGHTS)
    assert len({row["ms_fp32"] for row in rows}) == 1  # they share their baselines


def test_only_the_rows_that_are_wanted_are_timed():
    case = TINY_BERT.case(1, 4)
    assert case.rows == ("tiny_s4_b1_linears", "tiny_s4_b1_ffn", "tiny_s4_b1_all")
    ((same, names),) = bench.chosen(iter([case]), ["_all", "_linears"])
    assert same is case
    assert names == ("tiny_s4_b1_linears", "tiny_s4_b1_all")
    with torch.no_grad():
        assert [*case.make(names).ours] == [*names]


def test_baselines_see_what_the_binary_model_sees():
    """The same batch, in the dtype and the layout of each form."""
    images = torch.randn(2, 3, 4, 4)
    half = given_to("bf16/channels_last", images)
    assert half.dtype == torch.bfloat16
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, images.bfloat16())
    assert given_to("bf16", torch.ones(2, dtype=torch.int64)).dtype == torch.int64
    assert given_to("fp32", images) is images


def test_the_macs_of_a_model_are_those_of_its_binary_products():
    batch, tokens, hidden, ffn, layers = 2, 8, SIZE["hidden_size"], SIZE["intermediate_size"], 2
    linears = layers * batch * tokens * (4 * hidden * hidden + 2 * hidden * ffn)
    attention = layers * 2 * batch * tokens * tokens * hidden
    inputs = TINY_BERT.inputs(batch, tokens)
    expected = {LINEARS: linears, ALL: linears + attention, WEIGHTS: 0}
    with torch.no_grad():
        assert {name: binary_macs(binary_forms(TINY_BERT, name)[0], inputs) for name in expected} == expected


def test_the_body_of_resnet18_has_its_nineteen_convolutions_and_their_work():
    body = resnet18_body()
    assert len(body) == 19
    assert round(sum(shape.macs() for shape in body) / 1e6) == 1696
    with torch.no_grad():
        model = binary_macs(binary_forms(RESNET18, "")[0], RESNET18.inputs(1))
    shortcuts = sum(shape.macs() for shape in body if shape.kernel == 1)  # float in the model
    assert model == sum(shape.macs() for shape in body) - shortcuts


def thresholds(model: nn.Module) -> list[float]:
    return [module.threshold().item() for module in model.modules() if isinstance(module, ElasticLevels)]


def test_scattered_levels_and_norms_differ_from_layer_to_layer():
    model = BinaryBertModel(BinaryBertConfig(**SIZE, attention="binary"))
    matrices = {name: p.clone() for name, p in model.named_parameters() if p.dim() == 2}
    assert len(set(thresholds(model))) < len(thresholds(model))
    scatter_(model)
    assert len(set(thresholds(model))) == len(thresholds(model))
    assert all(torch.equal(p, matrices[name]) for name, p in model.named_parameters() if name in matrices)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert all(norm.weight.unique().numel() > 1 and norm.bias.unique().numel() > 1 for norm in norms)
    batch_norm = scatter_(nn.BatchNorm2d(8))
    assert batch_norm.running_mean.unique().numel() == batch_norm.running_var.unique().numel() == 8


def test_the_baseline_is_the_faster_of_two_layouts():
    times = {
        "fp32": [3.0, 9.0, 4.0],
        "fp32/channels_last": [5.0, 2.0, 2.0],
        "bf16": [1.0, 1.0, 1.0],
        "a_row": [1.0] * 3,
    }
    row = bench.row_of("a_row", 0, times, 0)
    assert (row["ms_fp32"], row["speedup_fp32"], row["fp32_channels_last"]) == (2.0, 2.0, True)
    assert (row["speedup_bf16"], row["speedup_int8"]) == (1.0, None)


def test_rows_that_lose_to_fp32_are_listed(monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture):
    times = {"slow": [2.0] * 3, "fast": [0.5] * 3, "fp32": [1.0] * 3, "bf16": [1.0] * 3, "int8": [1.0] * 3}
    monkeypatch.setattr(bench, "interleaved", lambda runs, rounds, seconds: times)
    call = {"fp32": int, "bf16": int, "int8": int}
    case = Case(("slow", "fast"), lambda names: Contest({name: Ours(int, 0) for name in names}, call))
    monkeypatch.setattr(bench, "layer_cases", lambda: [case])
    bench.main(["--layers", "--output", str(tmp_path / "bench.json")])
    assert json.loads((tmp_path / "bench.json").read_text())["slower_than_fp32"] == ["slow"]
    assert "slower than float32: slow\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("milliseconds", "rounds", "seconds", "calls"),
    [
        (2.5, 3, 60, 1 + 1 + 3 * (2 + 8)),  # eight calls to a timing, and two before it that are not counted
        (300, 3, 60, 1 + 1 + 3),  # long calls are not repeated
        (300, 9, 0, 1 + 1 + 5),  # out of time after the fewest rounds
        (300, 2, 0, 1 + 1 + 2),
    ],
)
def test_a_row_gets_rounds_for_its_seconds(monkeypatch, milliseconds: float, rounds: int, seconds: float, calls: int):
    def fake(run, repeats: int) -> float:
        for _ in range(repeats):
            run()
        return milliseconds

    monkeypatch.setattr(bench, "milliseconds", fake)
    made = []
    times = bench.interleaved({"row": lambda: made.append(1)}, rounds, seconds)
    assert len(made) == calls
    assert times["row"] == [milliseconds] * min(rounds, max(5, rounds if seconds else 5))


def test_unknown_rows_are_refused(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        bench.main(["--only", "linear_m1_k64_n64", "no such row"])
    assert "--only no such row: no row has that in its name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--layers", "--only", "bert_base"])
    assert "--only bert_base: no row has that in its name" in capsys.readouterr().err


def test_a_single_round_is_refused(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        bench.main(["--rounds", "1"])
    assert "--rounds 1: expected at least 2, a spread needs them" in capsys.readouterr().err


def closure_over(tensor: Tensor):
    return lambda: tensor


@pytest.mark.parametrize(
    "hide",
    [
        lambda tensor: tensor,
        lambda tensor: {"cache": [("deep", tensor)]},
        lambda tensor: closure_over(tensor),
        lambda tensor: kernels.LinearWeight(tensor, 8, 8),
        lambda tensor: (nn.ParameterList([tensor]),),  # a module that is no submodule
    ],
    ids=["attribute", "containers", "closure", "named_tuple", "module_in_tuple"],
)
def test_memory_counts_tensors_that_are_in_no_state_dict(hide):
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    assert resident_bytes(model) == 4 * 8 * 4
    model[0].__dict__["hidden"] = hide(torch.zeros(100))
    assert "hidden" not in " ".join(model.state_dict())
    assert resident_bytes(model) == 4 * 8 * 4 + 400


def test_memory_counts_a_storage_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    assert resident_bytes(model) == 2 * 256
    model[1].weight = model[0].weight
    assert resident_bytes(model) == 256
    model[0].view = model[0].weight.detach()[1:, ::2]
    model[0].itself = model  # and a cycle ends
    assert resident_bytes(model) == 256


def test_the_memory_of_an_encoder_holds_bits_and_what_kernels_take():
    with torch.no_grad():
        found = encoder_memory(TINY_BERT)
    assert set(found) == {"tiny_encoder_fp32_bytes", "packed_bytes", "optimized_bytes", "ratio"}
    float32 = sum(4 * p.numel() for p in BertModel(TINY_BERT.config_of(BertModel)).encoder.parameters())
    assert found["tiny_encoder_fp32_bytes"] == float32
    assert found["ratio"] == float32 / found["optimized_bytes"]
    bits = pack_bits(torch.ones(32, 32)).numel() * (4 + 2 * 2) * 2
    assert bits < found["packed_bytes"] < float32
