"""Draws the speed of whole models over torch's float32, from the results of scripts/benchmarks/bench_inference.py.

python scripts/benchmarks/plot_inference.py
"""

import argparse
import hashlib
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DIGEST = "Source"  # the PNG's text that says which figures it shows

# Under each group: the rows of the model with float attention products, and with all of it binary.
GROUPS = {
    "BERT-base\n128 tokens": ("bert_base_s128_b1_ffn", "bert_base_s128_b1_all"),
    "MiniLM\n64 tokens": ("minilm_s64_b1_ffn", "minilm_s64_b1_all"),
    "ViT-B/16": ("vit_b16_b1_ffn", "vit_b16_b1_all"),
    "ResNet-18": ("resnet18_b1",),
    "ResNet-50": ("resnet50_b1",),
}
SERIES = {
    "float32": "#d4d4d4",
    "bfloat16": "#b5b5b5",
    "dynamic int8": "#969696",
    "hf_bnn": "#7fb2dd",
    "hf_bnn, attention binary too": "#1f6fb4",
}
WIDTH = 0.16  # of a bar, where a group takes 1


def speeds(benchmark: dict) -> dict[str, dict[str, float]]:
    """Speed over float32 by group and series, torch's from medians. Raises KeyError with the name of a missing row."""
    rows = {row["name"]: row for row in benchmark["rows"]}
    float32, bfloat16, int8, *ours = SERIES
    found = {}
    for group, names in GROUPS.items():
        row = rows[names[0]]
        group_speeds = {float32: 1.0, bfloat16: row["ms_fp32"] / row["ms_bf16"]}
        if row["ms_int8"] is not None:
            group_speeds[int8] = row["ms_fp32"] / row["ms_int8"]
        for label, name in zip(ours, names, strict=False):
            group_speeds[label] = rows[name]["speedup_fp32"]
        found[group] = group_speeds
    return found


def title(benchmark: dict) -> str:
    """The title of the chart, and the machine it was measured on."""
    machine = benchmark["environment"]
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    where = f"{machine['cpu']}, {machine['backend']} kernels, torch {machine['torch']}"
    return f"Whole models, batch 1, {threads}: speed over torch's float32\n{where}"


def digest(benchmark: dict) -> str:
    """The digest of everything that the chart shows."""
    return hashlib.sha256(json.dumps([title(benchmark), speeds(benchmark)]).encode()).hexdigest()


def place_of(label: str, group: int, values: dict[str, float]) -> float:
    """The position of a series' bar: the bars of a group stand side by side, centred."""
    return group + ([*values].index(label) - (len(values) - 1) / 2) * WIDTH


def draw(benchmark: dict, path: Path) -> None:
    """The chart as a PNG. Equal figures and an equal matplotlib give equal bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 4.2))
    shown = speeds(benchmark)
    for label, colour in SERIES.items():
        bars = [
            (place_of(label, group, values), values[label])
            for group, values in enumerate(shown.values())
            if label in values
        ]
        drawn = axis.bar(*zip(*bars, strict=True), 0.92 * WIDTH, color=colour, label=label)
        weight = "bold" if label.startswith("hf_bnn") else "normal"
        axis.bar_label(drawn, fmt="%.1f", padding=2, fontsize=9, weight=weight)
    axis.set_title(title(benchmark), loc="left", fontsize=11, pad=14)
    axis.set_xticks(range(len(shown)), shown)
    axis.tick_params(bottom=False, left=False, labelleft=False)
    axis.spines[["left", "right", "top"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None, DIGEST: digest(benchmark)})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=RESULTS / "bench_inference.json", help="of bench_inference.py")
    parser.add_argument("--output", type=Path, default=RESULTS / "inference.png")
    args = parser.parse_args(argv)
    draw(json.loads(args.input.read_text(encoding="utf-8")), args.output)


if __name__ == "__main__":
    main()
