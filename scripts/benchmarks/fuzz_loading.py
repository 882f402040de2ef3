"""Damage saved models in thousands of ways, and check that none loads as a different model.

python scripts/benchmarks/fuzz_loading.py --cases 2000 --seed 0 --output results.json

Each case copies the folder of a tiny model and changes bytes, headers, config fields, the index of shards or whole
files. A separate process with limited memory and time then loads the result. Half of the cases keep the digests in
config.json; the other half recompute them, as an attacker would.
A fault is a different model despite kept digests, a crash, a hang, too much memory, or an error other than
CorruptCheckpointError from one of hf_bnn's own classes. The exit status is 1 if there is any fault.
If a config no longer names the plug-in, transformers warns and does not call it ("bypassed").
"""

import argparse
import collections
import functools
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from fuzz_mutations import MUTATIONS, recompute_digests
from limited_process import Outcome, run_limited
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

import hf_bnn
from hf_bnn import (
    BinaryBertConfig,
    BinaryBertForMaskedLM,
    BinaryBertForSequenceClassification,
    BinaryConfig,
    BinaryResNetConfig,
    BinaryResNetForImageClassification,
    BinaryViTConfig,
    BinaryViTForImageClassification,
    pack_,
)
from hf_bnn.integrity import CorruptCheckpointError

FAULTS = ("different", "crashed", "hung", "too much memory", "unexplained")
SIZE = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 60}  # no whole bytes
TEXT = {**SIZE, "vocab_size": 50, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0}
IMAGES = {"image_size": 8, "num_labels": 3}
RESNET = {"stem": "cifar", "layer_type": "basic", "embedding_size": 12, "hidden_sizes": [12, 20], "depths": [1, 2]}


class Base(NamedTuple):
    """A saved model from which cases are made."""

    folder: Path
    cls: type[PreTrainedModel]
    auto: type
    ours: bool  # one of hf_bnn's own classes
    inputs: dict[str, torch.Tensor]

    def fingerprint(self, model: PreTrainedModel) -> str:
        """The digest of a model's state dict and of its logits for the inputs."""
        digest = hashlib.sha256()
        with torch.no_grad():
            tensors = {**model.state_dict(), "logits": model(**self.inputs).logits}
        for key, tensor in sorted(tensors.items()):
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + raw)
        return digest.hexdigest()


def bases(root: Path) -> list[Base]:
    """Tiny models of all families, packed and latent, in one file and in shards, saved under `root`."""
    torch.manual_seed(0)
    ids = torch.arange(1, 13).view(2, 6)
    text, images = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"pixel_values": torch.randn(2, 3, 8, 8)}
    bert = functools.partial(BinaryBertConfig, **TEXT)
    vit = BinaryViTConfig(**SIZE, **IMAGES, patch_size=4)
    distilbert = DistilBertConfig(
        vocab_size=50, dim=36, n_layers=2, n_heads=2, hidden_dim=60, max_position_embeddings=24
    )
    stock_vit = ViTConfig(**SIZE, **IMAGES, patch_size=4)
    words, pictures = AutoModelForSequenceClassification, AutoModelForImageClassification
    made = {
        "bert": (BinaryBertForSequenceClassification(bert()), words, text),
        "bert-bit": (
            BinaryBertForSequenceClassification(bert(embeddings="binary", attention="binary", levels="signed")),
            words,
            text,
        ),
        "masked": (BinaryBertForMaskedLM(bert()), AutoModelForMaskedLM, text),
        "vit": (BinaryViTForImageClassification(vit), pictures, images),
        "resnet": (BinaryResNetForImageClassification(BinaryResNetConfig(**RESNET, num_labels=3)), pictures, images),
        "distilbert": (BinaryConfig().apply_(DistilBertForSequenceClassification(distilbert)), words, text),
        "stock-vit": (BinaryConfig().apply_(ViTForImageClassification(stock_vit)), pictures, images),
    }
    found = []
    for name, (model, auto, inputs) in made.items():
        for state in ("latent", "packed", "shards"):
            if state == "latent" and name not in ("bert", "distilbert"):
                continue
            model = model if state != "packed" else pack_(model)
            folder = root / f"{name}-{state}"
            model.save_pretrained(folder, **({"max_shard_size": "6KB"} if state == "shards" else {}))
            found.append(Base(folder, type(model), auto, name not in ("distilbert", "stock-vit"), inputs))
    return found


