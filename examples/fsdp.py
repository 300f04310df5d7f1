"""RST with sharded parameters (fully_shard, that is FSDP2), and a distributed checkpoint to resume from.

torchrun --nproc_per_node=2 examples/fsdp.py checkpoint
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from rst import RST, Linear

EPOCHS, BATCH = 3, 64


def main(checkpoint: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh(device, (ranks,))  # also sets the current GPU
    torch.manual_seed(0)
    x = torch.randn(512, 20, device=device)  # stands for your data
    y = (x @ torch.randn(20, 4, device=device)).argmax(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 4)).to(device)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    total_steps = EPOCHS * len(x) // BATCH
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = RST(base, Linear(0.0, 1.0), total_steps, rho=0.05, module=model)
    if checkpoint.exists():
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

    for epoch in range(optimizer.steps * BATCH // len(x), EPOCHS):
        torch.manual_seed(epoch)  # every rank makes the same batches, and takes its part of them
        for batch in torch.randperm(len(x)).split(BATCH):
            part = batch[rank::ranks]
            for _ in optimizer.passes():
                F.cross_entropy(model(x[part]), y[part]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=checkpoint)
    accuracy = (model(x).argmax(1) == y).float().mean()
    if rank == 0:
        print(f"{optimizer.propagations} propagations, accuracy {accuracy:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
