"""Break saved models in thousands of ways and see that none is loaded as another one.

python scripts/benchmarks/fuzz_loading.py --cases 2000 --seed 0 --output results.json

Each case copies the folder of a tiny model, changes bytes, headers, fields of the config, the index of shards or the
files themselves, and loads what came of it in a process of its own, whose memory and time are limited. Half of the
cases keep the digests that config.json holds, half compute them anew, as someone would who means to deceive.
A fault is: another model with the digests kept; a crash, a hang or too much memory in any case; an error other than
CorruptCheckpointError from one of hf_bnn's own classes. The exit status is 1 if there is any.
Where a config no longer names the plug-in, transformers does not ask it ("bypassed"), and says so in a warning.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
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
from hf_bnn.integrity import CorruptCheckpointError, file_digest
from hf_bnn.models.checkpoint import structure_digest

SECONDS, GIGABYTES = 20, 2  # that one loading may take
FAULTS = ("different", "crashed", "hung", "too much memory", "unexplained")
SIZE = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 60}  # no whole bytes
TEXT = {**SIZE, "vocab_size": 50, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0}
IMAGES = {"image_size": 8, "num_labels": 3}
RESNET = {"stem": "cifar", "layer_type": "basic", "embedding_size": 12, "hidden_sizes": [12, 20], "depths": [1, 2]}
FIELDS = ("quantization_config", "auto_map", "transformers_weights", "torch_dtype", "is_decoder", "num_labels", "new")
FIELDS += ("tie_word_embeddings", "add_cross_attention")
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -2.5, 1e9, 10**6, 10**9, 10**12, 2**63, float("nan"), float("inf")),
    *("", "x", "float", "signed", "elastic", "unsigned", "rsign", "none", "both", "weights", "activations", "latent"),
    *("packed", "binary", "boolean", "int8", "layer", "channel", "relu", "gelu", "float16", "bfloat16", "int32"),
    *([], ["*"], [1], {}, {"0": "a"}, [[]], ["BertModel"], "../../etc/passwd", "💥" * 3),
)


class Base(NamedTuple):
    """A model in a folder, from which cases are made."""

    folder: Path
    cls: type[PreTrainedModel]
    auto: type
    ours: bool  # one of hf_bnn's own classes
    inputs: dict[str, torch.Tensor]

    def fingerprint(self, model: PreTrainedModel) -> str:
        """The digest of all that a model holds, and of what it makes of the inputs."""
        digest = hashlib.sha256()
        with torch.no_grad():
            tensors = {**model.state_dict(), "logits": model(**self.inputs).logits}
        for key, tensor in sorted(tensors.items()):
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + raw)
        return digest.hexdigest()


class Outcome(NamedTuple):
    """What came of a case."""

    kind: str  # refused | refused upstream | bypassed | same, or one of the faults
    detail: str = ""


# The folders


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


# The mutations: each changes a copy in place


def change_bytes(folder: Path, chance: random.Random, others: list[Base]) -> None:
    path = chance.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 1, 2, 8, 64))):
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
    path.write_bytes(data)


def change_header_bytes(folder: Path, chance: random.Random, others: list[Base]) -> None:
    path = chance.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(chance.choice((1, 2, 4))):
        data[chance.randrange(end)] = chance.choice((*b'0123456789"{}[],:UFI', chance.randrange(256)))
    path.write_bytes(data)


def cut_or_extend(folder: Path, chance: random.Random, others: list[Base]) -> None:
    path = chance.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    cut = data[: chance.choice((0, 4, 8, 100, len(data) // 2, len(data) - 1))]
    path.write_bytes(chance.choice((cut, data + bytes(chance.choice((1, 8, 1000))))))


def change_header(folder: Path, chance: random.Random, others: list[Base]) -> None:
    path = chance.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    names = [name for name in header if name != "__metadata__"]
    name, other = chance.choice(names), chance.choice(names)
    entry = header[name]
    match chance.randrange(8):
        case 0:
            entry["dtype"] = chance.choice(
                ("U8", "I8", "F32", "I32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "?")
            )
        case 1:
            entry["shape"] = chance.choice((entry["shape"][::-1], [*entry["shape"], 1], [10**12], [-1], [], [2**62, 4]))
        case 2:
            start, stop = entry["data_offsets"]
            entry["data_offsets"] = chance.choice(([stop, start], [0, 2**63], [start, stop + 8], [-8, stop]))
        case 3:
            del header[name]
        case 4:
            header[chance.choice((name + "x", name.replace("weight", "bias"), "input_levels.width", ""))] = header.pop(
                name
            )
        case 5:
            header[name], header[other] = header[other], entry
        case 6:  # the tensor goes from the file, wholly
            start, stop = header.pop(name)["data_offsets"]
            data = data[: end + start] + data[end + stop :]
            for rest in names:
                if rest in header and header[rest]["data_offsets"][0] >= stop:
                    header[rest]["data_offsets"] = [at - (stop - start) for at in header[rest]["data_offsets"]]
        case 7:  # one that the model does not know
            size = len(data) - end
            header[
                f"{name.rpartition('.')[0]}.{chance.choice(('extra', 'width', 'weight_scale', 'input_levels.offset'))}"
            ] = {
                "dtype": "F32",
                "shape": [2],
                "data_offsets": [size, size + 8],
            }
            data += bytes(8)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def change_config(folder: Path, chance: random.Random, others: list[Base]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        part = config
        nested = [value for value in config.values() if isinstance(value, dict) and value]
        if nested and chance.random() < 0.3:
            part = chance.choice(nested)
        keys = [key for key in part if not key.endswith("sha256")]
        key = chance.choice(keys)
        value = part[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        near = (value + 1, value - 1, value * 2, value // 2, -value, value * 10**6) if number else ()
        match chance.randrange(8):
            case 0:
                del part[key]
            case 1:
                part[chance.choice(keys)] = value
            case 2:
                part[chance.choice(FIELDS)] = chance.choice(VALUES)
            case _:
                part[key] = chance.choice((*near, *near, *VALUES))
    path.write_text(json.dumps(config))


def change_files(folder: Path, chance: random.Random, others: list[Base]) -> None:
    other = chance.choice(others).folder
    weights = sorted(folder.glob("*.safetensors"))
    match chance.randrange(5):
        case 0:
            chance.choice(sorted(folder.iterdir())).unlink()
        case 1:  # what an older save has left
            source = chance.choice(sorted(other.glob("*.safetensors")))
            shutil.copy(source, folder / chance.choice(("model.safetensors", source.name)))
        case 2:
            shutil.copy(other / "config.json", folder / "config.json")
        case 3:
            chance.choice(weights).write_bytes(chance.choice(weights).read_bytes())
        case 4:
            os.replace(chance.choice(weights), folder / chance.choice(("model.fp32.safetensors", "pytorch_model.bin")))


def change_index(folder: Path, chance: random.Random, others: list[Base]) -> None:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        shutil.copy(chance.choice(others).folder / "config.json", path)
        if chance.random() < 0.5:
            (folder / "model.safetensors").rename(folder / "moved.safetensors")
            names = chance.choice((["moved.safetensors"], ["../model.safetensors"], ["/etc/passwd"], [], [7]))
            path.write_text(json.dumps({"metadata": {}, "weight_map": {str(i): name for i, name in enumerate(names)}}))
        return
    index = json.loads(path.read_text())
    table = index["weight_map"]
    names, key = sorted(set(table.values())), chance.choice(sorted(table))
    match chance.randrange(6):
        case 0:
            table[key] = chance.choice((*names, "../model.safetensors", "config.json", "/etc/passwd", "", None, 7))
        case 1:
            gone = chance.choice(names)
            index["weight_map"] = {key: name for key, name in table.items() if name != gone}
        case 2:
            index["weight_map"] = chance.choice(([], {}, None, "x", {"a": []}))
        case 3:
            other = chance.choice(others).folder
            wrong = Path("..") / other.name / chance.choice(sorted(other.glob("*.safetensors"))).name
            index["weight_map"] = {**table, key: str(wrong)}
        case 4:
            index = chance.choice(([], {}, None, {"weight_map": table}, {"metadata": {}}))
        case 5:
            del table[key]
    path.write_text(json.dumps(index))


MUTATIONS = (
    change_bytes,
    change_header_bytes,
    cut_or_extend,
    change_header,
    change_config,
    change_config,
    change_config,
)
MUTATIONS += (change_files, change_index)


def recompute_digests(folder: Path) -> None:
    """Make config.json's digests those of what is there now, as far as it can still be read."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        record = config.get("quantization_config", config)
        files = [p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name.endswith("index.json")]
        record["weights_sha256"] = {p.name: file_digest(p) for p in sorted(files)}
        if "config_sha256" in record:
            record["config_sha256"] = structure_digest(config)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    except (OSError, ValueError, AttributeError, TypeError):
        return


