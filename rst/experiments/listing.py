"""What `python train.py --list` prints: each group's options with a line on each, and the models' sizes."""

from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tabulate import tabulate

GROUPS = ("dataset", "augment", "method", "schedule", "optimizer", "lr_schedule", "tracker", "protocol")
CLASSES, PIXELS = 10, 32
SIZE = f"parameters at {PIXELS}×{PIXELS}, {CLASSES} classes"


def options(conf: Path, group: str) -> dict[str, str]:
    """The group's options, each with the first comment of its file."""
    found = {}
    for path in sorted((conf / group).glob("*.yaml")):
        comments = [
            line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")
        ]
        comments = [line for line in comments if not line.startswith("@package")]
        found[path.stem] = comments[0].strip() if comments else ""
    return found


def model_table(conf: Path) -> list[tuple[str, str, str]]:
    """(option, number of parameters at 10 classes and 3×32×32 pixels, first comment) of each model."""
    rows = []
    with initialize_config_dir(str(conf), version_base="1.3"):
        for name, comment in options(conf, "model").items():
            node: Any = compose("train", [f"model={name}"]).model
            if OmegaConf.is_missing(node, "name"):
                rows.append((name, "", comment))
                continue
            with torch.device("meta"):  # sizes without memory
                model = instantiate(node)(num_classes=CLASSES, in_chans=3, image_size=(PIXELS, PIXELS))
            count = sum(p.numel() for p in model.parameters())
            rows.append((name, f"{count:,}".replace(",", " "), comment))
    return rows


def listing(conf: Path) -> str:
    """All of it, as text."""
    models = tabulate(
        model_table(conf), ("model=", SIZE, ""), disable_numparse=True, colalign=("left", "right")
    )
    others = [tabulate(options(conf, group).items(), (f"{group}=", "")) for group in GROUPS]
    return "\n\n".join([models, *others])
