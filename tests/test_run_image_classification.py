"""scripts/run_image_classification.py: on folders, datasets and streams, on wrong input, resumed, in two processes."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from fake_hub import FakeHub
from image_runs import (  # noqa: F401 (fixtures)
    CONVNEXT,
    CONVNEXT_SIZE,
    MODELS,
    NAMES,
    QUIET,
    RESNET,
    RESNET_SIZE,
    SCRIPT,
    SCRIPTS,
    TRAIN,
    VIT,
    VIT_SIZE,
    Run,
    image,
    image_folders,
    impatience,
    load,
    logits,
    parquet,
    run_images,
    save_vit,
    table,
    task_module,
    write_parquet,
)
from transformers import (
    AutoImageProcessor,
    TrainerCallback,
    pipeline,
)

from hf_bnn import BinaryViTForImageClassification, pack_
from hf_bnn.nn.layers import binary_layers
from hf_bnn.nn.packed import is_packed
from hf_bnn.tasks import stages
from hf_bnn.tasks.images.arguments import ModelArguments, parse_overrides
from hf_bnn.tasks.images.inputs import SMALL_CONFIGS, check_small_images
from hf_bnn.tasks.images.models import load_config, load_model
from hf_bnn.tasks.images.pictures import Collator
from hf_bnn.tasks.labels import Labels

# From data to a packed model


@pytest.mark.parametrize("name", MODELS)
def test_colours_are_learned_and_the_packed_model_keeps_what_was_learned(
    run: Run, folders: list[str], name: str, tmp_path: Path
):
    metrics = run(*folders, *MODELS[name], "--do_train", "--do_eval", "--num_train_epochs", 30)
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["train_samples"] == metrics["eval_samples"] == 16
    packed, latent = load(tmp_path / "out"), load(next((tmp_path / "out").glob("checkpoint-*")))
    assert is_packed(packed)
    assert not is_packed(latent)
    assert binary_layers(latent)
    assert torch.equal(logits(packed), logits(latent))
    classify = pipeline("image-classification", str(tmp_path / "out"), device="cpu")
    assert [classify(image(label, 99 + label))[0]["label"] for label in (0, 1)] == NAMES


def test_a_run_writes_the_files_of_transformers_examples(run: Run, folders: list[str], tmp_path: Path):
    metrics = run(*folders, *VIT, *TRAIN)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    results = {"all_results.json", "train_results.json", "eval_results.json", "trainer_state.json", "README.md"}
    assert results | {"config.json", "model.safetensors", "preprocessor_config.json"} <= names
    assert json.loads((tmp_path / "out/all_results.json").read_text()) == pytest.approx(metrics)
    assert load(tmp_path / "out").config.id2label == {0: "blue", 1: "red"}
    assert "image-classification" in (tmp_path / "out/README.md").read_text()


def test_a_model_from_scratch_gets_a_processor_with_the_datas_mean(run: Run, tmp_path: Path):
    data = write_parquet(tmp_path / "data", train=table(size=12), validation=table(size=12))
    run("--dataset_name", data, *RESNET, *TRAIN)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size == {"height": 12, "width": 12}
    pixels = np.stack([np.asarray(x) for x in table(size=12)["image"]]) / 255
    assert processor.image_mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-4)
    assert processor.image_std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-4)
    run("--dataset_name", data, *RESNET, *TRAIN, "--streaming", "--output_dir", tmp_path / "streamed")
    assert AutoImageProcessor.from_pretrained(tmp_path / "streamed").to_dict() == processor.to_dict()
    run("--dataset_name", data, *RESNET, *TRAIN, "--image_size", 6, "--output_dir", tmp_path / "small")
    assert AutoImageProcessor.from_pretrained(tmp_path / "small").size == {"height": 6, "width": 6}


def test_a_dataset_on_disk_is_read_whatever_its_column_of_images_is_called(run: Run, tmp_path: Path):
    saved, written = tmp_path / "saved", tmp_path / "written"
    DatasetDict({"train": table(column="img"), "test": table(8, column="img")}).save_to_disk(str(saved))
    write_parquet(written, train=table(column="img"), test=table(8, column="img"))
    for folder in (saved, written):
        metrics = run("--dataset_name", folder, "--validation_split_name", "test", *RESNET, *TRAIN)
        assert (metrics["train_samples"], metrics["eval_samples"]) == (16, 8)


def test_samples_can_be_limited_and_evaluation_cut_off_the_training_data(run: Run, tmp_path: Path):
    data = write_parquet(tmp_path / "data", train=table(20))
    cut = ["--dataset_name", data, *RESNET, *TRAIN, "--train_val_split", 0.3]
    assert [run(*cut)[f"{split}_samples"] for split in ("train", "eval")] == [14, 6]
    metrics = run(*cut, "--max_train_samples", 10, "--max_eval_samples", 3)
    assert [metrics[f"{split}_samples"] for split in ("train", "eval")] == [10, 3]


def test_labels_may_be_strings_or_numbers(run: Run, tmp_path: Path):
    named = table().cast_column("label", datasets.Value("int64"))
    words = named.map(lambda row: {"name": ["sky", "fire"][row["label"]]}).remove_columns("label")
    numbers = named.map(lambda row: {"label": row["label"] + 5})
    for index, (rows, column, names) in enumerate(((words, "name", ["fire", "sky"]), (numbers, "label", ["5", "6"]))):
        data = write_parquet(tmp_path / f"data{index}", train=rows, validation=rows)
        run("--dataset_name", data, "--label_column_name", column, *RESNET, *TRAIN)
        assert list(load(tmp_path / "out").config.id2label.values()) == names


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_and_transparent_images_are_taken_as_the_model_needs_them(run: Run, tmp_path: Path, channels: int):
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
    modes = ["L", "RGBA", "RGB", "LA", "P", "1", "L", "RGBA"]
    images = [image(index % 2, index, size=5 + index).convert(mode) for index, mode in enumerate(modes)]
    rows = Dataset.from_dict({"image": images, "label": [0, 1] * 4}, features=features)
    data = write_parquet(tmp_path / "data", train=rows, validation=rows)
    overrides = f"{VIT_SIZE},num_channels={channels}"
    for kind in ("cifar", "imagenet"):
        given = ["--model_type", "vit", "--config_overrides", overrides, "--augmentation", kind]
        assert run("--dataset_name", data, *given, *TRAIN)["eval_samples"] == 8
    assert load(tmp_path / "out").vit.embeddings.patch_embeddings.projection.in_channels == channels
    assert len(AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean) == channels


def test_mixup_and_smoothing_change_the_training_loss_only(run: Run, folders: list[str]):
    given = [*folders, *VIT, *TRAIN, "--learning_rate", 0, "--no_calibrate_levels"]
    plain = run(*given)
    for more in (["--mixup_alpha", 1.0], ["--label_smoothing_factor", 0.5]):
        assert run(*given, *more)["train_loss"] != plain["train_loss"]
    both = run(*given, "--mixup_alpha", 1.0, "--label_smoothing_factor", 0.5)
    assert both["eval_loss"] == pytest.approx(plain["eval_loss"])


def test_the_structure_goes_into_the_config(run: Run, folders: list[str], tmp_path: Path):
    run(
        *folders, *VIT, *TRAIN, "--attention", "binary", "--levels", "signed", "--binarize", "both", "--method", "surge"
    )
    config = load(tmp_path / "out").config
    assert (config.attention, config.levels, config.binarize) == ("binary", "signed", "both")
    assert config.method["name"] == "surge"
    rprelu = f"{RESNET_SIZE},block_activation=rprelu"
    run(*folders, "--model_type", "resnet", "--config_overrides", rprelu, "--levels", "rsign", *TRAIN)
    config = load(tmp_path / "out").config
    assert (config.block_activation, config.levels, config.hidden_sizes) == ("rprelu", "rsign", [16, 32])
    excluded = f"{CONVNEXT_SIZE},exclude=[*.embeddings,classifier,*.downsampling_layer]"
    run(*folders, "--model_type", "convnext", "--config_overrides", excluded, "--binarize", "weights", *TRAIN)
    record = load(tmp_path / "out").config.quantization_config
    assert (record.binarize, record.exclude) == ("weights", ["*.embeddings", "classifier", "*.downsampling_layer"])


def test_a_float_checkpoint_becomes_binary_and_a_packed_one_is_only_evaluated(
    run: Run, folders: list[str], tmp_path: Path
):
    base = ["--model_name_or_path", save_vit(tmp_path / "base", trained=False)]
    trained = run(*folders, *base, *TRAIN)
    assert is_packed(load(tmp_path / "out"))
    again = ["--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "again", *folders]
    found = run(*again, "--do_eval")
    assert found["eval_accuracy"] == trained["eval_accuracy"]
    assert found["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-6)
    with pytest.raises(ValueError, match="is packed: its weights are bits and cannot be trained"):
        run(*again, "--do_train")
    with pytest.raises(ValueError, match="evaluated in float32: leave out --fp16 and --bf16"):
        run(*again, "--do_eval", "--bf16")
    with pytest.raises(ValueError, match="is packed with levels='elastic': it cannot become 'signed'; leave out"):
        run(*again, "--do_eval", "--levels", "signed")
    with pytest.raises(ValueError, match="is a binary checkpoint, which --binarize none cannot make float"):
        run(*again, "--do_eval", "--binarize", "none")


def test_a_float_checkpoint_without_a_class_of_its_own_becomes_binary_too(run: Run, folders: list[str], tmp_path: Path):
    run(*folders, *CONVNEXT, *TRAIN, "--binarize", "none", "--output_dir", tmp_path / "base")
    assert not binary_layers(load(tmp_path / "base"))
    assert load(tmp_path / "base").config.image_size == 8
    metrics = run(*folders, "--model_name_or_path", tmp_path / "base", *TRAIN)
    assert is_packed(load(tmp_path / "out"))
    more = ["--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "again"]
    assert run(*folders, *more, "--do_eval")["eval_accuracy"] == metrics["eval_accuracy"]
    with pytest.raises(ValueError, match="--attention is for ViT: leave it out with a 'convnext' model"):
        run(*folders, *CONVNEXT, *TRAIN, "--attention", "binary")


# Predictions


def read_predictions(folder: Path) -> list[dict[str, str]]:
    with (folder / "predict_results.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def save_packed_vit(folder: Path) -> Path:
    """A packed classifier of the two colours, with its image processor."""
    base = save_vit(
        folder / "float", id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)}
    )
    pack_(BinaryViTForImageClassification.from_pretrained(base)).save_pretrained(folder / "packed")
    AutoImageProcessor.from_pretrained(base).save_pretrained(folder / "packed")
    return folder / "packed"


@pytest.mark.parametrize("kind", ["flat", "classes", "nested"])
def test_images_of_a_folder_are_predicted_with_or_without_folders_of_classes(run: Run, tmp_path: Path, kind: str):
    model, folder = save_packed_vit(tmp_path), tmp_path / "new"
    names = {"flat": "{0}.png", "classes": "{1}/{0}.png", "nested": "a/{1}/b/{0}.JPG"}[kind]
    images = {names.format(index, NAMES[index % 2]): image(index % 2, index) for index in range(5)}
    for name, picture in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name, quality=100)
    (folder / "notes.txt").write_text("not an image")
    run("--model_name_or_path", model, "--do_predict", "--test_dir", folder, "--per_device_eval_batch_size", 2)
    found = read_predictions(tmp_path / "out")
    assert list(found[0]) == ["index", "prediction", "score", "p(blue)", "p(red)", "image"]
    assert [row["image"] for row in found] == sorted(images)
    classify = pipeline("image-classification", str(model), device="cpu")
    for row in found:
        best = classify(str(folder / row["image"]))[0]
        assert (row["prediction"], float(row["score"])) == (best["label"], pytest.approx(best["score"], abs=1e-4))


def test_the_test_split_of_a_dataset_is_predicted_after_training(run: Run, tmp_path: Path):
    unlabelled = table(6).remove_columns("label")
    data = write_parquet(tmp_path / "data", train=table(), validation=table(), test=unlabelled)
    run("--dataset_name", data, *VIT, *TRAIN, "--do_predict", "--max_predict_samples", 5)
    assert [row["index"] for row in read_predictions(tmp_path / "out")] == ["0", "1", "2", "3", "4"]
    again = ["--dataset_name", data, "--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "again"]
    run(*again, "--do_predict", "--test_split_name", "validation")
    assert len(read_predictions(tmp_path / "again")) == 16
    with pytest.raises(ValueError, match=r"--do_predict needs a split 'x'; .*: name another one in --test_split_name"):
        run(*again, "--do_predict", "--test_split_name", "x")


NO_PREDICTION = {
    "no data": (["MODEL"], "--do_predict needs --test_dir, a folder of images; or --dataset_name without --streaming"),
    "no folder": (["MODEL", "--test_dir", "nowhere"], "test_dir 'nowhere' is no folder"),
    "no image": (["MODEL", "--test_dir", "EMPTY"], "test_dir '.*empty' holds no image: expected files like "),
    "no model": (
        ["SCRATCH", "--test_dir", "IMAGES"],
        "--do_predict needs a trained classifier, and a model from scratch",
    ),
    "no head": (
        ["HEADLESS", "--test_dir", "IMAGES"],
        r"needs a trained classifier, and .*headless is none: give --do_tr",
    ),
    "broken": (["MODEL", "--test_dir", "BROKEN"], r"the image of row 0 of the test data \(.*a.png\) cannot be read"),
}


@pytest.mark.parametrize(("arguments", "message"), NO_PREDICTION.values(), ids=NO_PREDICTION)
def test_what_cannot_be_predicted_is_told(run: Run, arguments: list[str], message: str, tmp_path: Path):
    for name in ("empty", "broken", "images"):
        (tmp_path / name).mkdir()
    image(0, 0).save(tmp_path / "images/a.png")
    (tmp_path / "broken/a.png").write_bytes(b"no image")
    stands_for = {"EMPTY": [tmp_path / "empty"], "BROKEN": [tmp_path / "broken"], "IMAGES": [tmp_path / "images"]}
    stands_for["SCRATCH"] = VIT
    if "MODEL" in arguments:
        stands_for["MODEL"] = ["--model_name_or_path", save_packed_vit(tmp_path)]
    if "HEADLESS" in arguments:
        stands_for["HEADLESS"] = ["--model_name_or_path", save_vit(tmp_path / "headless", trained=False)]
    given = [text for argument in arguments for text in stands_for.get(argument, [argument])]
    with pytest.raises(ValueError, match=message):
        run(*given, "--do_predict")


def test_evaluation_has_the_figures_of_each_class(run: Run, folders: list[str], tmp_path: Path):
    run(*folders, "--model_name_or_path", save_packed_vit(tmp_path), "--do_eval")
    found = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert found["eval_per_class"]["red"].keys() == {"precision", "recall", "f1", "support"}
    mean = np.mean([row["f1"] for row in found["eval_per_class"].values()])
    assert found["eval_macro_f1"] == pytest.approx(mean)


# Small images


SMALL_IMAGES = {
    "vit": (
        ["vit"],
        32,
        "a 'vit' from scratch takes 224 x 224 .*: give --image_size 32 --config_overrides \"patch_size=4,",
    ),
    "odd vit": (["vit"], 28, '--image_size 28 --config_overrides "patch_size=4,hidden_size=96,num_hidden_layers=3'),
    "resnet": (
        ["resnet"],
        32,
        "a 'resnet' from scratch is made for photographs: give --config_overrides \"stem=cifar,",
    ),
    "convnext": (
        ["convnext"],
        32,
        "'convnext' from scratch.*: give --image_size 32 --config_overrides, with fewer and",
    ),
    "narrow vit": (["vit", "hidden_size=96"], 32, "takes 224 x 224 .*: give --image_size 32, or --config_name"),
}


@pytest.mark.parametrize(("model", "side", "message"), SMALL_IMAGES.values(), ids=SMALL_IMAGES)
def test_small_images_in_a_model_for_photographs_are_told_what_to_choose(model: list[str], side: int, message: str):
    arguments = ModelArguments(model_type=model[0], config_overrides=model[1] if model[1:] else None)
    config = load_config(arguments)
    with pytest.raises(ValueError, match=f"the images are at most {side} x {side} pixels, but .*{message}"):
        check_small_images(arguments, config, side)
    check_small_images(arguments, config, 200)
    example = re.search('--config_overrides "(.*)"', message)
    assert example is None or parse_overrides(example[1])


def test_what_is_advised_for_small_images_is_accepted():
    for kind, small in SMALL_CONFIGS.items():
        overrides = small.format(patch=4)
        arguments = ModelArguments(model_type=kind, config_overrides=overrides, image_size=32)
        config = load_config(arguments)
        check_small_images(arguments, config, 32)
        model = load_model(arguments, config, Labels(NAMES, {}))
        assert sum(p.numel() for p in model.parameters()) < 1e6
        assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


def test_small_images_are_noticed_before_training(run: Run, folders: list[str]):
    with pytest.raises(ValueError, match=r"the images are at most 8 x 8 pixels, but a 'vit' from scratch takes 224"):
        run(*folders, "--model_type", "vit", "--config_overrides", VIT_SIZE.replace("image_size=8,", ""), *TRAIN)


# Streams


def test_a_stream_trains_and_evaluates(run: Run, tmp_path: Path):
    data = write_parquet(tmp_path / "data", train=table(), validation=table(10))
    given = ["--dataset_name", data, "--streaming", *VIT, "--do_train", "--do_eval", "--shuffle_buffer", 8]
    metrics = run(*given, "--max_steps", 60, "--save_strategy", "no")
    assert metrics["eval_accuracy"] == 1.0
    assert is_packed(load(tmp_path / "out"))


def test_a_stream_needs_to_know_how_long_and_which_classes(run: Run, tmp_path: Path):
    rows = table().cast_column("label", datasets.Value("int64"))
    data = write_parquet(tmp_path / "data", train=rows, validation=rows)
    given = ["--dataset_name", data, "--streaming", *VIT, "--do_train"]
    with pytest.raises(ValueError, match="--streaming does not know how long an epoch is: give --max_steps"):
        run(*given)
    with pytest.raises(ValueError, match="--streaming cannot cut off --train_val_split: name a split in --validation"):
        run(*given, "--max_steps", 1, "--train_val_split", 0.1)
    with pytest.raises(ValueError, match=r"does not say which classes its column 'label' has: leave out --streaming"):
        run(*given, "--max_steps", 1)


# Resuming


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every batch that is collated from now on."""
    seen: list[torch.Tensor] = []
    call = Collator.__call__

    def spying(self: Collator, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = call(self, items)
        seen.append(batch["pixel_values"].clone())
        return batch

    monkeypatch.setattr(Collator, "__call__", spying)
    return seen


@pytest.mark.parametrize("source", ["memory", "files", "stream"])
def test_a_resumed_run_sees_the_same_images_and_ends_where_an_uninterrupted_one_does(
    run: Run, source: str, batches: list[torch.Tensor], tmp_path: Path
):
    """Steps of 4 of 16 images: the checkpoint is in the second epoch, which is not the first one again."""
    more = {"memory": ["--mixup_alpha", 0.5], "files": ["--augmentation", "imagenet"], "stream": ["--streaming"]}
    data = write_parquet(tmp_path / "data", train=table())
    steps = ["--dataset_name", data, *VIT, "--do_train", "--max_steps", 10, "--save_steps", 6, "--no_calibrate_levels"]
    steps += ["--per_device_train_batch_size", 4, *more[source]]
    run(*steps)
    whole, first = load(tmp_path / "out"), list(batches)[1:]  # without the one that prepares the model
    batches.clear()
    run(*steps, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", tmp_path / "out/checkpoint-6")
    assert torch.equal(logits(load(tmp_path / "resumed")), logits(whole))
    last = batches[-5:]  # a stream is read from its beginning; accelerate reads one batch more than it needs
    assert all(torch.equal(a, b) for a, b in zip(first[6:11], last, strict=True))
    assert not any(torch.equal(a, b) for a in first[:4] for b in first[4:8])


# Teachers and float models


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_float_model_is_trained_by_the_same_script_and_then_teaches(
    run: Run, folders: list[str], name: str, tmp_path: Path
):
    teacher = tmp_path / "teacher"
    epochs = ["--do_train", "--do_eval", "--num_train_epochs", 20]
    float_model = [*MODELS[name], "--binarize", "none", "--output_dir", teacher]
    assert run(*folders, *epochs, *float_model)["eval_accuracy"] == 1.0
    assert not binary_layers(load(teacher))
    taught = [*folders, *MODELS[name], *TRAIN, "--teacher_model_name_or_path", teacher]
    losses = [run(*taught, "--distillation_hidden_weight", weight)["train_loss"] for weight in (0, 1)]
    assert losses[0] != losses[1]
    assert is_packed(load(tmp_path / "out"))


def test_how_to_distil_is_not_said_without_a_teacher(run: Run, folders: list[str]):
    message = (
        r"distillation_temperature=2\.0 is for distillation, but there is no teacher: give --teacher_model_name_or"
    )
    with pytest.raises(ValueError, match=message):
        run(*folders, *VIT, *TRAIN, "--distillation_temperature", 2)


def test_a_teacher_must_fit_the_student(run: Run, folders: list[str], tmp_path: Path):
    def refused(message: str, teacher: Path, *arguments: object) -> None:
        with pytest.raises(ValueError, match=message):
            run(*folders, *VIT, *TRAIN, "--image_processor_name", student, "--teacher_model_name_or_path", teacher)

    student = save_vit(tmp_path / "student")
    base = save_vit(tmp_path / "base", trained=False)
    refused(r"base is no trained image classifier \(\['ViTModel'\]\): train one with --binarize none", base)
    refused("has 3 labels, the data has 2: they must agree", save_vit(tmp_path / "a", num_labels=3))
    turned = save_vit(tmp_path / "b", id2label={0: "red", 1: "blue"})
    refused("labels in the order red, blue, the student in the order blue, red: train the teacher on the", turned)
    other = save_vit(tmp_path / "c", mean=0.25)
    refused(r"image_mean \[0.25, 0.25, 0.25\], the student of \[0.5, 0.5, 0.5\]: name the teacher's", other)
    wide = save_vit(tmp_path / "d", hidden_size=48)
    refused("hidden states are 48 wide, the student's 32: set distillation_hidden_weight=0", wide)
    maps = tmp_path / "maps"
    small = RESNET_SIZE.replace("cifar", "imagenet")
    run(
        *folders, "--model_type", "resnet", "--config_overrides", small, "--image_size", 8, *TRAIN, "--output_dir", maps
    )
    with pytest.raises(
        ValueError, match=r"hidden states are 2 wide, the student's 8: set distillation_hidden_weight=0"
    ):
        run(*folders, *RESNET, *TRAIN, "--teacher_model_name_or_path", maps)
    run(*folders, *VIT, "--binarize", "none", *TRAIN, "--output_dir", tmp_path / "plain")
    with pytest.raises(ValueError, match="a teacher is for a binary student: leave"):
        run(*folders, "--model_name_or_path", tmp_path / "plain", *TRAIN, "--teacher_model_name_or_path", student)


# Two steps


def test_two_steps_train_activations_first_and_then_both(run: Run, folders: list[str], tmp_path: Path):
    steps = ["--do_train", "--do_eval", "--max_steps", 10, "--two_step", "--two_step_fraction", 0.4]
    metrics = run(*folders, *RESNET, *steps)
    first, out = tmp_path / "out/first_step", tmp_path / "out"
    assert (load(first).config.binarize, load(out).config.binarize) == ("activations", "both")
    assert is_packed(load(out))
    done = [json.loads((folder / "trainer_state.json").read_text())["global_step"] for folder in (first, out)]
    assert done == [4, 6]
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (first, out)]
    assert results[0]["eval_accuracy"] >= 0
    assert results[1] == pytest.approx(metrics)


@pytest.mark.parametrize("cut", ["first", "between", "second"])
def test_two_steps_are_resumed_in_either(
    run: Run, script: ModuleType, folders: list[str], cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps = [*folders, *RESNET, "--do_train", "--max_steps", 8, "--save_steps", 2, "--two_step"]
    run(*steps)
    whole = logits(load(tmp_path / "out"))
    other = tmp_path / "other"
    train, called = stages.train, []

    def cut_off(trainer: Any, resume: str | None) -> dict[str, float]:
        called.append(Path(trainer.args.output_dir).name)
        last = {"first": "first_step", "between": "other", "second": "other"}[cut]
        if called[-1] == last:
            if cut != "between":
                trainer.add_callback(StopAfter(3))
                trainer.train()
            raise KeyboardInterrupt
        return train(trainer, resume)

    with monkeypatch.context() as patched:
        patched.setattr(stages, "train", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(*steps, "--output_dir", other)
    trained: list[str] = []
    monkeypatch.setattr(
        stages, "train", lambda trainer, resume: (trained.append(str(resume)), train(trainer, resume))[1]
    )
    run(*steps, "--output_dir", other, "--resume_from_checkpoint", "True")
    ends = {"first": ["other/first_step/checkpoint-2", "None"], "between": ["None"], "second": ["other/checkpoint-2"]}
    assert [name[-len(end) :] for name, end in zip(trained, ends[cut], strict=True)] == ends[cut]
    assert torch.equal(logits(load(other)), whole)


class StopAfter(TrainerCallback):
    """Ends training after so many steps."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.steps


# Recipes


@pytest.mark.parametrize("name", sorted(path.name for path in (SCRIPTS / "recipes").glob("*.json")))
def test_a_recipe_can_be_run_and_overridden(run: Run, name: str, tmp_path: Path):
    size = 32 if "cifar" in name else 28
    data = write_parquet(tmp_path / "data", train=table(size=size), test=table(4, size=size))
    short = ["--max_steps", 1, "--eval_strategy", "no", "--save_strategy", "no", "--learning_rate", 0.25]
    metrics = run(SCRIPTS / "recipes" / name, "--dataset_name", data, *short)
    assert metrics["eval_samples"] == 4
    saved = torch.load(tmp_path / "out/training_args.bin", weights_only=False)
    assert (saved.learning_rate, saved.per_device_train_batch_size) == (0.25, 128)
    config = load(tmp_path / "out").config
    assert config.hidden_size == 96 if "vit" in name else config.hidden_sizes == [16, 32, 64]


# Other processes


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", **more}


@pytest.mark.multiprocess
def test_a_user_error_in_a_worker_is_one_line_and_exit_code_two(folders: list[str], tmp_path: Path):
    broken = Path(folders[1]) / "red/03.png"
    broken.write_bytes(b"no image")
    given = [*folders, *VIT, *TRAIN, *QUIET, "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "c")]
    save = save_vit(tmp_path / "p")
    more = ["--augmentation", "imagenet", "--dataloader_num_workers", "1", "--image_processor_name", str(save)]
    command = [sys.executable, SCRIPT, *given, *more, "--no_calibrate_levels"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=120)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("run_image_classification.py: error: ")]
    assert len(lines) == 1
    assert "error: the image of row" in lines[0]
    assert "Traceback" not in result.stderr


@pytest.mark.multiprocess
def test_a_model_goes_from_the_hub_to_the_hub_and_two_processes_share_the_work(tmp_path: Path):
    """Data and a float model from a local Hub; the packed result is pushed."""
    with FakeHub() as hub:
        rows = {f"data/{split}-00000-of-00001.parquet": parquet(table()) for split in ("train", "validation")}
        hub.add("dataset", "me/colours", rows)
        hub.add("model", "tester/tiny-vit", save_vit(tmp_path / "vit", trained=False))
        env = environment(**hub.environment(tmp_path / "home"))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
        given = ["--dataset_name", "me/colours", "--model_name_or_path", "tester/tiny-vit", *TRAIN]
        push = ["--push_to_hub", "--hub_model_id", "tester/tiny-bnn", "--output_dir", str(tmp_path / "out")]
        batch = ["--per_device_train_batch_size", "4"]
        command = [*launch, *given, *push, *batch, *QUIET]
        result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=180)
        assert result.returncode == 0, result.stderr
        pushed = hub.files("model", "tester/tiny-bnn")
    metrics = json.loads((tmp_path / "out/all_results.json").read_text())
    assert metrics["epoch"] == 1.0  # two steps of 2 x 4 images are the 16 rows
    assert json.loads(pushed["config.json"])["weight_format"] == "packed"
    assert "preprocessor_config.json" in pushed
    assert pushed["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()
    assert b"me/colours" in pushed["README.md"]
