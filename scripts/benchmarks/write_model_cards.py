"""Rewrite model_cards/: a card for each full run of the quick start with figures in scripts/benchmarks/results.

python scripts/benchmarks/write_model_cards.py
"""

import argparse
import json
from pathlib import Path

from hf_bnn import BinaryBertConfig, BinaryBertForSequenceClassification
from hf_bnn.model_card import Facts, description, usage
from hf_bnn.tasks.quickstart_results import HUB_MODEL, method_name, table

ROOT = Path(__file__).parents[2]
RESULTS, CARDS = Path(__file__).parent / "results", ROOT / "model_cards"

HEAD = """---
library_name: transformers
language: en
pipeline_tag: text-classification
base_model: HUB_MODEL
tags:
- binary
- hf_bnn
---
"""


def card(results: dict, name: str) -> str:
    """The Markdown card of the run with these results."""
    chosen, versions = results["arguments"], results["versions"]
    structure = {key: chosen[key] for key in ("binarize", "attention", "embeddings")}
    config = BinaryBertConfig(**structure).to_dict()
    method = method_name(chosen["method"], chosen["method_args"])
    architecture = BinaryBertForSequenceClassification.__name__
    facts = Facts(architecture, config, method, results["binary_share"], results["matrix_compression"])
    machine = f"{versions['threads']} thread(s), {versions['machine']}, torch {versions['torch']}"
    return f"""{HEAD.replace("HUB_MODEL", HUB_MODEL)}
# {name}: the sentiment of film reviews, in bits

{description(facts)}

## Results

One run, seed {results["seed"]}, after the last step of training; {machine}.

```
{table(results)}
```

## How to use it

{usage(facts, name, beside_float=True)}
"""


def cards() -> dict[str, str]:
    """The cards' texts by file name."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("quickstart*.json"))}
    return {f"{name}.md": card(results, name) for name, results in runs.items()}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    CARDS.mkdir(exist_ok=True)
    for name, text in cards().items():
        (CARDS / name).write_text(text, encoding="utf-8")
