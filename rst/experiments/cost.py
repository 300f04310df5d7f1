"""What a run will cost, before it runs: steps, propagations, operations, disk space."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from rst.data.image_folder import scan
from rst.training.device import PRECISIONS, allow_tf32, cpu_threads, pick_device
from rst.training.parts import checkpoint_bytes, optimizer_alone, part


class DataSize(NamedTuple):
    """What a run's cost depends on. `side`: of the square images, in pixels."""

    train_images: int
    channels: int
    side: int
    classes: int


SIZES = {
    "rst.data.cifar10": DataSize(50_000, 3, 32, 10),
    "rst.data.cifar100": DataSize(50_000, 3, 32, 100),
    "rst.data.digits": DataSize(1297, 1, 8, 10),
    # By their names, as others may lie in folders of the same layout:
    "imagenet": DataSize(1_281_167, 3, 224, 1000),
    "cifar10-jpeg": DataSize(50_000, 3, 32, 10),
}
_RESNET20 = {"_target_": "rst.models.create", "name": "resnet20"}


@dataclass(frozen=True)
class Cost:
    """`propagations` is an expectation, or where only the run can tell the most, 2 a step; `flops` are the
    floating-point operations of one propagation of one image; `disk_bytes` hold two checkpoints."""

    steps: int
    propagations: float
    batch_size: int
    flops: float
    disk_bytes: int

    @property
    def images(self) -> float:
        """Images propagated in the whole run, an image counting once a propagation."""
        return self.propagations * self.batch_size

    @property
    def work(self) -> float:
        """Floating-point operations of the whole run."""
        return self.images * self.flops


def cost_of(config: Mapping[str, Any]) -> Cost:
    """The cost of a run with this configuration. Nothing is loaded; the files of an image folder are counted.

    Raises:
        FileNotFoundError: there is no such image folder.
    """
    epoch_steps = steps_per_epoch(config)
    steps = config["epochs"] * epoch_steps
    propagations = _propagations(config, epoch_steps) if steps else 0.0
    flops, parameters = _model_size(json.dumps([config["model"], data_size(config)[1:]], sort_keys=True))
    return Cost(steps, propagations, config["batch_size"], flops, 2 * checkpoint_bytes(parameters, config))


def _propagations(config: Mapping[str, Any], epoch_steps: int) -> float:
    optimizer = optimizer_alone(config, epoch_steps)
    expected = optimizer.expected_propagations
    return 2.0 * optimizer.total_steps if expected is None else expected


def steps_per_epoch(config: Mapping[str, Any]) -> int:
    return data_size(config).train_images // config["batch_size"]


def data_size(config: Mapping[str, Any]) -> DataSize:
    node = config["dataset"]
    size = SIZES.get(node["_target_"]) or SIZES.get(node.get("name"))
    if size is None and "root" not in node:
        raise ValueError(f"the size of {node['_target_']} is unknown: add it to SIZES in {__name__}")
    size = size or _folder_size(Path(node["root"]).expanduser())
    n = size.train_images
    if folds := node.get("folds"):
        n = len(range((node["fold"] or 0) % folds, n, folds))  # without one, the run will say so
    if node["validation"]:
        n -= n // 10
    return size._replace(train_images=node["train_size"] or n, side=node.get("image_size") or size.side)


@cache
def _folder_size(root: Path) -> DataSize:
    files = scan(root, "train")
    return DataSize(len(files), 3, 32, len({file.class_name for file in files}))


@cache
def _model_size(key: str) -> tuple[float, int]:
    """Floating-point operations of one image's forward and backward pass, taken as three times those of the
    forward pass, and the number of parameters. `key`: the model's node and [channels, side, classes]."""
    node, (channels, side, classes) = json.loads(key)
    with torch.device("meta"), torch.no_grad():
        model = part(node)(num_classes=classes, in_chans=channels, image_size=(side, side))
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, channels, side, side))
    return 3.0 * counter.get_total_flops(), sum(p.numel() for p in model.parameters())


def speed(config: Mapping[str, Any]) -> float:
    """Floating-point operations per second of this machine when it trains ResNet-20 for a second with the
    run's device, precision and threads: a rough guide to other models, and too low for a GPU, which ResNet-20
    does not fill."""
    return _speed(config["device"], config["precision"], config["threads"])


@cache
def _speed(device_name: str, precision: str, threads: int | None) -> float:
    flops, _ = _model_size(json.dumps([_RESNET20, (3, 32, 10)], sort_keys=True))
    device, dtype, batch_size = pick_device(device_name), PRECISIONS[precision], 64
    model = part(_RESNET20)(num_classes=10, in_chans=3, image_size=(32, 32))
    model = model.to(device, memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    allow_tf32(precision == "tf32")

    def propagate() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with cpu_threads(threads):
        propagate()  # the first one allocates
        count, started = 0, time.perf_counter()
        while count < 2 or time.perf_counter() - started < 1.0:
            propagate()
            count += 1
        return count * batch_size * flops / (time.perf_counter() - started)
