"""Rewrite the generated blocks of README.md and docs from the figures in scripts/benchmarks/results.

A block stands between the lines `<!-- name -->` and `<!-- /name -->`. The benchmarks write the figures.

python scripts/benchmarks/update_readme.py
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

from hf_bnn.methods import METHODS, Surge

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"


def methods_table(benchmark: dict) -> str:
    """Every method, with the cost of its step relative to the straight-through estimator's, where it was measured."""
    cost = {row["name"]: row["over_ste"] for row in benchmark["rows"] if row["tokens"] == 512}
    lines = ["| method | paper | idea | cost |", "|---|---|---|---|"]
    for name, cls in METHODS.items():
        measured = {row: value for row, value in cost.items() if row.split("-")[0] == name}
        text = ", ".join(f"{value:.2f}{label(row)}" for row, value in measured.items()) or NOT_MEASURED
        lines.append(f"| `{name}` | {cls.paper} | {cls.idea} | {text} |")
    elastic = "learned scale and threshold of the inputs, with any method; the default for transformers"
    text = f"{cost['elastic']:.2f}" if "elastic" in cost else NOT_MEASURED
    lines.append(f'| config `levels="elastic"` | BiT, arXiv 2205.13016 | {elastic} | {text} |')
    return "\n".join(lines)


def label(row: str) -> str:
    """The suffix of a method's variant: "surge-own" gives " (`aux=own`)", "stompp-mixed" gives " (mixed)"."""
    name, dash, variant = row.partition("-")
    setting = f"`aux={variant}`" if name == Surge.name else variant
    return f" ({setting})" if dash else ""


def fsg_text(results: dict) -> str:
    """FSG against the straight-through estimator: accuracy, and the cost of a step."""
    cost, steps = results["cost"], results["environment"]["steps"]
    return (
        f"{results['summary']} (Fashion-MNIST, a ResNet of 6 convolutions, weights only, {steps} steps from a trained "
        f"float network). A step of ResNet-20, batch 128, one thread: {cost['ratio']:.2f} times STE's."
    )


def orders_table(results: dict) -> str:
    """StoMPP's orders by network: accuracy in percent, mean and standard deviation over the seeds."""
    from stompp_order import order_table

    return order_table(results["rows"])


def quickstart_table(results: dict) -> str:
    """The printed results of a run of the quick start."""
    from hf_bnn.tasks.quickstart_results import method_name, table

    versions = results["versions"]
    threads = f"{versions['threads']} thread(s) of {versions['cores']} ({versions['machine']})"
    packages = f"torch {versions['torch']}, transformers {versions['transformers']}"
    chosen = results["arguments"]
    method = method_name(chosen["method"], chosen["method_args"])
    run = f"{results['seconds_total']:.0f} seconds on {threads}"
    note = f"Trained with {method}, seed {results['seed']}, {run}, {packages}."
    return f"```\n{table(results)}\n```\n{note}"


