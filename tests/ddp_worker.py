"""One rank of a test with several processes. Imports the core only: transformers would take most of the test's time."""

import sys
import types
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def import_core() -> None:
    """Let `import hf_bnn.convert` and the like run without the package's __init__, which imports transformers."""
    if "hf_bnn" not in sys.modules:
        package = types.ModuleType("hf_bnn")
        package.__path__ = [str(Path(__file__).parents[1] / "hf_bnn")]
        sys.modules["hf_bnn"] = package


def train_without_input_gradient(rank: int, folder: str) -> None:
    """Two steps of a model whose first binary layer's input asks for no gradient, under DDP, as one of two ranks."""
    import_core()
    from hf_bnn.convert import binarize_
    from hf_bnn.methods import Surge

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = binarize_(nn.Sequential(nn.Embedding(10, 12), nn.Linear(12, 8), nn.Linear(8, 3)), Surge(), skip=("2",))
    model[0].requires_grad_(False)
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(replica.parameters(), 0.01, weight_decay=0.0)
    torch.manual_seed(rank)
    for _ in range(2):
        loss = nn.functional.cross_entropy(replica(torch.randint(10, (4,))), torch.randint(3, (4,)))
        loss.backward()
        assert torch.equal(model[1].around.aux[0].grad, torch.zeros(8, 12))
        optimizer.step()
        optimizer.zero_grad()
    torch.save((torch.distributed.get_world_size(), model.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # no rank leaves while another still talks to it
    torch.distributed.destroy_process_group()
