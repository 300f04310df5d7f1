"""A run's settings, checked before anything is loaded: unknown ones, of another kind, out of range."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from hydra._internal.utils import _locate

from rst.training.checkpoint import Every

# The settings of a group are of the kinds that what it builds is annotated with.
KINDS: dict[str, Any] = {
    "seed": int,
    "epochs": int,
    "warmup_epochs": int,
    "batch_size": int,
    "rho": float,
    "l2": float,
    "grad_accumulation": int,
    "evaluate_every": int,
    "clip_norm": float | None,
    "precision": Literal["fp32", "tf32", "bf16", "fp16"],
    "channels_last": bool,
    "compile": bool,
    "device": Any,
    "threads": int | None,
    "outputs": str,
}
LEAST = {"seed": 0, "warmup_epochs": 0} | dict.fromkeys(
    ("epochs", "batch_size", "grad_accumulation", "evaluate_every", "threads"), 1
)
MOST_THREADS = 1024  # asked for some ten thousand, PyTorch crashes

# What the run itself gives to a group's node, which is `_partial_`.
GIVEN = {
    "model": ("num_classes", "in_chans", "image_size"),
    "optimizer": ("params",),
    "method": ("base", "schedule", "total_steps", "module", "seed"),
    "lr_schedule": ("progress",),
    "tracker": ("run_name", "group", "job_type", "tags", "folder", "config"),
}
WORDS = {
    int: ["a whole number"],
    float: ["a finite number"],
    bool: ["true", "false"],
    str: ["text"],
    NoneType: ["null"],
}
GROUPS = (*GIVEN, "dataset", "augment", "schedule")
KNOWN = (*KINDS, *GROUPS, "checkpoint")

# These methods are what they are by their schedule: p(t) is this number.
FIXED_P = {"sgd": 0.0, "sam": 1.0, "asam": 1.0, "gnp": 1.0}


def check(config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
    """Refuse what the parts themselves would not, or only after minutes of loading data.

    Raises:
        ValueError: naming the setting and what it may be.
    """
    for key in config:
        if key in choices and key not in KNOWN:
            raise ValueError(
                f"{key}={choices[key]} is no preset of a run: the file of one begins with the line "
                "'# @package _global_'"
            )
        if key not in KNOWN:
            raise ValueError(unknown_setting(key))
    for key in KNOWN:
        if key not in config:
            raise ValueError(f"{key} must be given")
    for key, least in LEAST.items():
        value = config[key]
        if (key, value) != ("threads", None) and not (type(value) is int and value >= least):
            raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}")
    for key, kind in KINDS.items():
        _require(kind, config[key], key)
    for group in GROUPS:
        if not isinstance(config[group], Mapping):
            raise ValueError(f"{group} must be one of its options, got {config[group]!r}")
    _check_names("checkpoint", config["checkpoint"], inspect.signature(Every).parameters, "a run")
    _check_ranges(config)
    _check_choices(config, choices)


def unknown_setting(key: str) -> str:
    """What to say of a setting that there is not."""
    close = difflib.get_close_matches(key, [*KNOWN, "protocol"], n=1)
    hint = f"closest is {close[0]}" if close else "python train.py --help shows them all"
    return f"unknown setting {key!r}; {hint}"


def _check_ranges(config: Mapping[str, Any]) -> None:
    Every(**config["checkpoint"])
    if (config["threads"] or 1) > MOST_THREADS:
        raise ValueError(f"threads must be at most {MOST_THREADS}, got {config['threads']}")
    if config["warmup_epochs"] >= config["epochs"]:
        raise ValueError(
            f"warmup_epochs={config['warmup_epochs']} must be less than epochs={config['epochs']}"
        )
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(config["device"])):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {config['device']!r}")
    if not config["outputs"]:
        raise ValueError("outputs must name a folder, got ''")
    lr, momentum = (config["optimizer"].get(key) for key in ("lr", "momentum"))
    if isinstance(lr, int | float) and lr <= 0:
        raise ValueError(f"optimizer.lr must be above 0, got {lr}")
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(f"optimizer.momentum must be at least 0 and less than 1, got {momentum}")
    if momentum == 0 and config["optimizer"].get("nesterov"):
        raise ValueError("optimizer.momentum=0 needs optimizer.nesterov=false")


def _check_choices(config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
    if choices["protocol"] == "paper":
        if choices["recipe"] == "none":
            raise ValueError(
                f"protocol=paper has no recipe for model={choices['model']} dataset={choices['dataset']}: "
                "see conf/recipe, or leave the protocol out"
            )
        optimizer = "adamw" if "vit" in choices["recipe"] else "sgd"
        if choices["optimizer"] != optimizer:
            raise ValueError(
                f"protocol=paper: the recipe for model={choices['model']} is optimizer={optimizer}'s"
            )
    if config["l2"] and config["optimizer"].get("weight_decay"):
        raise ValueError("both l2 and optimizer.weight_decay are set: add l2=0 or optimizer.weight_decay=0")
    p = FIXED_P.get(choices["method"])
    constant = choices["schedule"] == "constant"
    if p is not None and not (constant and config["schedule"]["p"] == p):
        given = f"schedule.p={config['schedule']['p']}" if constant else f"schedule={choices['schedule']}"
        raise ValueError(
            f"method={choices['method']} takes a SAM step {'always' if p else 'never'}, which contradicts "
            f"{given}: leave the schedule out, or use method=rst or method=grst"
        )


def check_groups(config: Mapping[str, Any]) -> None:
    """Refuse settings that a group's `_target_` does not take, and values of another kind than its
    annotations say. Imports what a run builds, which takes seconds.

    Raises:
        ValueError: naming the setting and what it may be.
    """
    for group in GROUPS:
        _check_group(group, config[group])


def _check_group(group: str, node: Mapping[str, Any]) -> None:
    target = node.get("_target_")
    if not isinstance(target, str):
        raise ValueError(f"{group} needs a _target_, the function or class that makes it, got {target!r}")
    try:
        parameters, kinds = _parameters(_locate(target))
    except Exception as error:  # whatever importing it trips over
        raise ValueError(f"{group}: cannot import {target} ({error.__cause__ or error})") from error
    if bool(node.get("_partial_")) != (group in GIVEN):
        raise ValueError(f"{group} must {'' if group in GIVEN else 'not '}have _partial_: true")
    given = GIVEN.get(group, ())
    options = {key: value for key, value in node.items() if not key.startswith("_")}
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    own = [name for name in named if name not in given]
    for key in given:
        if key in options:
            raise ValueError(f"{group}.{key} follows from the other settings: leave it out")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        _check_names(group, options, own, target)
    for p in parameters:
        if p.name in own and p.default is p.empty and p.name not in options and group not in GIVEN:
            raise ValueError(f"{group}.{p.name} must be given: {target} needs it")
    for key in own:
        if key in options and key in kinds:
            _require(kinds[key], options[key], f"{group}.{key}")


@cache
def _parameters(made_by: Callable[..., Any]) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """Its parameters, and the kinds of those whose annotations can be resolved."""
    annotated = made_by.__init__ if inspect.isclass(made_by) else made_by
    try:
        kinds = get_type_hints(annotated)
    except Exception:  # names that only a type checker sees
        kinds = {}
    return list(inspect.signature(made_by).parameters.values()), kinds


def _check_names(where: str, options: Any, names: Iterable[str], target: str) -> None:
    if not isinstance(options, Mapping):
        raise ValueError(f"{where} must hold {', '.join(names)}, got {options!r}")
    for key in options:
        if key not in names:
            raise ValueError(
                f"{where}.{key} is no option of {target}: choose from {', '.join(names) or 'none'}"
            )


def _require(kind: Any, value: Any, name: str) -> None:
    if not _fits(kind, value):
        raise ValueError(f"{name} must be {' or '.join(_in_words(kind))}, got {value!r}")


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value from YAML is of an annotated kind; of one that is not known here, it is.

    A word such as `no` or `maybe` is not a flag: it would be a text, which counts as true.
    """
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(each, value) for each in get_args(kind))
    if get_origin(kind) in (Sequence, list, tuple):
        return isinstance(value, list) and all(_fits(get_args(kind)[0], each) for each in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind if kind in WORDS else kind is not torch.Tensor


def _in_words(kind: Any) -> list[str]:
    """What a value of that kind may be."""
    if get_origin(kind) in (Union, UnionType):
        return [words for each in get_args(kind) for words in _in_words(each)]
    if get_origin(kind) in (Sequence, list, tuple):
        return [f"a list, each {' or '.join(_in_words(get_args(kind)[0]))}"]
    return list(map(str, get_args(kind))) if get_origin(kind) is Literal else WORDS.get(kind, [])
