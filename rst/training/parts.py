"""The parts of a run: what each configuration group's `_target_` builds."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn
from torch.optim import Optimizer

from rst.draws import draw
from rst.optim import RST
from rst.schedule import Schedule, Warmup
from rst.training.checkpoint import Every
from rst.training.settings import Settings, check_options

# The arguments of each group's target that are not options: they come from the run.
GIVEN = {
    "dataset": (),
    "augment": (),
    "model": ("num_classes", "in_chans", "image_size"),
    "optimizer": ("params",),
    "schedule": (),
    "method": ("base", "schedule", "total_steps", "warmup_steps", "module", "seed", "scaler"),
    "lr_schedule": ("progress",),
    "tracker": ("run_name", "group", "job_type", "tags", "folder", "config"),
}


def part(node: Mapping[str, Any]) -> partial[Any]:
    """A group's target with its options, to be called with what the run gives.

    Raises:
        ValueError: the group has no target.
    """
    if "_target_" not in node:
        raise ValueError("a _target_ is needed, the function or class that builds it")
    return instantiate({**node, "_partial_": True}, _convert_="all")


def rehearse(settings: Settings) -> None:
    """Build what can be built without data, the optimizer on a single weight, so that options which cannot
    work are refused within seconds.

    Raises:
        ValueError: naming the group, and the option where its name or its type is wrong.
    """
    check_options("checkpoint", Every, settings.checkpoint)
    parts = {}
    for group, given in GIVEN.items():
        with _named(group):
            parts[group] = part(getattr(settings, group))
        check_options(group, parts[group].func, getattr(settings, group), given)
    with _named("optimizer"):
        base = parts["optimizer"]([nn.Parameter(torch.zeros(1))])
    with _named("schedule"):
        parts["schedule"]()
    with _named("method"):
        new_optimizer(settings.model_dump(), base, epoch_steps=100)
    with _named("augment"):
        parts["augment"]()
    with _named("lr_schedule"):
        parts["lr_schedule"](0.0)


@contextmanager
def _named(group: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{group}: {error}") from error


def new_model(config: Mapping[str, Any], data: Any) -> nn.Module:
    """The run's model as it is before the first step, on the CPU.

    Raises:
        ValueError: it does not return a number for each class.
    """
    torch.manual_seed(draw(config["seed"], "init"))
    _, channels, height, width = data.train_images.shape
    build = part(config["model"])
    model = build(num_classes=len(data.classes), in_chans=channels, image_size=(height, width))
    with torch.no_grad():
        logits = model.eval()(torch.zeros(1, channels, height, width))
    model.train()
    if logits.shape != (1, n := len(data.classes)):
        raise ValueError(f"the model returns {tuple(logits.shape)} for one image, not (1, {n})")
    return model.to(memory_format=torch.channels_last if config["channels_last"] else torch.preserve_format)


def new_optimizer(
    config: Mapping[str, Any], base: Optimizer, epoch_steps: int, module: nn.Module | None = None
) -> RST:
    """The run's method around `base`. One that goes by no schedule is told of the warmup by itself."""
    method = part(config["method"])
    given: dict[str, Any] = {"total_steps": config["epochs"] * epoch_steps, "module": module}
    if "warmup_steps" in inspect.signature(method).parameters:
        given["warmup_steps"] = config["warmup_epochs"] * epoch_steps
    else:
        given |= {"schedule": schedule_of(config, epoch_steps), "seed": config["seed"]}
    return method(base, **given)


def optimizer_alone(config: Mapping[str, Any], epoch_steps: int) -> RST:
    """The run's method around its base optimizer, on a single weight in place of the model."""
    return new_optimizer(config, part(config["optimizer"])([nn.Parameter(torch.zeros(1))]), epoch_steps)


def schedule_of(config: Mapping[str, Any], epoch_steps: int) -> Schedule:
    """The run's schedule, with its warmup."""
    schedule = part(config["schedule"])()
    warmup = config["warmup_epochs"]
    return Warmup(schedule, warmup * epoch_steps) if warmup else schedule


def checkpoint_bytes(parameters: int, config: Mapping[str, Any]) -> int:
    """Size of a checkpoint: float32 weights, the optimizer's one or two buffers per weight, and what some
    rivals carry from step to step."""
    buffers = 2 if "Adam" in config["optimizer"]["_target_"] else 1
    buffers += config["method"]["_target_"].startswith("rst.rivals.")
    return 4 * parameters * (1 + buffers)
