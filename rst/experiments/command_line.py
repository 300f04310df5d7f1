"""Errors on the command line: one line with the cause and the fix, exit code 1, no traceback."""

import errno
import logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from yaml import YAMLError

if TYPE_CHECKING:
    from rst.training.run import Run

# PyTorch takes over a second to import, and `python train.py --help` needs nothing of it: what imports it is
# imported where it is used.

log = logging.getLogger(__name__)
_failures: list[Exception] = []

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


def describe(cfg: DictConfig, hydra_cfg: HydraConf) -> "Run":
    """The run that a composed configuration and Hydra's part of it stand for."""
    from rst.experiments.settings import check, check_groups
    from rst.training.run import Run

    chosen = hydra_cfg.runtime.choices.items()
    choices = {str(group): str(name) for group, name in chosen if not str(group).startswith("hydra/")}
    command = shlex.join(["python", "train.py", *hydra_cfg.overrides.task])
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check(config, choices)
    run = Run(Path(config["outputs"]), config, choices, command)
    if run.result(warn=False) is None:  # else it has been checked, which takes seconds
        check_groups(config)
    return run


def task(function: Callable[[DictConfig], object]) -> Callable[[DictConfig], None]:
    """A Hydra task whose error is reported once, by `launch`.

    A job of a sweep logs its own line and re-raises, as Hydra reports only the first job's failure. Outside a
    sweep raising would make Hydra print a line of its own.
    """

    @wraps(function)
    def wrapped(cfg: DictConfig) -> None:
        if multiprocessing.current_process().name != "MainProcess":
            end_with_parent()
        from rst.training import distributed

        if not distributed.is_first():
            logging.disable(logging.WARNING)
        try:
            function(cfg)
        except Exception as error:
            error = explained(_origin(error), cfg)  # a cause would be lost on the way from another process
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                log.error("error in %s: %s", " ".join(HydraConfig.get().overrides.task), one_line(error))
                raise error from None
            _failures.append(error)

    return wrapped


@cache
def end_with_parent(poll: float = 1.0) -> None:
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
        if hasattr(main, "__wrapped__"):  # by Hydra, whose parser would answer with ten lines of usage
            _check_options()
        main()
        if _failures:
            raise _failures[0]
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if full_traceback:
            raise
        from rst.training import distributed

        rank = "" if distributed.is_first() else f"rank {os.environ['RANK']}: "
        sys.exit(f"error: {rank}{one_line(error)}")


def _origin(error: Exception) -> Exception:
    """What a node of the configuration raised, without Hydra's wrapping."""
    wrapped = isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception)
    return error.__cause__ if wrapped else error  # type: ignore[return-value]


def _check_options() -> None:
    """Refuse arguments that are neither a setting nor one of Hydra's options, and a sweep under torchrun.

    Raises:
        ValueError: naming the first of them.
    """
    options, unknown = get_args_parser().parse_known_args()
    if options.multirun:
        from rst.training import distributed

        if distributed.is_launched():
            raise ValueError(
                "torchrun is for one run on several devices: leave -m out, or leave torchrun out"
            )
    for argument in unknown:
        if argument.startswith("-"):
            name = argument.lstrip("-").partition("=")[0]
            raise ValueError(f"unknown option {argument}: settings are given as {name}=VALUE, without dashes")
    if unknown:
        raise ValueError(f"options such as -m go before all settings or after them, not before {unknown[0]}")


def explained(error: Exception, cfg: DictConfig) -> Exception:
    """What a user can do about a failure that only names what the machine did."""
    from torch import OutOfMemoryError

    chain = list(_chain(error))
    deaths = [text for text in map(str, chain) if "DataLoader worker" in text]
    if deaths:
        return _worker_death(deaths[-1])
    for cause in chain:
        if isinstance(cause, MemoryError | OutOfMemoryError) or "can't allocate memory" in str(cause):
            return _out_of_memory(str(cause), cfg)
    if isinstance(error, FloatingPointError):
        return FloatingPointError(f"method={HydraConfig.get().runtime.choices['method']}: {error}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OSError(
            f"cannot write to outputs={cfg.outputs} ({error.strerror}): make room and repeat the command, "
            "which goes on from the last checkpoint"
        )
    return error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, the cause of that."""
    while error is not None:
        yield error
        error = error.__cause__


def _worker_death(text: str) -> ChildProcessError:
    """Of a process that decodes images. PyTorch says so in an error that a signal raises, wherever the main
    process is; the last line of an error in such a process, which comes with its traceback, is its cause."""
    cause = text.strip().splitlines()[-1].partition(". ")[0].rstrip(".")
    if re.search("Bus error|shared memory|No space left", text):
        hint = "shared memory is full: enlarge /dev/shm, or set dataset.workers=0, which needs none"
    elif "signal: Killed" in text:
        hint = "usually for want of memory: use fewer dataset.workers"
    else:
        hint = "dataset.workers=0 decodes in the main process and says more"
    return ChildProcessError(f"a process that decodes images has failed ({cause}); {hint}")


def _out_of_memory(text: str, cfg: DictConfig) -> MemoryError:
    larger = range(cfg.grad_accumulation + 1, cfg.batch_size + 1)
    parts = next((n for n in larger if cfg.batch_size % n == 0), None)
    hints = [f"grad_accumulation={parts}"] if parts else []
    hints += ["precision=bf16"] if cfg.precision == "fp32" else []
    model = cfg.model.get("name", cfg.model._target_)
    asked = re.search(r"(?<=ried to allocate )[\d.]+ \w+", text)
    return MemoryError(
        f"out of memory with batch_size={cfg.batch_size} and model={model}"
        + (f" (asked for {asked[0]})" if asked else "")
        + f": try {', '.join([*hints, 'a smaller batch_size'])} or a smaller model"
    )


def one_line(error: Exception) -> str:
    """The error's message on one line, with the choices where an option of a group is unknown."""
    from rst.experiments.settings import KNOWN, unknown_setting

    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"unknown {group} '{option}': choose from {', '.join(sorted(error.options))}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: add {error.full_key}=VALUE"
    error = _origin(error)
    message = " ".join(str(error).split())
    if isinstance(error, OverrideParseException):
        cause = message.partition(" See http")[0].removeprefix(f"Error parsing override '{error.override}' ")
        return f"cannot read the argument {error.override!r}, which should be KEY=VALUE ({cause})"
    if isinstance(error, YAMLError):
        return f"a configuration file is not valid YAML: {message}"
    if message.startswith("Config group override must be"):
        return "a group must be one of its options, as in method=sam: python train.py --list shows them"
    unknown = re.match(r"Could not override '(\w+)'\. To append", message)
    if unknown and unknown[1] not in KNOWN:
        return unknown_setting(unknown[1])
    # Ours and Hydra's messages speak for themselves; what nobody foresaw needs its type.
    known = isinstance(error, ValueError | OSError | FloatingPointError | MemoryError | HydraException)
    return message if known else f"{type(error).__name__}: {message}"
