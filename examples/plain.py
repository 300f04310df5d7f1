"""RST in plain PyTorch with mixed precision, gradient accumulation, clipping, a scheduler and a checkpoint.

python examples/plain.py checkpoint.pt  # again after an interruption, and it goes on
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from rst import RST, Linear

EPOCHS, BATCH, MICRO_BATCHES = 4, 64, 2


def main(checkpoint: Path) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(512, 20, device=device)  # stands for your data
    y = (x @ torch.randn(20, 4, device=device)).argmax(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))
    model.to(device)
    total_steps = EPOCHS * len(x) // BATCH
    optimizer = RST(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=Linear(0.0, 1.0),
        total_steps=total_steps,
        module=model,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    scaler = torch.amp.GradScaler(device)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if checkpoint.exists():
        for name, state in torch.load(checkpoint).items():
            parts[name].load_state_dict(state)

    for epoch in range(optimizer.steps * BATCH // len(x), EPOCHS):
        torch.manual_seed(epoch)  # so that a resumed run draws the same numbers
        for batch in torch.randperm(len(x)).split(BATCH):
            for _ in optimizer.passes():  # once, or twice in a SAM step
                for part in batch.chunk(MICRO_BATCHES):
                    with torch.autocast(device, torch.float16):
                        loss = F.cross_entropy(model(x[part]), y[part]) / MICRO_BATCHES
                    scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
    accuracy = (model.eval()(x).argmax(1) == y).float().mean()
    print(f"{optimizer.propagations} propagations, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
