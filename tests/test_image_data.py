"""hf_bnn/tasks/images: transforms and data: pixels, augmentation, batches."""

import io
import sys
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BitImageProcessorPil, ConvNextImageProcessorPil, DeiTImageProcessorPil, ViTImageProcessorPil

from hf_bnn.tasks.images.pictures import (
    AugmentedPictures,
    Collator,
    Pictures,
    SoftCrossEntropy,
    StreamedPictures,
    picture,
)
from hf_bnn.tasks.images.transforms import (
    CROP,
    Augmentation,
    Preprocessing,
    crop_box,
    jittered,
    keys,
    pixels,
    shifted,
    torchvision_transform,
    uniforms,
)

SMALL = {"height": 8, "width": 8}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def plain(channels: int = 3, size: int = 8) -> Preprocessing:
    """Resized to a square; not quite the usual mean and deviation."""
    numbers = {"image_mean": [0.4] * channels, "image_std": [0.3] * channels}
    return Preprocessing(ViTImageProcessorPil(size={"height": size, "width": size}, **numbers), channels)


def table(count: int = 12, size: int = 8) -> Dataset:
    """Images of noise, with the labels 0, 1, 2, 0, ..."""
    images = [Image.fromarray(noise(size, size, 3, seed=index)) for index in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return Dataset.from_dict({"image": images, "label": [i % 3 for i in range(count)]}, features=features)


def given(rows: Any) -> tuple[Any, ...]:
    """The arguments of a dataset of pictures."""
    return rows, "train", "image", "label", {0: 0, 1: 1, 2: 2}, plain()


# Random numbers


def test_draws_depend_on_seed_epoch_and_image_only():
    indices = np.arange(5)
    first = uniforms(keys(0, 0, indices))
    assert np.array_equal(first, uniforms(keys(0, 0, indices)))
    assert np.array_equal(first[[3, 1]], uniforms(keys(0, 0, indices[[3, 1]])))
    others = [uniforms(keys(*where, indices)) for where in ((1, 0), (0, 1), (1, 1), (-1, 0))]
    assert all(np.abs(first - other).min() > 0 for other in others)


def test_draws_look_independent_and_uniform():
    draws = uniforms(keys(3, 7, np.arange(20_000)), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.allclose(draws.mean(0), 0.5, atol=0.01)
    assert np.allclose(draws.var(0), 1 / 12, atol=0.003)
    neighbours = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], 1), rowvar=False)
    assert np.abs(neighbours - np.eye(8)).max() < 0.03
    epochs = np.corrcoef(draws[:, 0], uniforms(keys(3, 8, np.arange(20_000)), 1)[:, 0])
    assert abs(epochs[0, 1]) < 0.03


# Augmentation


def test_a_shift_is_a_window_of_the_padded_image():
    images, draws = noise(40, 3, 6, 5), uniforms(keys(0, 0, np.arange(40)))
    moved = shifted(images, draws, 2)
    for image, result, (row, column) in zip(images, moved, (draws[:, 1:3] * 5).astype(int), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)))
        assert np.array_equal(result, padded[:, row : row + 6, column : column + 5])
    assert len({tuple(x) for x in (draws[:, 1:3] * 5).astype(int)}) > 10
    assert np.array_equal(shifted(images, draws, 0), images)


def test_a_crop_has_the_area_and_the_sides_that_were_asked_for():
    draws = uniforms(keys(0, 0, np.arange(500)))
    boxes = np.array([crop_box(100, 80, row, (0.25, 1.0)) for row in draws])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 100
    assert bottom.max() <= 80
    width, height = right - left, bottom - top
    assert 0.24 < (width * height / 8000).min() < 0.3
    assert (width * height / 8000).max() > 0.8
    assert (width / height).min() > 0.72
    assert (width / height).max() < 1.38
    assert len(set(left)) > 20


def test_a_crop_of_a_very_long_image_is_its_middle():
    draws = uniforms(keys(0, 0, np.arange(20)))
    assert {crop_box(1000, 6, row, (0.9, 1.0)) for row in draws} == {(496, 0, 504, 6)}


