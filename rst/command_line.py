"""Errors on the command line: one line with the cause and the fix, exit code 1, no traceback."""

import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from rst import distributed
from rst.checkpoint import Every
from rst.record import Run

log = logging.getLogger(__name__)
_failures: list[Exception] = []

# These methods are what they are by their schedule: p(t) is this number.
FIXED_P = {"sgd": 0.0, "sam": 1.0, "asam": 1.0, "gnp": 1.0}


def check(config: dict[str, Any], choices: dict[str, str]) -> None:
    """Refuse what the parts themselves would not, or only after minutes of loading data."""
    whole_numbers = {
        "seed": 0,
        "epochs": 1,
        "batch_size": 1,
        "grad_accumulation": 1,
        "threads": 1,
        "warmup_epochs": 0,
    }
    for key, least in whole_numbers.items():
        value = 1 if key == "threads" and config[key] is None else config[key]
        if type(value) is not int or value < least:
            raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}")
    Every(**config["checkpoint"])
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
    if config["warmup_epochs"] >= config["epochs"]:
        raise ValueError(
            f"warmup_epochs={config['warmup_epochs']} must be less than epochs={config['epochs']}"
        )
    for key in {"num_classes", "in_chans", "image_size"} & config["model"].keys():
        raise ValueError(f"model.{key} follows from the data set: leave it out")
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


# The models of the paper's recipes, by the beginnings of their names.
CIFAR_CNNS = ("resnet18", "resnet34", "resnet50", "resnet101", "wrn", "vgg", "pyramidnet")
IMAGENET_FAMILIES = {"resnet18": "resnet", "resnet34": "resnet", "resnet50": "resnet", "resnet101": "resnet"}
IMAGENET_FAMILIES |= {"vgg16_bn": "vgg", "vgg19_bn": "vgg"}


def recipe(protocol: str | None, dataset: str, model: str, augment: str) -> str:
    """The option of conf/recipe for these choices: a column of the paper's table of recipes, or "none"."""
    if protocol != "paper":
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


def describe(cfg: DictConfig, hydra_cfg: HydraConf) -> Run:
    """The run that a composed configuration and Hydra's part of it stand for."""
    chosen = hydra_cfg.runtime.choices.items()
    choices = {str(group): str(name) for group, name in chosen if not str(group).startswith("hydra/")}
    command = shlex.join(["python", "train.py", *hydra_cfg.overrides.task])
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check(config, choices)
    return Run(Path(config["outputs"]), config, choices, command)


def task(function: Callable[[DictConfig], object]) -> Callable[[DictConfig], None]:
    """A Hydra task whose error is reported once, by `launch`.

    A job of a sweep logs its own line and re-raises, as Hydra reports only the first job's failure. Outside a
    sweep raising would make Hydra print a line of its own.
    """

    @wraps(function)
    def wrapped(cfg: DictConfig) -> None:
        if multiprocessing.current_process().name != "MainProcess":
            _end_with_parent()
        if not distributed.is_first():
            logging.disable(logging.WARNING)
        try:
            function(cfg)
        except Exception as error:
            error = _explained(_origin(error), cfg)  # a cause would be lost on the way from another process
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                log.error("error in %s: %s", " ".join(HydraConfig.get().overrides.task), one_line(error))
                raise error from None
            _failures.append(error)

    return wrapped


@cache
def _end_with_parent(poll: float = 1.0) -> None:
    """End this process, one of a launcher's, when the one that started it is gone: joblib's would hold their
    memory for ever after a driver that was killed. A run has half a minute to end its step and save."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def launch(main: Callable[[], None]) -> None:
    """Run a `hydra.main` function and end the process as a command should."""
    full_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    _failures.clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors rather than print them over lines
    try:
        if distributed.is_launched() and {"-m", "--multirun"} & set(sys.argv):
            raise ValueError(
                "torchrun is for one run on several devices: leave -m out, or leave torchrun out"
            )
        main()
        if _failures:
            raise _failures[0]
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if full_traceback:
            raise
        rank = "" if distributed.is_first() else f"rank {os.environ['RANK']}: "
        sys.exit(f"error: {rank}{one_line(error)}")


def _origin(error: Exception) -> Exception:
    """What a node of the configuration raised, without Hydra's wrapping."""
    wrapped = isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception)
    return error.__cause__ if wrapped else error  # type: ignore[return-value]


def _explained(error: Exception, cfg: DictConfig) -> Exception:
    """What a user can do about a failure that only names what the machine did."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return MemoryError(
            f"out of memory with batch_size={cfg.batch_size} and model={cfg.model.name}: try "
            f"grad_accumulation={2 * cfg.grad_accumulation}, a smaller batch_size or precision=bf16 ({text})"
        )
    if isinstance(error, FloatingPointError):
        return FloatingPointError(f"method={HydraConfig.get().runtime.choices['method']}: {text}")
    return error


def one_line(error: Exception) -> str:
    """The error's message on one line, with the choices where an option of a group is unknown."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"unknown {group} '{option}': choose from {', '.join(sorted(error.options))}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: add {error.full_key}=VALUE"
    error = _origin(error)
    message = " ".join(str(error).split())
    # Ours and Hydra's messages speak for themselves; what nobody foresaw needs its type.
    known = isinstance(error, ValueError | OSError | FloatingPointError | MemoryError | HydraException)
    return message if known else f"{type(error).__name__}: {message}"
