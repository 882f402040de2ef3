"""Models, batches and training steps that are small enough for a test."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from hf_bnn import (
    BinaryBertConfig,
    BinaryBertForSequenceClassification,
    BinaryResNetConfig,
    BinaryResNetForImageClassification,
    BinaryViTConfig,
    BinaryViTForImageClassification,
    binarize_,
    install_method,
)
from hf_bnn.convert import replace_modules
from hf_bnn.methods import METHODS, STE, Fsg, IRNet, Method, Step, Stompp, Surge
from hf_bnn.nn.attention import BinaryAttention
from hf_bnn.nn.levels import ElasticLevels, UnsignedLevels
from hf_bnn.training import begin_step, end_backward, hook_optimizer

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}

VIT_SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 8,
    "patch_size": 4,
    "encoder_stride": 4,
    "num_labels": 3,
}

EVERY_METHOD = [
    *(cls() for name, cls in METHODS.items() if name != Surge.name),
    *(Surge(aux=aux, rank=4) for aux in ("own", "shared", "lowrank", "leaky")),
    IRNet(libra=False),
    Stompp(ste=False),
    Stompp() + Surge(),
    Fsg() + Stompp(on="activations"),
    Fsg() + Surge(),
]


def method_id(method: Method) -> str:
    """The name of a method in a test's id, with what tells its variants apart."""
    switched_off = [f"no_{name}" for name in ("ste", "libra") if getattr(method, name, True) is False]
    return "-".join(filter(None, [method.name, getattr(method, "aux", None), *switched_off]))


def tiny_config(**kwargs: Any) -> BinaryBertConfig:
    """The config of a binary BERT of two layers; its dropout is 0 unless given."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BinaryBertConfig(**{**SIZE, **dropout, **kwargs})


def tiny_model(**kwargs: Any) -> BinaryBertForSequenceClassification:
    """A binary BERT of two layers, with plain STE installed; `kwargs` go to its config."""
    return BinaryBertForSequenceClassification(tiny_config(**kwargs))


def tiny_float_bert(**kwargs: Any) -> BertForSequenceClassification:
    """transformers' own BERT, of the same size."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**{**SIZE, **dropout, **kwargs}))


def tiny_batch(rows: int = 4, tokens: int = 6, labels: int = 2) -> dict[str, Tensor]:
    """`rows` sentences; every second one is padded at its end. The labels can be learned: they are in the first id."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, SIZE["vocab_size"], (rows, tokens), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1::2, -2:] = 0
    input_ids[attention_mask == 0] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": input_ids[:, 0] % labels}


def tiny_vit(**kwargs: Any) -> BinaryViTForImageClassification:
    """A binary ViT of two layers, with plain STE installed; `kwargs` go to its config."""
    return BinaryViTForImageClassification(BinaryViTConfig(**{**VIT_SIZE, **kwargs}))


def tiny_float_vit(**kwargs: Any) -> ViTForImageClassification:
    """transformers' own ViT, of the same size."""
    return ViTForImageClassification(ViTConfig(**{**VIT_SIZE, **kwargs}))


def tiny_images(rows: int = 4, labels: int = 3, size: int = 8, channels: int = 3) -> dict[str, Tensor]:
    """`rows` images of noise. The labels can be learned: an image of label n is brighter in its n-th third."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(rows, channels, size, size, generator=generator)
    answers = torch.arange(rows) % labels
    for image, answer in zip(pixel_values, answers, strict=True):
        image[:, :, answer * size // labels : (answer + 1) * size // labels] += 2
    return {"pixel_values": pixel_values, "labels": answers}


@torch.no_grad()
def scramble(model: nn.Module) -> nn.Module:
    """Give every parameter another value, in place: whatever a file then does not restore is seen."""
    for parameter in model.parameters():
        parameter.add_(torch.rand_like(parameter) * 0.2)
    return model


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of all that is not the same in both state dicts."""
    shared = one.keys() & other.keys()
    return [*(one.keys() ^ other.keys()), *(key for key in shared if not torch.equal(one[key], other[key]))]