def test_a_random_part_is_resized_even_if_the_image_is_smaller_than_the_model_takes():
    augmentation, draws = Augmentation("imagenet", flip=0.0), uniforms(keys(0, 0, np.arange(1)))
    draws[:, CROP] = 0.999999  # nearly the whole image is too wide for it: the middle is taken
    image = Image.fromarray(noise(3, 5, 3))
    assert augmentation.of_picture(image, plain(), 0, draws[0]).shape == (3, 8, 8)


def test_images_are_flipped_with_the_given_probability():
    images, draws = noise(200, 1, 2, 2), uniforms(keys(0, 0, np.arange(200)))
    results = Augmentation("cifar", padding=0, flip=0.25).of_pixels(images.copy(), draws)
    flipped = (results == images[..., ::-1]).all((1, 2, 3)) & (results != images).any((1, 2, 3))
    assert ((results == images).all((1, 2, 3)) | flipped).all()
    assert 0.15 < flipped.mean() < 0.35
    assert np.array_equal(Augmentation("none").of_pixels(images, draws), images)


def test_jitter_changes_brightness_contrast_and_saturation_in_this_order():
    images, draws = noise(6, 3, 4, 4), uniforms(keys(0, 0, np.arange(6)))
    results = jittered(images, draws, 0.5)
    for image, row, result in zip(images, draws, results, strict=True):
        brightness, contrast, saturation = 0.5 + row[3:6]
        gray = lambda x: 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]  # noqa: E731
        x = np.clip(image * brightness, 0, 255)
        x = np.clip(gray(x).mean() + (x - gray(x).mean()) * contrast, 0, 255)
        x = np.clip(gray(x) + (x - gray(x)) * saturation, 0, 255)
        assert np.abs(result - x).max() <= 0.51
    assert np.array_equal(jittered(images, draws, 0.0), images)
    assert jittered(noise(2, 1, 4, 4), draws[:2], 0.5).shape == (2, 1, 4, 4)


def test_a_transform_of_torchvision_is_repeatable_and_leaves_torchs_generator_alone(monkeypatch: pytest.MonkeyPatch):
    class Turn:
        def __call__(self, image: Image.Image) -> Image.Image:
            return image.rotate(float(torch.rand(()) * 360))

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    v2 = sys.modules["torchvision.transforms.v2"]
    v2.Turn = v2.RandAugment = Turn
    sys.modules["torchvision.transforms"].v2 = v2
    augmentation = Augmentation("cifar", transform=torchvision_transform("Turn"))
    assert not augmentation.whole
    before = torch.random.get_rng_state()
    image, draws = Image.fromarray(noise(8, 8, 3)), uniforms(keys(0, 0, np.arange(1)))[0]
    once, again, other = (augmentation.of_picture(image, plain(), key, draws) for key in (2**64 - 1, 2**64 - 1, 2))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(ValueError, match="torchvision has no 'Turm'; some that it has: RandAugment"):
        torchvision_transform("Turm")


def test_torchvision_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ValueError, match="TrivialAugmentWide needs torchvision: pip install torchvision"):
        torchvision_transform("TrivialAugmentWide")


# Evaluation


