"""RST with Accelerate: gradient accumulation, clipping, and a checkpoint of everything.

accelerate launch examples/accelerate_loop.py checkpoint
"""

import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rst import RST, Linear

EPOCHS, MICRO_BATCHES = 3, 2


def main(checkpoint: str) -> None:
    accelerator = Accelerator()
    set_seed(0)
    x = torch.randn(512, 20)  # stands for your data
    y = (x @ torch.randn(20, 4)).argmax(1)
    data = TensorDataset(x, y)
    model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
    loader = DataLoader(data, batch_size=64, shuffle=True)
    loader = accelerator.prepare(loader)  # first: it divides the batches among processes, so len changes
    optimizer = RST(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        schedule=Linear(0.0, 1.0),
        total_steps=EPOCHS * len(loader),
        rho=0.05,
    )
    # prepared has step() and zero_grad(), not passes()
    model, prepared = accelerator.prepare(model, optimizer)
    optimizer.module = model  # now it is wrapped
    for _ in range(EPOCHS):
        for inputs, labels in loader:
            micro_batches = list(zip(inputs.chunk(MICRO_BATCHES), labels.chunk(MICRO_BATCHES), strict=True))
            for _ in optimizer.passes():
                for i, (a, b) in enumerate(micro_batches):
                    is_last = i == len(micro_batches) - 1
                    with nullcontext() if is_last else accelerator.no_sync(model):
                        loss = F.cross_entropy(model(a), b) / len(micro_batches)
                        accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            prepared.step()
        accelerator.save_state(checkpoint)  # load_state takes all of it up again
    accuracy = (model.eval()(x.to(accelerator.device)).argmax(1).cpu() == y).float().mean()
    accelerator.print(f"{optimizer.propagations} propagations, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
