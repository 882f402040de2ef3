"""Broken files: one clear error each; nothing that was saved is lost, nothing half-written is taken for good."""

import errno

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_trainer import trainer
from tiny import tiny_batch, tiny_model
from transformers import AutoModelForSequenceClassification, TrainerCallback, modeling_utils

from hf_bnn import BinaryBertForSequenceClassification, Surge, pack_
from hf_bnn.integrity import MANIFEST, CorruptCheckpointError, verify_manifest

WEIGHTS = "model.safetensors"


@pytest.fixture(params=["latent", "packed"])
def saved(request, tmp_path):
    model = tiny_model() if request.param == "latent" else pack_(tiny_model())
    model.save_pretrained(tmp_path)
    return tmp_path


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_truncated_weight_file_is_refused(saved):
    path = saved / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        CorruptCheckpointError, match=r"model\.safetensors .* is truncated or was altered .* save it again"
    ):
        load(saved)


def test_a_single_flipped_bit_is_refused(saved):
    path = saved / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptCheckpointError, match="is truncated or was altered after it was saved"):
        load(saved)


def test_without_digests_a_truncated_file_is_still_one_clear_error(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    model.config.weights_sha256 = None
    model.config.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorruptCheckpointError, match=r"cannot be read .*: fetch or save it again"):
        load(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_missing_tensor_is_refused_and_never_random(tmp_path, packed):
    model = pack_(tiny_model()) if packed else tiny_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model.config.weights_sha256 = None
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CorruptCheckpointError, match=r"lacks 'bert\.encoder\.layer\.0\.output\.dense\.weight'"):
        load(tmp_path)


def test_a_full_disk_leaves_the_saved_model_as_it_was(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(modeling_utils, "safe_save_file", no_space)
    with pytest.raises(
        OSError, match=r"could not save to .* No space left on device\. Nothing that was there has changed"
    ):
        pack_(model).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_again_over_shards_leaves_one_whole_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path)), logits(model))
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == [WEIGHTS]
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_saving_shards_over_one_file_leaves_no_stale_weights(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert not (tmp_path / WEIGHTS).exists()  # it would be loaded before the shards
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_another_variant_stays(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="other")
    assert {path.name for path in tmp_path.glob("model*")} == {WEIGHTS, "model.other.safetensors"}


def test_a_flipped_bit_in_a_shard_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20kB")
    path = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptCheckpointError, match=path.name):
        load(tmp_path)


@torch.no_grad()
def logits(model):
    return model.eval()(**tiny_batch()).logits


def test_a_stale_method_part_never_reaches_the_file(tmp_path):
    model = tiny_model()
    trainer(tmp_path / "run", model, method=Surge())  # installs the auxiliary weights
    assert [name for name in model.state_dict() if ".around.aux" in name]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert not [name for name in file.keys() if "around" in name]  # noqa: SIM118
    BinaryBertForSequenceClassification.from_pretrained(tmp_path)


# Trainer checkpoints


@pytest.fixture
def run(tmp_path):
    trainer(tmp_path, method=Surge(), max_steps=4, save_strategy="steps", save_steps=2).train()
    return tmp_path


class Steps(TrainerCallback):
    """Notes the number of every step that is made."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seen.append(state.global_step)


def test_a_half_written_checkpoint_is_passed_over(run):
    (run / "checkpoint-4" / MANIFEST).unlink()  # it is written last
    (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    again = trainer(run, method=Surge(), max_steps=4)
    steps = Steps()
    again.add_callback(steps)
    again.train(resume_from_checkpoint=True)
    assert steps.seen == [3, 4]
    with pytest.raises(
        CorruptCheckpointError, match=r"checkpoint-4 has no hf_bnn_manifest\.json: its writing was cut off"
    ):
        trainer(run, method=Surge(), max_steps=4).train(resume_from_checkpoint=str(run / "checkpoint-4"))


@pytest.mark.parametrize("name", [WEIGHTS, "optimizer.pt", "method_state.safetensors", "trainer_state.json"])
def test_any_altered_file_of_a_checkpoint_is_refused(run, name):
    path = run / "checkpoint-4" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptCheckpointError, match=name):
        trainer(run, method=Surge(), max_steps=5).train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_resuming_from_nothing_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*; leave it out to train anew"):
        trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=True)


def test_a_failed_save_keeps_the_older_checkpoint(run, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    again = trainer(run, method=Surge(), max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1)
    monkeypatch.setattr(modeling_utils, "safe_save_file", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        again.train(resume_from_checkpoint=True)
    verify_manifest(run / "checkpoint-4")