def runs_table(runs: list[dict]) -> str:
    """Every full run of the quick start with committed results: its settings and its figures."""
    from hf_bnn.tasks.quickstart_results import method_name

    lines = [
        "| preset | method | binarize | attention | embeddings | seed | float | binary | kept | file, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        chosen = run["arguments"]
        method = method_name(chosen["method"], chosen["method_args"])
        names = [chosen["preset"], method, *(chosen[key] for key in ("binarize", "attention", "embeddings", "seed"))]
        reached = [f"{run['accuracy_float']:.1%}", f"{run['accuracy_binary']:.1%}", f"{run['retention']:.3f}"]
        lines.append("| " + " | ".join(map(str, [*names, *reached, f"{run['bytes_packed'] / 1e6:.2f}"])) + " |")
    return "\n".join(lines)


SPEED_ROWS = {
    "bert_base_s128_b1_linears": "BERT-base, 128 tokens: packed",
    "bert_base_s128_b1_ffn": "the same, optimized",
    "bert_base_s128_b1_all": "the same, attention products binary too",
    "bert_base_s128_b8_all": "the same, batch 8",
    "bert_base_s512_b1_all": "the same, 512 tokens",
    "bert_base_s1_b1_w1a32": "BERT-base, 1 token, binary weights, float inputs",
    "minilm_s64_b1_all": "MiniLM, 64 tokens, attention products binary too",
    "minilm_s64_b32_all": "the same, batch 32",
    "vit_b16_b1_all": "ViT-B/16, attention products binary too",
    "vit_b16_b8_all": "the same, batch 8",
    "resnet18_b1": "ResNet-18",
    "resnet18_b8": "the same, batch 8",
    "resnet50_b1": "ResNet-50",
    "resnet50_b8": "the same, batch 8",
    "linear_m1_k768_n768": "linear layer, 1 x 768 to 768",
    "linear_m8_k768_n768": "linear layer, 8 x 768 to 768",
    "linear_m128_k768_n768": "linear layer, 128 x 768 to 768",
    "linear_m1024_k768_n3072": "linear layer, 1024 x 768 to 3072",
    "ffn_m128": "feed-forward block, 128 x 768 to 3072 to 768",
    "w1a32_m1_k768_n3072": "linear layer, binary weights, float inputs, 1 x 768 to 3072",
    "resnet18_body_b1": "the 19 convolutions of ResNet-18's stages",
    "resnet18_body_b8": "the same, batch 8",
}
OTHER_RUNS = {  # by the end of the file's name; without a compiler only torch's own products are left
    "avx2": "AVX2 kernels (torch keeps its AVX-512)",
    "torch": "Without a compiler",
    "2threads": "Two threads",
}
OTHER_ROWS = {
    "linear_m128_k768_n768": "linear layer, 128 x 768 to 768",
    "ffn_m128": "feed-forward block, 128 rows",
    "resnet18_body_b1": "ResNet-18's convolutions",
    "bert_base_s128_b1_ffn": "BERT-base, 128 tokens",
    "bert_base_s128_b1_all": "the same, attention products binary too",
    "resnet18_b1": "ResNet-18",
}
CHART = "scripts/benchmarks/results/inference.png"


def speed_text(benchmark: dict, others: dict[str, dict]) -> str:
    """Packed models and layers over torch's of three precisions; `others`: runs on other kernels or threads."""
    rows = {row["name"]: row for row in benchmark["rows"]}
    lines = ["| | ms | over float32 | over bfloat16 | over dynamic int8 |", "|---|---|---|---|---|"]
    for name, label in SPEED_ROWS.items():
        if name in rows:
            ratios = [rows[name][f"speedup_{precision}"] for precision in ("fp32", "bf16", "int8")]
            cells = ["-" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
            lines.append(f"| {label} | {milliseconds(rows[name]['ms_median'])} | " + " | ".join(cells) + " |")
    machine, rounds = benchmark["environment"], [row["rounds"] for row in benchmark["rows"]]
    fewest_to_most = f"{min(rounds)} to {max(rounds)}" if min(rounds) < max(rounds) else str(max(rounds))
    where = f"{machine['backend']} kernels, {machine['cpu']}, torch {machine['torch']}"
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    lines += ["", f"{fewest_to_most} rounds, {threads}, {where}. {losses(benchmark)}"]
    lines.append("")
    if "memory" in benchmark:
        lines.append(memory_line(benchmark["memory"]))
    lines += [other_line(label, others[end]) for end, label in OTHER_RUNS.items() if end in others]
    return "\n".join(lines)


SUMMARY_ROWS = {
    "bert_base_s128_b1_ffn": "BERT-base, 128 tokens",
    "bert_base_s128_b1_all": "the same, attention products binary",
    "vit_b16_b1_all": "ViT-B/16, attention products binary",
    "resnet18_b1": "ResNet-18",
}


def speed_summary(benchmark: dict) -> str:
    """The README's chart, and a sentence with the figures of four models."""
    rows = {row["name"]: row["speedup_fp32"] for row in benchmark["rows"]}
    found = "; ".join(f"{text}: {rows[name]:.1f}" for name, text in SUMMARY_ROWS.items() if name in rows)
    machine = benchmark["environment"]
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    where = f"{machine['cpu']}, {machine['backend']} kernels, {threads}, batch 1"
    return f"![Speed of whole models over float32]({CHART})\n\nTimes faster than float32 ({where}). {found}."


def milliseconds(value: float) -> str:
    """The number with three significant digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def losses(benchmark: dict) -> str:
    """The sentence on the rows of a run that are slower than float32."""
    slower = benchmark["slower_than_fp32"]
    named = ", ".join(f"`{name}`" for name in slower) or "none"
    return f"Slower than float32, of {len(benchmark['rows'])} rows measured: {named}."


def memory_line(memory: dict) -> str:
    """The sentence on the memory of BERT-base's encoder."""
    float32, packed, optimized = (
        memory[f"{name}_bytes"] / 1e6 for name in ("bert_base_encoder_fp32", "packed", "optimized")
    )
    return (
        f"- Memory of BERT-base's encoder, in use, with what is laid out for the kernels: {float32:.1f} MB float32, "
        f"{packed:.1f} MB packed, {optimized:.1f} MB optimized: {memory['ratio']:.1f} times less."
    )


def other_line(label: str, benchmark: dict) -> str:
    """One line on a run with other kernels or threads."""
    rows = {row["name"]: row["speedup_fp32"] for row in benchmark["rows"]}
    found = "; ".join(f"{text}: {rows[name]:.1f}" for name, text in OTHER_ROWS.items() if name in rows)
    return f"- {label}, over float32. {found[:1].upper()}{found[1:]}. {losses(benchmark)}"


def speed_results(folder: Path) -> tuple[dict, dict[str, dict]]:
    """The run that the table shows, and the existing runs among `OTHER_RUNS`."""
    others = {end: folder / f"bench_inference_{end}.json" for end in OTHER_RUNS}
    found = {end: json.loads(path.read_text()) for end, path in others.items() if path.exists()}
    return json.loads((folder / "bench_inference.json").read_text()), found


def images_table(folder: Path) -> str:
    """Runs of the Fashion-MNIST recipes, by their all_results.json: `fashion_mnist_MODEL_ARM.json`."""
    lines = [
        "| recipe | float | binary, STE | kept | binary, SURGE | kept | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in ("resnet", "vit"):
        arms = ("float", "ste", "surge")
        runs = [json.loads((folder / f"fashion_mnist_{model}_{arm}.json").read_text()) for arm in arms]
        plain, ste, surge = (run["eval_accuracy"] for run in runs)
        seconds = " / ".join(f"{run['train_runtime']:.0f}" for run in runs)
        cells = [f"{plain:.1%}", f"{ste:.1%}", f"{ste / plain:.3f}", f"{surge:.1%}", f"{surge / plain:.3f}", seconds]
        lines.append(f"| `fashion_mnist_{model}.json` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def documents() -> dict[str, dict[str, str]]:
    """The generated blocks of each Markdown file: {path from the root: {block's name: text}}."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("quickstart*.json"))]
    benchmark, others = speed_results(RESULTS)
    quickstart, training, orders, fsg = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("quickstart", "bench_training", "stompp_order", "fsg")
    )
    return {
        "README.md": {"quickstart": quickstart_table(quickstart), "chart": speed_summary(benchmark)},
        "docs/pages/evidence.md": {"runs": runs_table(runs), "images": images_table(RESULTS)},
        "docs/pages/methods.md": {
            "methods": methods_table(training),
            "orders": orders_table(orders),
            "fsg": fsg_text(fsg),
        },
        "docs/pages/speed.md": {"speed": speed_text(benchmark, others)},
    }


def updated(text: str, blocks: dict[str, str], file: str = "README.md") -> str:
    """The text of `file` with its blocks generated from the committed figures."""
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"{file} has {count} places marked <!-- {name} -->: expected 1")
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    for file, blocks in documents().items():
        path = ROOT / file
        path.write_text(updated(path.read_text(encoding="utf-8"), blocks, file), encoding="utf-8")
