"""The networks and the data of bench_methods.py, small enough to compare methods on a CPU."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Data(NamedTuple):
    """Images `(N, 1, size, size)` of zero mean and unit variance, and labels `(N,)`."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Data:
    """scikit-learn's 1,797 digits of 8 x 8 pixels; every fourth one is a test image."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float().view(-1, 1, 8, 8), torch.tensor(labels)
    test = torch.arange(len(y)) % 4 == 0
    return _standardized(Data(x[~test], y[~test], x[test], y[test]))


def fashion_mnist(folder: Path | None, train: int = 20_000) -> Data:
    """The first `train` training images and all test images of Fashion-MNIST, halved to 14 x 14 pixels.

    Read from `folder`, which holds the four idx files (gzipped or not), or else from the Hub.
    """
    tensors = _from_hub(train) if folder is None else _from_files(Path(folder))
    train_x, train_y, test_x, test_y = tensors
    halved = [F.avg_pool2d(x.float().unsqueeze(1), 2) for x in (train_x[:train], test_x)]
    return _standardized(Data(halved[0], train_y[:train].long(), halved[1], test_y.long()))


def _from_hub(train: int) -> list[Tensor]:
    from datasets import load_dataset

    tensors = []
    for split in (f"train[:{train}]", "test"):
        rows = load_dataset("zalando-datasets/fashion_mnist", split=split).with_format("torch")
        tensors += [torch.stack(list(rows["image"])).flatten(1, -3), torch.as_tensor(rows["label"])]
    return tensors


def _from_files(folder: Path) -> list[Tensor]:
    from hf_bnn.tasks.images.raw_sets import read_fashion_mnist

    splits = read_fashion_mnist(folder)
    return [torch.tensor(values) for split in ("train", "test") for values in splits[split]]


def _standardized(data: Data) -> Data:
    mean, std = data.train_x.mean(), data.train_x.std()
    return data._replace(train_x=(data.train_x - mean) / std, test_x=(data.test_x - mean) / std)


def plain_mlp(depth: int, width: int, pixels: int) -> nn.Sequential:
    """`depth` layers to be binarized between a float first and last one, without any shortcut."""
    body = nn.Sequential()
    for _ in range(depth):
        body.append(nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)))
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.BatchNorm1d(width)), body, nn.Linear(width, 10)
    )


class ConvBlock(nn.Module):
    """x + BatchNorm(conv(x)): Bi-Real Net's block (arXiv 1808.00278), one real-valued shortcut per convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, relu: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.shortcut = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)) + self.shortcut(x))


def resnet(blocks: int, width: int = 16, channels: int = 3, relu: bool = False) -> nn.Sequential:
    """Three stages of `2 * blocks` 3 x 3 convolutions; blocks = 3 and width = 16 is the size of CIFAR's ResNet-20.

    `relu` after each block, for weights-only binarization; without it binary inputs keep both signs.
    """
    stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
    body, size = nn.Sequential(), width
    for stage in range(3):
        for _ in range(2 * blocks):
            outputs = width * 2**stage
            body.append(ConvBlock(size, outputs, 2 if size != outputs else 1, relu))
            size = outputs
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(size, 10))
    return nn.Sequential(stem, body, head)


def float_ends(model: nn.Sequential) -> list[str]:
    """Patterns of what stays float in these networks: the first, the last and the downsampling layers."""
    shortcuts = any(isinstance(module, ConvBlock) for module in model.modules())
    return ["0", "2", *(["*shortcut*"] if shortcuts else [])]
