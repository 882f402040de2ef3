"""Mistakes in an image run: each is one error that names the wrong value and the way out."""

import sys
from pathlib import Path
from types import ModuleType

import datasets
import pytest
from datasets import ClassLabel
from image_runs import (  # noqa: F401 (fixtures)
    CONVNEXT,
    NAMES,
    QUIET,
    SCRIPTS,
    TRAIN,
    VIT,
    Run,
    image,
    image_folders,
    impatience,
    load,
    run_images,
    save_vit,
    table,
    task_module,
    write_parquet,
)

from hf_bnn.tasks.images.arguments import parse_overrides

WRONG_FILES = {
    "syntax": ("{", r"arguments.json is no json file \(Expecting property name"),
    "list": ("[1]", r'arguments.json holds a list: expected a dictionary, \{"argument": value, ...\}'),
    "name": (
        '{"lerning_rate": 1}',
        r"arguments.json: some keys are not used by the HfArgumentParser: \['lerning_rate'\]",
    ),
    "choice": ('{"binarize": "all"}', "binarize='all': invalid choice .choose from 'both', 'weights'"),
}


@pytest.mark.parametrize(("text", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_json_file_is_told(run: Run, text: str, message: str, tmp_path: Path):
    path = tmp_path / "arguments.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        run(path)


def test_output_dir_must_be_given(script: ModuleType):
    recipe = SCRIPTS / "recipes/fashion_mnist_vit.json"
    with pytest.raises(ValueError, match="the following arguments are required: --output_dir"):
        script.main([str(recipe), *QUIET])


# Wrong input


def test_overrides_are_read_as_json_or_as_text():
    text = "hidden_size=96, depths=[3, 3,3],stem=cifar,rate=1e-3,flag=True,off=false,nothing=None,names=[a,b]"
    assert parse_overrides(text) == {
        **{"hidden_size": 96, "depths": [3, 3, 3], "stem": "cifar", "rate": 1e-3},
        **{"flag": True, "off": False, "nothing": None, "names": ["a", "b"]},
    }
    assert parse_overrides(None) == {}
    for wrong in ("hidden_size", "depths=[3,3", "=3"):
        with pytest.raises(ValueError, match=r"config_overrides: cannot read '.*'; expected name=value pairs"):
            parse_overrides(wrong)


WRONG = {
    "no data": (["VIT"], r"no data: give --dataset_name .* or --train_dir and --validation_dir"),
    "no model": (["FOLDERS"], "no model: give --model_name_or_path, or to start from scratch --model_type or"),
    "no train_dir": (["VIT", "--validation_dir", "DATA"], "--do_train needs --train_dir; given: validation_dir"),
    "no such folder": (["VIT", "--train_dir", "no", "--validation_dir", "no"], "train_dir 'no' is no folder"),
    "no classes": (["VIT", "--train_dir", "EMPTY"], "has no folders in it: expected one for each class"),
    "no split": (
        ["VIT", "--dataset_name", "DATA"],
        r"split 'validation'; the dataset has: train, test: name .*\(test\)",
    ),
    "only train": (
        ["VIT", "--train_dir", "FOLDER"],
        "the dataset has: train: cut one off the .* --train_val_split 0.1",
    ),
    "share": (["VIT", "FOLDERS", "--train_val_split", "2"], "train_val_split=2.0: expected a share between 0 and 1"),
    "flip": (["VIT", "FOLDERS", "--flip_probability", "2"], "flip_probability=2.0: expected a number from 0 to 1"),
    "padding": (["VIT", "FOLDERS", "--crop_padding", "-1"], "crop_padding=-1: expected 0 or more"),
    "label column": (
        ["VIT", "FOLDERS", "--label_column_name", "fine"],
        "the train data has no column 'fine'; columns: image, label: name the one .* in --label_column_name",
    ),
    "image column": (
        ["VIT", "FOLDERS", "--image_column_name", "label"],
        r"image_column_name='label': cannot tell .*; columns: image, label \(those with images: image\): name one in",
    ),
    "overrides": (
        ["FOLDERS", "--model_type", "vit", "--config_overrides", "hiden_size=3"],
        "BinaryViTConfig has no field 'hiden_size'; did you mean 'hidden_size'",
    ),
    "override's value": (
        ["FOLDERS", "--model_type", "vit", "--config_overrides", "hidden_size=big"],
        "Validation error for field 'hidden_size'",
    ),
    "override of a choice": (
        ["FOLDERS", "--model_type", "resnet", "--config_overrides", "stem=small"],
        "stem='small': expected one of imagenet, cifar",
    ),
    "levels": (["VIT", "FOLDERS", "--levels", "all"], "levels='all': expected one of elastic, signed"),
    "model type": (["FOLDERS", "--model_type", "vitt"], r"unknown model_type 'vitt'; expected vit, resnet or .*'vit'"),
    "bert type": (["FOLDERS", "--model_type", "bert"], "bert is a 'bert' model, which classifies no images: expected"),
    "bert": (
        ["FOLDERS", "--model_name_or_path", "BERT"],
        "is a 'bert' model, which classifies no images: expected vit",
    ),
    "two models": (["VIT", "FOLDERS", "--model_name_or_path", "x"], "has its own config: leave out --model_type"),
    "size": (["FOLDERS", "--model_name_or_path", "x", "--image_size", "8"], "--image_size is for a model from scratch"),
    "config file": (["FOLDERS", "--config_name", "no.json"], "config_name 'no.json' does not exist"),
    "model": (["FOLDERS", "--model_name_or_path", "nowhere/at-all"], "nowhere/at-all: We couldn't connect to"),
    "labels": (
        ["FOLDERS", "--model_name_or_path", "THREE"],
        r"2 labels \(blue, red\), but .* trained for 3 .*--ignore_",
    ),
    "binarize": (["VIT", "FOLDERS", "--binarize", "all"], "argument --binarize: invalid choice: 'all'"),
    "float": (["VIT", "FOLDERS", "--binarize", "none", "--method", "surge"], "leave out --method and --method_args"),
    "two_step": (["VIT", "FOLDERS", "--two_step", "--binarize", "weights"], "--two_step ends with binarize='both'"),
    "fraction": (["VIT", "FOLDERS", "--two_step", "--two_step_fraction", "1"], "two_step_fraction=1.0: expected a sh"),
    "two_step's model": (["CONVNEXT", "FOLDERS", "--two_step"], "--two_step is for ViT and ResNet: leave it out with"),
    "method": (["VIT", "FOLDERS", "--method", "sgd"], "unknown method 'sgd'; known methods: ste, "),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_told_with_the_way_out(
    run: Run, folders: list[str], arguments: list[str], message: str, tmp_path: Path
):
    for name in ("empty", "bert"):
        (tmp_path / name).mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    stands_for = {"FOLDERS": folders, "FOLDER": folders[1:2], "VIT": VIT, "CONVNEXT": CONVNEXT}
    stands_for |= {"EMPTY": [tmp_path / "empty"], "BERT": [tmp_path / "bert"]}
    if "DATA" in arguments:
        stands_for["DATA"] = [write_parquet(tmp_path / "data", train=table(), test=table())]
    if "THREE" in arguments:
        stands_for["THREE"] = [save_vit(tmp_path / "three", num_labels=3)]
    given = [text for argument in arguments for text in stands_for.get(argument, [argument])]
    with pytest.raises(ValueError, match=message):
        run(*given, *TRAIN)


def test_a_transform_of_torchvision_needs_torchvision(run: Run, folders: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ValueError, match="--torchvision_transform RandAugment needs torchvision: pip install"):
        run(*folders, *VIT, *TRAIN, "--torchvision_transform", "RandAugment")


def test_there_must_be_something_to_do(run: Run, folders: list[str]):
    with pytest.raises(ValueError, match="nothing to do: give --do_train, --do_eval or --do_predict"):
        run(*folders, *VIT)


def test_a_head_of_another_size_is_replaced_only_when_asked(run: Run, folders: list[str], tmp_path: Path):
    model = ["--model_name_or_path", save_vit(tmp_path / "three", num_labels=3)]
    run(*folders, *TRAIN, *model, "--ignore_mismatched_sizes")
    assert load(tmp_path / "out").config.num_labels == 2


def test_the_images_must_have_the_models_size(run: Run, folders: list[str], tmp_path: Path):
    other = save_vit(tmp_path / "other", image_size=16)
    with pytest.raises(
        ValueError, match=r"the image processor makes images of \(16, 16\), the model takes \(8, 8\): name"
    ):
        run(*folders, *VIT, *TRAIN, "--image_processor_name", other)


@pytest.mark.parametrize("lazily", [False, True], ids=["at once", "when it is needed"])
def test_a_corrupt_image_is_named(run: Run, folders: list[str], lazily: bool):
    broken = Path(folders[1]) / "red/03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    more = ["--augmentation", "imagenet", "--image_size", 8] if lazily else []
    with pytest.raises(
        ValueError, match=r"the image of row \d+ of the .*data \(.*red/03.png\) cannot be read: .*; replace"
    ):
        run(*folders, *VIT, *TRAIN, *more, "--num_train_epochs", 1)


def test_an_empty_class_folder_is_named(run: Run, folders: list[str]):
    (Path(folders[1]) / "green").mkdir()
    with pytest.raises(ValueError, match=r"the class folder '.*train/green' holds no image: fill it, or delete it"):
        run(*folders, *VIT, *TRAIN)
    (Path(folders[1]) / "green").rmdir()
    (Path(folders[3]) / "green").mkdir()
    image(0, 0).save(Path(folders[3]) / "green/0.png")
    with pytest.raises(
        ValueError, match=r"validation' has the class 'green', which train_dir .* has not \(blue, red\)"
    ):
        run(*folders, *VIT, *TRAIN)


def test_a_class_outside_the_declared_range_is_an_error(run: Run, tmp_path: Path):
    unknown = table().cast_column("label", datasets.Value("int64")).map(lambda row: {"label": -1})
    unknown = unknown.cast_column("label", ClassLabel(names=NAMES))
    data = write_parquet(tmp_path / "data", train=table(), validation=unknown)
    with pytest.raises(ValueError, match="row 0 of the validation data has the label -1, which is none of the 2"):
        run("--dataset_name", data, *VIT, *TRAIN)