class TinyMLP(nn.Sequential):
    """`(..., 12) -> (..., 3)`: a float first and last layer, two binary ones between them."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3))


class TinyAttention(nn.Module):
    """`(rows, tokens, 12) -> (rows, 3)`: binary projections and both binary attention products."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.attention = BinaryAttention()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        heads = (m(x).unflatten(-1, (2, 8)).transpose(1, 2) for m in (self.query, self.key, self.value))
        context, _ = self.attention(*heads, scaling=8**-0.5)
        return self.head((x + context.transpose(1, 2).flatten(2)).mean(1))


class Net(NamedTuple):
    """A binary network with a batch for it; `output` and `loss` take the model and the batch."""

    model: nn.Module
    batch: dict[str, Tensor]
    method: Method = STE()

    def output(self) -> Tensor:
        """The logits."""
        result = self.model(self.batch["x"]) if "x" in self.batch else self.model(**self.batch)
        return getattr(result, "logits", result)

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.output(), self.batch["labels"])

    def halves(self) -> Iterator["Net"]:
        """The same network, with the first and with the second half of its batch."""
        size = len(self.batch["labels"]) // 2
        for start in (0, size):
            yield self._replace(batch={key: value[start : start + size] for key, value in self.batch.items()})


def _vectors(*shape: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 12, generator=generator)
    return {"x": x, "labels": x.flatten(1)[:, :3].argmax(1)}


def linear_net() -> Net:
    return Net(binarize_(TinyMLP(), skip=("0", "4")), _vectors(16))


def matmul_net() -> Net:
    return Net(binarize_(TinyAttention(), skip=("stem", "head")), _vectors(8, 5))


class TinyConvNet(nn.Sequential):
    """`(N, 3, 6, 6) -> (N, 3)`: a float first and last layer; binary convolutions with a stride, padding and groups."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.GroupNorm(4, 12),
            nn.Conv2d(12, 12, 3, padding=1, groups=2),
            nn.GroupNorm(4, 12),
            nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(4, 16),
            nn.Flatten(2),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(16, 3),
        )


def conv2d_net() -> Net:
    levels = {"2": UnsignedLevels, "4": ElasticLevels}
    model = binarize_(TinyConvNet(), skip=("0", "9"), levels=lambda name: levels[name]())
    x = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return Net(model, {"x": x, "labels": x.mean((2, 3)).argmax(1)})


def bert_net() -> Net:
    return Net(tiny_model(num_hidden_layers=1), tiny_batch(8))


def vit_net() -> Net:
    return Net(tiny_vit(num_hidden_layers=1), tiny_images(12))


def tiny_resnet(**kwargs: Any) -> BinaryResNetForImageClassification:
    """A binary ResNet of two basic blocks, with plain STE installed; `kwargs` go to its config."""
    size = {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    return BinaryResNetForImageClassification(BinaryResNetConfig(stem="cifar", **{**size, **kwargs}))


def resnet_net() -> Net:
    """Normalized per image: with BatchNorm the gradient of two half batches is not that of the whole one."""
    model = tiny_resnet()
    replace_modules(model, lambda _, m: nn.GroupNorm(4, m.num_features) if isinstance(m, nn.BatchNorm2d) else None)
    return Net(model, tiny_images(12))


NETS = {
    "linear": linear_net,
    "conv2d": conv2d_net,
    "matmul": matmul_net,
    "bert": bert_net,
    "vit": vit_net,
    "resnet": resnet_net,
}


def make_net(kind: str, method: Method) -> Net:
    """The network called `kind` with `method` installed, in training mode; the same weights for every method."""
    torch.manual_seed(0)
    net = NETS[kind]()
    install_method(net.model, method)
    net.model.train()
    return net._replace(method=method)


def optimizer_of(net: Net, lr: float = 0.01) -> torch.optim.Optimizer:
    """An AdamW over all that learns, with the method's hook."""
    optimizer = torch.optim.AdamW([p for p in net.model.parameters() if p.requires_grad], lr, weight_decay=0.0)
    hook_optimizer(net.model, optimizer, net.method)
    return optimizer


def train_steps(net: Net, optimizer: torch.optim.Optimizer, steps: range, log: bool = False) -> list[float]:
    """Optimizer steps of number `steps`, all on the one batch; the losses before each."""
    losses = []
    for index in steps:
        step = Step(index, 100, optimizer.param_groups[0]["lr"], log)
        begin_step(net.model, step)
        loss = net.loss()
        loss.backward()
        end_backward(net.model, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