PROCESSORS = {
    "vit": ViTImageProcessorPil(size=SMALL),
    "deit": DeiTImageProcessorPil(size={"height": 10, "width": 10}, crop_size=SMALL),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 8}, crop_pct=0.8),
    "bit": BitImageProcessorPil(size={"shortest_edge": 9}, crop_size=SMALL),
    "padded": BitImageProcessorPil(size={"shortest_edge": 6}, crop_size=SMALL),
    "bare": ViTImageProcessorPil(size=SMALL, do_normalize=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_evaluation_sees_what_the_image_processor_makes(name: str):
    processor = PROCESSORS[name]
    preprocessing = Preprocessing(processor, 3)
    assert preprocessing.size == (8, 8)
    for height, width in ((8, 8), (8, 8), (20, 13), (5, 7)):
        image = Image.fromarray(noise(height, width, 3, seed=height))
        expected = processor(image, return_tensors="pt")["pixel_values"]
        found = preprocessing.normalized(torch.from_numpy(preprocessing.arranged(image)[None].copy()))
        assert torch.allclose(found, expected.float(), atol=1e-5)


def test_images_that_a_processor_only_copies_are_not_given_to_it():
    preprocessing, cropped = plain(), Preprocessing(PROCESSORS["convnext"], 3)
    flat = Image.new("RGB", (8, 8), "red")  # is the same after any resizing
    for one, expected in ((preprocessing, True), (cropped, False)):
        one.arranged(flat)
        assert one.copied[8, 8] is expected


def test_gray_images_stay_gray_for_a_model_of_one_channel():
    assert plain(channels=1).arranged(Image.fromarray(noise(5, 5))).shape == (1, 8, 8)


def test_a_processor_that_does_not_fit_is_refused():
    def refused(message: str, processor: Any, channels: int = 3) -> None:
        with pytest.raises(ValueError, match=message):
            Preprocessing(processor, channels)

    refused("leaves images of different sizes: use one that resizes", ViTImageProcessorPil(do_resize=False))
    refused("a mean and deviation of 3 channels, the model takes 1", ViTImageProcessorPil(size=SMALL), 1)
    refused("makes images of 3 channels, the model takes 1", ViTImageProcessorPil(size=SMALL, do_convert_rgb=True), 1)
    refused(r"takes images of 4 channels: expected 1 \(gray\) or 3 \(RGB\)", ViTImageProcessorPil(size=SMALL), 4)


def test_a_processor_that_does_something_else_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ViTImageProcessorPil, "normalize", lambda self, image, *_, **__: image**2)
    with pytest.raises(
        ValueError, match=r"\(ViTImageProcessorPil\) does more than resize, crop, rescale and normalize: name"
    ):
        Preprocessing(ViTImageProcessorPil(size=SMALL), 3)


# Pictures


def file_of(image: Image.Image, kind: str = "PNG") -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": "a/b.png"}


def test_pictures_of_every_mode_become_gray_or_rgb():
    rgb = Image.fromarray(noise(4, 4, 3))
    for image in (rgb, rgb.convert("RGBA"), rgb.convert("L"), rgb.convert("LA"), rgb.convert("P"), rgb.convert("1")):
        assert picture(file_of(image), 3, "row 0").mode == "RGB"
        assert picture(file_of(image), 1, "row 0").mode == "L"
    transparent = rgb.convert("P")
    transparent.info["transparency"] = bytes([0] * 3)
    assert picture(file_of(transparent), 3, "row 0").mode == "RGB"


def test_a_picture_of_16_bits_keeps_its_range():
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    assert np.asarray(picture(file_of(Image.fromarray(values)), 1, "row 0")).tolist() == [[0, 0, 1, 255]]


def test_a_picture_that_cannot_be_read_is_named():
    for content in (b"no image", file_of(Image.fromarray(noise(40, 40, 3)))["bytes"][:500]):
        with pytest.raises(ValueError, match=r"the image of row 7 \(a/b.png\) cannot be read: .*; replace or drop it"):
            picture({"bytes": content, "path": "a/b.png"}, 3, "row 7")
    with pytest.raises(ValueError, match="row 7 has no image: fill or drop it"):
        picture(None, 3, "row 7")


def test_pictures_in_memory_are_those_that_are_read_when_needed():
    rows = table()
    kept, read = Pictures(*given(rows), memory=1e6), Pictures(*given(rows), memory=100)
    assert kept.kept is not None
    assert read.kept is None
    assert len(kept) == len(read) == 12
    for index in (0, 7):
        assert np.array_equal(kept[index]["pixels"], read[index]["pixels"])
        assert np.array_equal(kept[index]["pixels"], pixels(rows[index]["image"]))
        assert kept[index]["label"] == index % 3


@pytest.mark.parametrize("kind", ["cifar", "imagenet"])
def test_augmentation_does_not_depend_on_batches_or_their_order(kind: str):
    images = AugmentedPictures(*given(table()), augmentation=Augmentation(kind, jitter=0.2), seed=0, memory=1e6)
    whole = {index: item["pixels"] for index, item in enumerate(images.__getitems__(list(range(12))))}
    for batch in ([5, 2], [11], [0, 1, 2]):
        for index, item in zip(batch, images.__getitems__(batch), strict=True):
            assert np.array_equal(item["pixels"], whole[index])
    images.epoch.fill_(1)
    assert not any(np.array_equal(images[index]["pixels"], whole[index]) for index in range(12))