# One case


def run_limited(load: Callable[[], Outcome]) -> Outcome:
    """`load()` in a forked process with its own limits of memory and time."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no other thread holds a lock here
        child = os.fork()
    if child == 0:
        _limit_and_answer(load, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        hung = os.WTERMSIG(status) == signal.SIGALRM
        return Outcome("hung" if hung else "crashed", signal.Signals(os.WTERMSIG(status)).name)
    if not answer:
        return Outcome("crashed", f"exit status {os.WEXITSTATUS(status)}")
    outcome, grown = pickle.loads(answer)
    return Outcome("too much memory", f"{grown / 2**30:.1f} GiB") if grown > GIGABYTES * 2**29 else outcome


def _memory() -> tuple[int, int]:
    """This process's address space and what of it is in memory, in bytes."""
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[1]) * resource.getpagesize()


def _limit_and_answer(load: Callable[[], Outcome], writer: int) -> None:
    try:
        used, resident = _memory()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(GIGABYTES * 2**30),) * 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            outcome = load()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
        os.write(writer, pickle.dumps((outcome, grown)))
    finally:
        os._exit(0)


def load(base: Base, folder: Path, auto: bool, expected: str | None, readable: bool) -> Outcome:
    """Load a folder and compare it with the model that was saved."""
    try:
        model = (base.auto if auto else base.cls).from_pretrained(folder)
        found = base.fingerprint(model)
    except CorruptCheckpointError as error:
        return Outcome("refused" if "\n" not in str(error) else "unexplained", str(error))
    except MemoryError as error:
        return Outcome("too much memory", traceback.format_exc(limit=-3) + str(error))
    except Exception as error:  # whatever it is, is what the fuzzer looks for
        where = traceback.format_exc()
        reached = not auto or f"{Path(hf_bnn.__file__).parent}" in where
        kind = "unexplained" if base.ours and readable and reached else "refused upstream"
        if "memory" in str(error):
            kind = "too much memory"
        return Outcome(kind, f"{type(error).__name__}: {str(error)[:300]} {where[-600:]}")
    kind = "same" if found == expected else "different" if base.ours or names_plug_in(folder) else "bypassed"
    return Outcome(kind, found)


def names_plug_in(folder: Path) -> bool:
    """Whether the config of a stock class still says that hf_bnn is to read the weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    record = config.get("quantization_config")
    return isinstance(record, dict) and record.get("quant_method") == "hf_bnn"


def is_ours(base: Base, folder: Path) -> bool:
    """Whether a config.json can still be seen to be of the family that it was of."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config.get("model_type") == base.cls.config_class.model_type
    except (OSError, ValueError, AttributeError):
        return False


def fuzz(cases: int, seed: int, progress: bool = False) -> list[dict[str, Any]]:
    """What came of each case."""
    transformers.logging.set_verbosity_error()
    results = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = bases(root)
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
            mutation(folder, chance, folders)
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
    parser.add_argument("--output", type=Path, help="a JSON file for what came of each case")
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
