"""RST under DistributedDataParallel, with gradient accumulation. A SAM step sends no more than a plain one.

torchrun --nproc_per_node=2 examples/ddp.py
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from rst import RST, Linear

EPOCHS, MICRO_BATCHES = 3, 2


def main() -> None:
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    x = torch.randn(512, 20)  # stands for your data
    y = (x @ torch.randn(20, 4)).argmax(1)
    data = TensorDataset(x, y)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=64, sampler=sampler)

    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4)).to(device)
    model = DistributedDataParallel(model)
    optimizer = RST(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        schedule=Linear(0.0, 1.0),
        total_steps=EPOCHS * len(loader),
        module=model,  # the wrapper, so that each rank perturbs along its own gradient
        seed=0,  # on every rank the same
    )
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for inputs, labels in loader:
            micro_batches = list(zip(inputs.chunk(MICRO_BATCHES), labels.chunk(MICRO_BATCHES), strict=True))
            for _ in optimizer.passes():
                for i, (a, b) in enumerate(micro_batches):
                    is_last = i == len(micro_batches) - 1
                    with nullcontext() if is_last else model.no_sync():
                        loss = F.cross_entropy(model(a.to(device)), b.to(device)) / len(micro_batches)
                        loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    if rank == 0:
        accuracy = (model(x.to(device)).argmax(1).cpu() == y).float().mean()
        print(f"{optimizer.propagations} propagations, accuracy {accuracy:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
