"""What a run will cost, before it runs: steps, propagations, seconds, disk."""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from rst.files import write_text
from rst.schedule import expected_propagations
from rst.training.device import PRECISIONS, allow_tf32, cpu_threads, pick_device
from rst.training.fit import checkpoint_bytes, schedule_of
from rst.training.run import Run, device_name

log = logging.getLogger(__name__)


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
    "rst.data.imagenet": DataSize(1_281_167, 3, 224, 1000),
}


@dataclass(frozen=True)
class Cost:
    """Of one run. `propagations` is the expectation; `flops` those of a propagation of one image."""

    steps: int
    propagations: float
    batch_size: int
    flops: float
    disk_bytes: int

    @property
    def work(self) -> float:
        """Floating-point operations of the whole run."""
        return self.propagations * self.batch_size * self.flops


def data_size(config: Mapping[str, Any]) -> DataSize:
    """Of a run's data set, without loading it; for one's own folder it counts the files.

    Raises:
        FileNotFoundError: a folder that is not there.
    """
    node = config["dataset"]
    size = SIZES.get(node["_target_"]) or _folder_size(node)
    n = size.train_images
    if node["validation"]:
        n -= n // 10
    side = node.get("image_size") or size.side
    return size._replace(train_images=node["train_size"] or n, side=side)


def _folder_size(node: Mapping[str, Any]) -> DataSize:
    folder = Path(node["root"]).expanduser() / "train"
    if not folder.is_dir() and node["train_size"]:
        return DataSize(node["train_size"], 3, 32, 10)  # a guess of the side and classes, for the plan alone
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}, whose images a plan counts (set dataset.root=DIR)")
    classes = [path for path in folder.iterdir() if path.is_dir()]
    return DataSize(sum(1 for path in classes for _ in path.iterdir()), 3, 32, len(classes))


def steps_per_epoch(config: Mapping[str, Any]) -> int:
    return data_size(config).train_images // config["batch_size"]


def cost_of(config: Mapping[str, Any], known: "Measurements") -> Cost:
    """A run's cost, its propagations from the schedule's closed form."""
    size, epoch_steps = data_size(config), steps_per_epoch(config)
    steps = config["epochs"] * epoch_steps
    propagations = expected_propagations(schedule_of(config, epoch_steps), steps) if steps else 0.0
    flops, parameters = known.model(config["model"], size)
    disk_bytes = 2 * checkpoint_bytes(parameters, config)  # the last one and the one before it
    return Cost(steps, propagations, config["batch_size"], flops, disk_bytes)


def costs_of(runs: Iterable[Run], known: "Measurements") -> list[Cost]:
    """The cost of each run, computed once for those that differ in their seed alone."""
    costs: dict[str, Cost] = {}
    found = []
    for run in runs:
        key = run.without_seed
        if key not in costs:
            costs[key] = cost_of(run.config, known)
        found.append(costs[key])
    return found


class Measurements:
    """Models' sizes and this machine's speed, measured once and kept in a file.

    Args:
        path: a JSON file, made when it is absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.kept: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            self.kept = {}

    def model(self, node: Mapping[str, Any], size: DataSize) -> tuple[float, int]:
        """Floating-point operations of one image's forward-backward pair, thrice those of its forward pass;
        and the number of parameters."""
        key = json.dumps([node, size[1:]], sort_keys=True)
        if key not in self.kept:
            self.kept[key] = _model_size(key)
        flops, parameters = self.kept[key]
        return flops, parameters

    def speed(self, config: Mapping[str, Any]) -> float:
        """Floating-point operations a second that this machine does in training, by a short measurement with
        ResNet-20: a rough guide to other models, and on a GPU, which ResNet-20 does not fill, too low."""
        device = pick_device(config["device"])
        key = f"{device_name(device)}, {config['precision']}, {config['threads']} threads"
        if key not in self.kept:
            log.info("measuring the speed of %s", key)
            with cpu_threads(config["threads"]):
                self.kept[key] = _speed(device, config["precision"])
        return self.kept[key]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.kept, indent=1))


@cache
def _model_size(key: str) -> tuple[float, int]:
    node, (channels, side, classes) = json.loads(key)
    # `create` passes one image through the model.
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = instantiate(node)(num_classes=classes, in_chans=channels, image_size=(side, side))
    return 3.0 * counter.get_total_flops(), sum(p.numel() for p in model.parameters())


def _speed(device: torch.device, precision: str, batch_size: int = 64, seconds: float = 1.0) -> float:
    size = DataSize(0, 3, 32, 10)
    flops, _ = _model_size(json.dumps([_RESNET20, size[1:]], sort_keys=True))
    model = instantiate(_RESNET20)(num_classes=10, in_chans=3, image_size=(32, 32))
    model = model.to(device, memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    dtype = PRECISIONS[precision]
    allow_tf32(precision == "tf32")

    def propagation() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    propagation()  # the first one allocates
    wait()
    count, started = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - started < seconds:
        propagation()
        wait()
        count += 1
    return count * batch_size * flops / (time.perf_counter() - started)


_RESNET20 = {"_target_": "rst.models.create", "_partial_": True, "name": "resnet20"}
