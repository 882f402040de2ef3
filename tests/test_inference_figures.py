"""The speed table, the README's sentence and the chart show what the benchmark's JSON holds."""

import copy
import json
import re
from pathlib import Path

import plot_inference as plot
import pytest
import update_readme
from inference_layers import layer_cases
from inference_models import model_cases
from PIL import Image

ROOT = Path(__file__).parents[1]
NAMES = [name for case in (*layer_cases(), *model_cases()) for name in case.rows]


def benchmark_of(names: list[str], **environment: object) -> dict:
    """A JSON whose n-th row is n + 2 times as fast as float32, bfloat16 twice, int8 four times."""
    rows = []
    for number, name in enumerate(names):
        has_int8 = "resnet" not in name
        speedup = number + 2.0
        rows.append(
            {
                **{"name": name, "rounds": 5 + number % 11, "ms_median": 10 / speedup},
                **{"ms_fp32": 10.0, "ms_bf16": 5.0, "ms_int8": 2.5 if has_int8 else None},
                **{"speedup_fp32": speedup, "speedup_bf16": speedup / 2},
                "speedup_int8": speedup / 4 if has_int8 else None,
            }
        )
    machine = {"cpu": "A processor", "torch": "2.13.0", "backend": "avx512", "threads": 1}
    memory = {"bert_base_encoder_fp32_bytes": 340e6, "packed_bytes": 22e6, "optimized_bytes": 20e6, "ratio": 17.0}
    return {"environment": {**machine, **environment}, "rows": rows, "slower_than_fp32": [], "memory": memory}


def test_every_row_that_is_shown_is_measured():
    chart = [name for names in plot.GROUPS.values() for name in names]
    assert {*update_readme.SPEED_ROWS, *update_readme.OTHER_ROWS, *update_readme.SUMMARY_ROWS, *chart} <= {*NAMES}


def test_the_table_has_the_rows_that_were_measured():
    text = update_readme.speed_text(benchmark_of(["resnet18_b1", "linear_m8_k768_n768", "conv_of_no_table"]), {})
    shown = [line for line in text.splitlines() if line.startswith("|")]
    assert shown[2:] == [
        "| ResNet-18 | 5.00 | 2.0 | 1.0 | - |",
        "| linear layer, 8 x 768 to 768 | 3.33 | 3.0 | 1.5 | 0.8 |",
    ]
    assert "5 to 7 rounds, one thread, avx512 kernels, A processor, torch 2.13.0." in text
    assert "Slower than float32, of 3 rows measured: none." in text


def test_the_readmes_summary_has_the_chart_and_the_rows_that_were_measured():
    text = update_readme.speed_summary(benchmark_of(["linear_m8_k768_n768", "resnet18_b1"], threads=2))
    assert text.splitlines() == [
        f"![Speed of whole models over float32]({update_readme.CHART})",
        "",
        "Times faster than float32 (A processor, avx512 kernels, 2 threads, batch 1). ResNet-18: 3.0.",
    ]


def test_other_runs_and_the_memory_have_a_line_each():
    slow = benchmark_of(["linear_m128_k768_n768", "resnet18_b1", "linear_m1_k64_n64"], threads=2)
    slow["slower_than_fp32"] = ["linear_m1_k64_n64"]
    *_, memory, avx2, threads = update_readme.speed_text(benchmark_of(NAMES), {"2threads": slow, "avx2": slow}).split(
        "\n"
    )
    assert "340.0 MB float32, 22.0 MB packed, 20.0 MB optimized: 17.0 times less" in memory
    assert avx2.startswith(
        "- AVX2 kernels (torch keeps its AVX-512), over float32. Linear layer, 128 x 768 to 768: 2.0;"
    )
    assert threads == (
        "- Two threads, over float32. Linear layer, 128 x 768 to 768: 2.0; ResNet-18: 3.0. "
        "Slower than float32, of 3 rows measured: `linear_m1_k64_n64`."
    )


def test_the_runs_that_are_there_are_read(tmp_path: Path):
    (tmp_path / "bench_inference.json").write_text('"main"')
    (tmp_path / "bench_inference_torch.json").write_text('"without a compiler"')
    assert update_readme.speed_results(tmp_path) == ("main", {"torch": "without a compiler"})


@pytest.mark.parametrize(
    ("value", "text"), [(0.009571, "0.00957"), (0.1854, "0.185"), (1.0, "1.00"), (10.24, "10.2"), (1234.5, "1234")]
)
def test_milliseconds_have_three_digits(value: float, text: str):
    assert update_readme.milliseconds(value) == text


def test_the_chart_shows_speeds_over_float32():
    benchmark = benchmark_of(NAMES)
    shown = plot.speeds(benchmark)
    speed_of = {row["name"]: row["speedup_fp32"] for row in benchmark["rows"]}
    assert shown["BERT-base\n128 tokens"] == {
        "float32": 1.0,
        "bfloat16": 2.0,
        "dynamic int8": 4.0,
        "hf_bnn": speed_of["bert_base_s128_b1_ffn"],
        "hf_bnn, attention binary too": speed_of["bert_base_s128_b1_all"],
    }
    assert shown["ResNet-50"] == {"float32": 1.0, "bfloat16": 2.0, "hf_bnn": speed_of["resnet50_b1"]}
    assert "one thread" in plot.title(benchmark)
    assert "2 threads" in plot.title(benchmark_of(NAMES, threads=2))


def test_the_chart_is_a_png_that_says_which_figures_it_shows(tmp_path: Path):
    benchmark = benchmark_of(NAMES)
    (tmp_path / "bench.json").write_text(json.dumps(benchmark))
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path in paths:
        plot.main(["--input", str(tmp_path / "bench.json"), "--output", str(path)])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(paths[0]) as image:
        assert image.text[plot.DIGEST] == plot.digest(benchmark)
    changed = copy.deepcopy(benchmark)
    next(row for row in changed["rows"] if row["name"] == "resnet50_b1")["speedup_fp32"] += 1
    assert plot.digest(changed) != plot.digest(benchmark)


def test_the_readmes_chart_is_of_the_committed_figures():
    benchmark, _ = update_readme.speed_results(update_readme.RESULTS)
    charts = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert charts == [update_readme.CHART]
    for path in charts:
        with Image.open(ROOT / path) as image:
            assert image.text[plot.DIGEST] == plot.digest(benchmark)
