"""The mutations of fuzz_loading.py. Each changes a copy of a saved model's folder, in place.

`others`: the folders of all saved models, from which a mutation may take a file.
"""

import json
import os
import random
import shutil
import struct
from pathlib import Path

from hf_bnn.integrity import file_digest
from hf_bnn.models.checkpoint import structure_digest

FIELDS = ("quantization_config", "auto_map", "transformers_weights", "torch_dtype", "is_decoder", "num_labels", "new")
FIELDS += ("tie_word_embeddings", "add_cross_attention")
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -2.5, 1e9, 10**6, 10**9, 10**12, 2**63, float("nan"), float("inf")),
    *("", "x", "float", "signed", "elastic", "unsigned", "rsign", "none", "both", "weights", "activations", "latent"),
    *("packed", "binary", "boolean", "int8", "layer", "channel", "relu", "gelu", "float16", "bfloat16", "int32"),
    *([], ["*"], [1], {}, {"0": "a"}, [[]], ["BertModel"], "../../etc/passwd", "💥" * 3),
)


def change_bytes(folder: Path, chance: random.Random, others: list[Path]) -> None:
    path = chance.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 1, 2, 8, 64))):
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
    path.write_bytes(data)


def change_header_bytes(folder: Path, chance: random.Random, others: list[Path]) -> None:
    path = chance.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(chance.choice((1, 2, 4))):
        data[chance.randrange(end)] = chance.choice((*b'0123456789"{}[],:UFI', chance.randrange(256)))
    path.write_bytes(data)


def cut_or_extend(folder: Path, chance: random.Random, others: list[Path]) -> None:
    path = chance.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    cut = data[: chance.choice((0, 4, 8, 100, len(data) // 2, len(data) - 1))]
    path.write_bytes(chance.choice((cut, data + bytes(chance.choice((1, 8, 1000))))))


def change_header(folder: Path, chance: random.Random, others: list[Path]) -> None:
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
        case 6:  # the tensor is removed from the file completely
            start, stop = header.pop(name)["data_offsets"]
            data = data[: end + start] + data[end + stop :]
            for rest in names:
                if rest in header and header[rest]["data_offsets"][0] >= stop:
                    header[rest]["data_offsets"] = [at - (stop - start) for at in header[rest]["data_offsets"]]
        case 7:  # a tensor that the model does not know
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


def change_config(folder: Path, chance: random.Random, others: list[Path]) -> None:
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


def change_files(folder: Path, chance: random.Random, others: list[Path]) -> None:
    other = chance.choice(others)
    weights = sorted(folder.glob("*.safetensors"))
    match chance.randrange(5):
        case 0:
            chance.choice(sorted(folder.iterdir())).unlink()
        case 1:  # a file that an older save has left
            source = chance.choice(sorted(other.glob("*.safetensors")))
            shutil.copy(source, folder / chance.choice(("model.safetensors", source.name)))
        case 2:
            shutil.copy(other / "config.json", folder / "config.json")
        case 3:
            chance.choice(weights).write_bytes(chance.choice(weights).read_bytes())
        case 4:
            os.replace(chance.choice(weights), folder / chance.choice(("model.fp32.safetensors", "pytorch_model.bin")))


def change_index(folder: Path, chance: random.Random, others: list[Path]) -> None:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        shutil.copy(chance.choice(others) / "config.json", path)
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
            other = chance.choice(others)
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
    """Update the digests in config.json to the present files, as far as it can still be read."""
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
