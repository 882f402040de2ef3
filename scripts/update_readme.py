"""Write the README's tables anew from the figures in scripts/results, which the benchmarks wrote.

python scripts/update_readme.py
"""

import json
import re
import sys
from pathlib import Path

from hf_bnn.methods import METHODS, Surge

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"


def methods_table(benchmark: dict) -> str:
    """Every method of the table, with what a step of it costs over the straight-through estimator's."""
    cost = {row["name"]: row["over_ste"] for row in benchmark["rows"] if row["tokens"] == 512}
    lines = ["| method | paper | idea | cost |", "|---|---|---|---|"]
    for name, cls in METHODS.items():
        measured = {row: value for row, value in cost.items() if row.split("-")[0] == name}
        if not measured:
            raise ValueError(f"no cost of {name!r} in the benchmark: run scripts/bench_training.py again")
        text = ", ".join(f"{value:.2f}{label(row)}" for row, value in measured.items())
        lines.append(f"| `{name}` | {cls.paper} | {cls.idea} | {text} |")
    elastic = "learned scale and threshold of the inputs, with any method; the default for transformers"
    lines.append(f'| config `levels="elastic"` | BiT, arXiv 2205.13016 | {elastic} | {cost["elastic"]:.2f} |')
    return "\n".join(lines)


def label(row: str) -> str:
    """What tells the variants of a method apart: "surge-own" gives " (`aux=own`)", "stompp-mixed" " (mixed)"."""
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
    from bench_methods import order_table

    return order_table(results["rows"])


def quickstart_table(results: dict) -> str:
    """What one run of the quick start printed."""
    from quickstart import table

    versions = results["versions"]
    threads = f"{versions['threads']} thread(s) of {versions['cores']} ({versions['machine']})"
    packages = f"torch {versions['torch']}, transformers {versions['transformers']}"
    note = f"Seed {results['seed']}, {results['seconds_total']:.0f} seconds on {threads}, {packages}."
    return f"```\n{table(results)}\n```\n{note}"


def runs_table(runs: list[dict]) -> str:
    """Every full run of the quick start whose figures are committed: what was chosen, and what came of it."""
    lines = [
        "| preset | method | binarize | attention | embeddings | seed | float | binary | kept | file, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        chosen = run["arguments"]
        method = chosen["method"] + (f" ({chosen['method_args']})" if chosen["method_args"] else "")
        names = [chosen["preset"], method, *(chosen[key] for key in ("binarize", "attention", "embeddings", "seed"))]
        reached = [f"{run['accuracy_float']:.1%}", f"{run['accuracy_binary']:.1%}", f"{run['retention']:.3f}"]
        lines.append("| " + " | ".join(map(str, [*names, *reached, f"{run['bytes_packed'] / 1e6:.2f}"])) + " |")
    return "\n".join(lines)


SPEED_ROWS = {
    "linear": "W1A1 linear",
    "ffn": "W1A1 feed-forward block, fused",
    "w1a32": "1-bit weights, float inputs, linear",
    "resnet18_body": "the 19 convolutions of ResNet-18's stages",
}


def speed_table(benchmark: dict) -> str:
    """The kernels over torch's layers of three precisions, by shape."""
    lines = ["| product | shape | ms | over float32 | over bfloat16 | over dynamic int8 |", "|---|---|---|---|---|---|"]
    for row in benchmark["rows"]:
        kind = next((kind for kind in SPEED_ROWS if row["name"].startswith(f"{kind}_")), None)
        if kind is not None:
            shape = row["name"].removeprefix(f"{kind}_").replace("_", " ")
            ratios = [row[f"speedup_{name}"] for name in ("fp32", "bf16", "int8")]
            cells = ["-" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
            lines.append(f"| {SPEED_ROWS[kind]} | {shape} | {row['ms_median']:.4f} | " + " | ".join(cells) + " |")
    machine = benchmark["environment"]
    where = f"{machine['backend']} kernels, {machine['cpu']}, torch {machine['torch']}"
    note = f"{machine['rounds']} rounds, one thread, {where}."
    return "\n".join([*lines, "", note])


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


def updated(text: str) -> str:
    """The README with its generated parts as the committed figures have them."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("quickstart*.json"))]
    parts = {
        "runs": runs_table(runs),
        "images": images_table(RESULTS),
        "speed": speed_table(json.loads((RESULTS / "bench_inference.json").read_text())),
        "methods": methods_table(json.loads((RESULTS / "bench_training.json").read_text())),
        "orders": orders_table(json.loads((RESULTS / "stompp_order.json").read_text())),
        "fsg": fsg_text(json.loads((RESULTS / "fsg.json").read_text())),
        "quickstart": quickstart_table(json.loads((RESULTS / "quickstart.json").read_text())),
    }
    for name, table in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"README.md has {count} places marked <!-- {name} -->: expected 1")
    return text


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(encoding="utf-8")), encoding="utf-8")
