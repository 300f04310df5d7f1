"""Fine-tuning a timm model with AdamW and RST: layer-wise learning rates, label smoothing, bfloat16.

python examples/finetune.py vit_small_patch16_224 pretrained
"""

import sys

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

from rst import RST, Linear

EPOCHS, CLASSES = 3, 3


def data(size: int) -> TensorDataset:
    """Stands for yours: noise with more red, green or blue."""
    y = torch.arange(48) % CLASSES
    x = torch.randn(48, 3, size, size)
    x[torch.arange(48), y] += 1
    return TensorDataset(x, y)


def main(name: str, pretrained: bool) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(name, pretrained=pretrained, num_classes=CLASSES, drop_path_rate=0.1).to(device)
    loader = DataLoader(data(model.default_cfg["input_size"][-1]), batch_size=16, shuffle=True)
    total_steps = EPOCHS * len(loader)
    base = create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.75)
    rates = [group["lr"] * group["lr_scale"] for group in base.param_groups]
    optimizer = RST(
        base,
        schedule=Linear(0.0, 1.0),
        total_steps=total_steps,
        rho=0.05,  # smaller than from scratch: try 0.01 too
        module=model,
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps, cycle_momentum=False)
    for _ in range(EPOCHS):
        for x, y in loader:
            for _ in optimizer.passes():
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    loss = F.cross_entropy(model(x.to(device)), y.to(device), label_smoothing=0.1)
                loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    model.eval()
    correct = sum((model(x.to(device)).argmax(1).cpu() == y).sum() for x, y in loader)
    print(f"{optimizer.propagations} propagations, accuracy {correct / len(loader.dataset):.3f}")


if __name__ == "__main__":
    main(sys.argv[1], "pretrained" in sys.argv)
