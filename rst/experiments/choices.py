"""What the chosen options mean together: the authors' recipe for them, and contradictions."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from rst.training.settings import Settings, read_settings

# The models of the authors' recipes, by the beginnings of their names.
CIFAR_CNNS = ("resnet18", "resnet34", "resnet50", "resnet101", "wrn", "vgg", "pyramidnet")
IMAGENET_FAMILIES = {"resnet18": "resnet", "resnet34": "resnet", "resnet50": "resnet", "resnet101": "resnet"}
IMAGENET_FAMILIES |= {"vgg16_bn": "vgg", "vgg19_bn": "vgg"}

# The protocols that train by the authors' recipes.
WITH_RECIPES = ("paper", "gpu")

# The schedule is part of what these methods are: p(t) is this number.
FIXED_P = {"sgd": 0.0, "sam": 1.0, "asam": 1.0, "gnp": 1.0, "partial": 1.0}
# These do not go by a schedule.
NO_SCHEDULE = ("aesam", "aelooksam", "msam", "stale")


def recipe(protocol: str | None, dataset: str, model: str, augment: str) -> str:
    """The option of conf/recipe for these choices: one of the authors' recipes, or "none"."""
    if protocol not in WITH_RECIPES:
        return "none"
    if dataset == "imagenet":
        return f"imagenet_{IMAGENET_FAMILIES[model]}" if model in IMAGENET_FAMILIES else "none"
    if not dataset.startswith("cifar"):
        return "none"
    if model.startswith("vit_"):
        return "cifar_vit_mixup" if "mixup" in augment else "cifar_vit"
    for family in ("shakedrop", "shakeshake"):
        if model.endswith(family):
            return f"cifar_{family}"
    return "cifar_cnn" if model.startswith(CIFAR_CNNS) else "none"


# At import, for a launcher's processes, which do no more than unpickle a task.
OmegaConf.register_new_resolver("recipe", recipe, replace=True)


def check(config: Mapping[str, Any], choices: Mapping[str, str]) -> Settings:
    """The settings of a composed configuration.

    Args:
        choices: the option chosen in each group.

    Raises:
        ValueError: a setting is unknown, missing, out of range, or contradicts another.
    """
    for preset in config.keys() & choices.keys() - Settings.model_fields.keys():
        raise ValueError(
            f"{preset}={choices[preset]} is no preset: its file must begin with '# @package _global_'"
        )
    settings = read_settings(config)
    if settings.warmup_epochs >= settings.epochs:
        raise ValueError(f"warmup_epochs={settings.warmup_epochs} must be less than epochs={settings.epochs}")
    if settings.l2 and settings.optimizer.get("weight_decay"):
        raise ValueError("both l2 and optimizer.weight_decay are set: add l2=0 or optimizer.weight_decay=0")
    _check_method(settings, choices)
    if choices["protocol"] in WITH_RECIPES:
        _check_recipe(choices)
    return settings


def _check_method(settings: Settings, choices: Mapping[str, str]) -> None:
    method = choices["method"]
    p = 1.0 if method in NO_SCHEDULE else FIXED_P.get(method)
    schedule, given = choices["schedule"], settings.schedule.get("p")
    if p is None or (schedule == "constant" and given == p):
        return
    chosen = f"schedule.p={given}" if schedule == "constant" else f"schedule={schedule}"
    if method in NO_SCHEDULE:
        raise ValueError(f"method={method} does not go by a schedule: leave {chosen} out")
    raise ValueError(
        f"method={method} {'always' if p else 'never'} takes a SAM step, which contradicts {chosen}: leave "
        "the schedule out, or use method=rst or method=grst"
    )


def _check_recipe(choices: Mapping[str, str]) -> None:
    asked = f"protocol={choices['protocol']}"
    if choices["recipe"] == "none":
        raise ValueError(
            f"{asked} has no recipe for model={choices['model']} dataset={choices['dataset']}: "
            "see conf/recipe, or leave the protocol out"
        )
    optimizer = "adamw" if "vit" in choices["recipe"] else "sgd"
    if choices["optimizer"] != optimizer:
        raise ValueError(f"{asked}: the recipe for model={choices['model']} is for optimizer={optimizer}")