def load(base: Base, folder: Path, auto: bool, expected: str | None, readable: bool) -> Outcome:
    """Load a folder and compare the result with the model that was saved."""
    try:
        model = (base.auto if auto else base.cls).from_pretrained(folder)
        found = base.fingerprint(model)
    except CorruptCheckpointError as error:
        return Outcome("refused" if "\n" not in str(error) else "unexplained", str(error))
    except MemoryError as error:
        return Outcome("too much memory", traceback.format_exc(limit=-3) + str(error))
    except Exception as error:  # any other error is what the fuzzer looks for
        where = traceback.format_exc()
        reached = not auto or f"{Path(hf_bnn.__file__).parent}" in where
        kind = "unexplained" if base.ours and readable and reached else "refused upstream"
        if "memory" in str(error):
            kind = "too much memory"
        return Outcome(kind, f"{type(error).__name__}: {str(error)[:300]} {where[-600:]}")
    kind = "same" if found == expected else "different" if base.ours or names_plug_in(folder) else "bypassed"
    return Outcome(kind, found)


def names_plug_in(folder: Path) -> bool:
    """Whether the config of a stock class still names hf_bnn as its quantizer."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    record = config.get("quantization_config")
    return isinstance(record, dict) and record.get("quant_method") == "hf_bnn"


def is_ours(base: Base, folder: Path) -> bool:
    """Whether a config.json still names the family of its model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config.get("model_type") == base.cls.config_class.model_type
    except (OSError, ValueError, AttributeError):
        return False


def fuzz(cases: int, seed: int, progress: bool = False) -> list[dict[str, Any]]:
    """The outcome of each case."""
    transformers.logging.set_verbosity_error()
    results = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = bases(root)
        paths = [base.folder for base in folders]
        expected = {}
        for base in folders:
            outcome = run_limited(lambda base=base: load(base, base.folder, False, None, True))
            if outcome.kind != "different":
                raise RuntimeError(f"{base.folder.name} cannot be loaded as it was saved: {outcome}")
            expected[base.folder] = outcome.detail
        for number in range(cases):
            chance = random.Random(f"{seed} {number}")
            base, mutation, kept = chance.choice(folders), chance.choice(MUTATIONS), chance.random() < 0.5
            folder = root / f"case-{number}"
            shutil.copytree(base.folder, folder)
            mutation(folder, chance, paths)
            if not kept:
                recompute_digests(folder)
            auto, started = chance.random() < 0.5, time.perf_counter()
            outcome = run_limited(lambda: load(base, folder, auto, expected[base.folder], is_ours(base, folder)))  # noqa: B023
            shutil.rmtree(folder)
            fault = outcome.kind in FAULTS and (kept or outcome.kind != "different")
            results.append(
                {
                    "case": number,
                    "base": base.folder.name,
                    "mutation": mutation.__name__,
                    "digests": "kept" if kept else "recomputed",
                    "auto": auto,
                    "outcome": outcome.kind,
                    "detail": outcome.detail if outcome.kind not in ("same", "different") else "",
                    "fault": fault,
                    "seconds": round(time.perf_counter() - started, 2),
                }
            )
            if progress and (fault or number % 200 == 0):
                print(number, results[-1] if fault else "", flush=True)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Counts of the outcomes, for digests kept and recomputed."""
    counts = collections.Counter((case["digests"], case["outcome"]) for case in results)
    kinds = ("refused", "refused upstream", "bypassed", "same", *FAULTS)
    rows = [f"| {kind} | {counts['kept', kind]} | {counts['recomputed', kind]} |" for kind in kinds]
    return "\n".join(("| outcome | digests kept | digests recomputed |", "|---|---|---|", *rows))


def main() -> int:
    """The exit status: 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the outcome of each case")
    arguments = parser.parse_args()
    results = fuzz(arguments.cases, arguments.seed, progress=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    faults = [case for case in results if case["fault"]]
    print(f"{len(faults)} faults; the slowest case took {max(case['seconds'] for case in results):.1f} s")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