@pytest.mark.multiprocess
def test_workers_see_the_same_images_and_every_epoch():
    images = AugmentedPictures(*given(table()), augmentation=Augmentation("cifar"), seed=0, memory=1e6)
    collator = Collator(plain(), 3)
    workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    alone, helped = (DataLoader(images, 4, collate_fn=collator, **kwargs) for kwargs in ({}, workers))
    batches = []
    for epoch in (0, 1):
        images.epoch.fill_(epoch)
        batches.append([torch.cat([batch["pixel_values"] for batch in loader]) for loader in (alone, helped)])
        assert torch.equal(*batches[-1])
    assert not torch.equal(batches[0][0], batches[1][0])


def test_a_stream_for_training_is_shuffled_anew_in_every_epoch_without_end():
    def labels(stream: StreamedPictures, count: int) -> list[bytes]:
        items = iter(stream)
        return [next(items)["pixels"].tobytes() for _ in range(count)]

    def stream(**kwargs: Any) -> StreamedPictures:
        return StreamedPictures(*given(table().to_iterable_dataset()), **kwargs)

    training = {"augmentation": Augmentation("none"), "shuffle_buffer": 6, "seed": 1}
    found = labels(stream(**training), 36)
    assert found == labels(stream(**training), 36)
    first, second, third = found[:12], found[12:24], found[24:]
    assert set(first) == set(second) == set(third)
    assert len(set(first)) == 12
    assert first != second != third
    evaluation = [item["pixels"].tobytes() for item in stream()]
    assert sorted(evaluation) == sorted(first)
    for kind in ("cifar", "imagenet"):
        changing = {"augmentation": Augmentation(kind), "shuffle_buffer": 6}
        changed = labels(stream(**changing), 24)
        assert changed == labels(stream(**changing), 24)
        assert len(set(changed)) == 24


def test_a_stream_names_the_row_of_an_unknown_label():
    rows = table(3).map(lambda row: {"label": row["label"] * 5}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"row 1 \(as streamed\) of the train data has the label 5, .* the 3 labels"):
        list(StreamedPictures(*given(rows)))


# Batches


def test_a_batch_is_what_the_processor_makes():
    rows, preprocessing = table(4), plain()
    batch = Collator(preprocessing, 3)(Pictures(*given(rows), memory=1e6).__getitems__([0, 1, 2, 3]))
    expected = preprocessing.processor(rows["image"][:], return_tensors="pt")["pixel_values"]
    assert torch.allclose(batch["pixel_values"], expected.float(), atol=1e-5)
    assert batch["labels"].tolist() == [0, 1, 2, 0]


def test_mixup_mixes_images_and_labels_alike_and_repeatably():
    images = AugmentedPictures(*given(table(6)), augmentation=Augmentation("none"), seed=0, memory=1e6)
    items = images.__getitems__([0, 1, 2, 3, 4, 5])
    pure, mixed = Collator(plain(), 3)(items), Collator(plain(), 3, mixup_alpha=1.0)(items)
    rng = np.random.default_rng(int(items[0]["key"]))
    share, order = rng.beta(1.0, 1.0), rng.permutation(6)
    x, y = pure["pixel_values"], torch.eye(3)[pure["labels"]]
    assert torch.allclose(mixed["pixel_values"], share * x + (1 - share) * x[order], atol=1e-5)
    assert torch.allclose(mixed["labels"], share * y + (1 - share) * y[order])
    assert 0.01 < share < 0.99
    assert torch.equal(Collator(plain(), 3, mixup_alpha=1.0)(items)["labels"], mixed["labels"])


def test_evaluation_is_not_mixed():
    items = Pictures(*given(table(4)), memory=1e6).__getitems__([0, 1, 2, 3])
    assert Collator(plain(), 3, mixup_alpha=1.0)(items)["labels"].tolist() == [0, 1, 2, 0]


def test_the_loss_takes_classes_and_shares_of_classes():
    logits, classes = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    shares = torch.eye(3)[classes] * 0.7 + torch.eye(3)[classes.flip(0)] * 0.3
    log = logits.log_softmax(-1)
    hard = -log[range(5), classes].mean()
    assert torch.allclose(SoftCrossEntropy(0.2)(classes, logits, None), hard)
    assert torch.allclose(SoftCrossEntropy()(shares, logits, None), -(shares * log).sum(1).mean())
    smooth = shares * 0.8 + 0.2 / 3
    assert torch.allclose(SoftCrossEntropy(0.2)(shares, logits, None), -(smooth * log).sum(1).mean())
