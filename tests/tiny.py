"""Models, batches and training steps that are small enough for a test."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from hf_bnn import BinaryBertConfig, BinaryBertForSequenceClassification, binarize_, install_method
from hf_bnn.attention import BinaryAttention
from hf_bnn.levels import ElasticLevels, UnsignedLevels
from hf_bnn.methods import METHODS, Fsg, IRNet, Method, Step, Stompp, Surge
from hf_bnn.training import begin_step, end_backward, hook_optimizer

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
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
    method: Method = Method()

    def output(self) -> Tensor:
        """The logits."""
        result = self.model(**self.batch) if "input_ids" in self.batch else self.model(self.batch["x"])
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


NETS = {"linear": linear_net, "conv2d": conv2d_net, "matmul": matmul_net, "bert": bert_net}


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
