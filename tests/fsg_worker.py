"""One rank of FSG's test with two processes. Imports the core only, as ddp_worker does."""

import torch
from ddp_worker import import_core
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train_and_be_refused_shards(rank: int, folder: str) -> None:
    """Four steps with FSG under DDP, as one of two ranks; then weights that are cut in shards."""
    import_core()
    from hf_bnn.convert import binarize_
    from hf_bnn.methods.fsg import Fsg
    from hf_bnn.training import hook_optimizer

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    method = Fsg(length=2)
    model = binarize_(nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(8, 3)), method, skip=("2",))
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(replica.parameters(), 0.01, weight_decay=0.0)
    torch.manual_seed(rank)  # also what the nets must not be drawn from
    hook_optimizer(model, optimizer, method)
    for _ in range(4):
        loss = nn.functional.cross_entropy(replica(torch.randn(4, 12)), torch.randint(3, (4,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save((model.state_dict(), optimizer.state_dict()["fsg"]), f"{folder}/{rank}.pt")

    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    try:
        hook_optimizer(model, optimizer, method)
    except ValueError as error:
        torch.save(str(error), f"{folder}/refusal{rank}.pt")
    torch.distributed.barrier()  # no rank leaves while another still talks to it
    torch.distributed.destroy_process_group()
