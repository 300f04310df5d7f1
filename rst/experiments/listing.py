"""What `python train.py --list` prints: a line on each option of a run, and the sizes of the models."""

from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tabulate import tabulate

from rst.training.parts import part

GROUPS = ("dataset", "augment", "method", "schedule", "optimizer", "lr_schedule", "tracker", "protocol")
CLASSES, PIXELS = 10, 32
SIZE = f"parameters at {PIXELS}×{PIXELS}, {CLASSES} classes"


def options(conf: Path, group: str) -> dict[str, str]:
    """The first comment in the file of each of the group's options."""
    comments = {}
    for path in sorted((conf / group).glob("*.yaml")):
        lines = [line for line in path.read_text().splitlines() if line.startswith("# ")]
        texts = [line.removeprefix("# ") for line in lines if not line.startswith("# @package")]
        comments[path.stem] = texts[0].strip() if texts else ""
    return comments


def model_table(conf: Path) -> list[tuple[str, str, str]]:
    """Option, number of parameters for 3×32×32 pixels and 10 classes, and comment of each model."""
    rows = []
    with initialize_config_dir(str(conf), version_base="1.3"):
        for name, comment in options(conf, "model").items():
            node: Any = compose("train", [f"model={name}"]).model
            if OmegaConf.is_missing(node, "name"):
                rows.append((name, "", comment))
                continue
            with torch.device("meta"):  # allocates nothing
                model = part(node)(num_classes=CLASSES, in_chans=3, image_size=(PIXELS, PIXELS))
            count = sum(p.numel() for p in model.parameters())
            rows.append((name, f"{count:,}".replace(",", " "), comment))
    return rows


def listing(conf: Path) -> str:
    models = tabulate(
        model_table(conf), ("model=", SIZE, ""), disable_numparse=True, colalign=("left", "right")
    )
    others = [tabulate(options(conf, group).items(), (f"{group}=", "")) for group in GROUPS]
    return "\n\n".join([models, *others])
