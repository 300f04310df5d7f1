"""From the command line to a run, and from an error to one line on stderr and exit code 1."""

import logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rst.experiments.choices import check

if TYPE_CHECKING:
    from rst.training.run import Run

# PyTorch takes over a second to import, and `python train.py --help` does without: modules that need it are
# imported where they are used.

log = logging.getLogger(__name__)


def describe(cfg: DictConfig, hydra_cfg: HydraConf) -> "Run":
    """The run of a composed configuration, given without and with Hydra's own part of it.

    Raises:
        ValueError: a setting is wrong, as far as that shows without data.
    """
    from rst.training.run import Run

    chosen = hydra_cfg.runtime.choices.items()
    choices = {str(group): str(name) for group, name in chosen if not str(group).startswith("hydra/")}
    command = shlex.join(["python", "train.py", *hydra_cfg.overrides.task])
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    settings = check(config, choices)
    rho = config["method"].get("rho", config["rho"])
    if rho != config["rho"] and any(text.startswith("rho=") for text in hydra_cfg.overrides.task):
        warnings.warn(f"method={choices['method']} takes method.rho={rho}, not rho", stacklevel=2)
    run = Run(Path(settings.outputs), config, choices, command)
    if run.result(warn=False) is None:  # else the imports of a second or two would be for nothing
        from rst.training.parts import rehearse

        rehearse(settings)
    return run


def task(function: Callable[[DictConfig], object]) -> Callable[[DictConfig], None]:
    """A Hydra task that ends the process with a one-line error. In a sweep, whose first error alone Hydra
    reports, each job logs its own instead."""

    @wraps(function)
    def wrapped(cfg: DictConfig) -> None:
        end_with_parent()
        from rst.training import distributed

        if not distributed.is_first():
            logging.disable(logging.WARNING)  # the first rank speaks for all
        try:
            function(cfg)
        except Exception as error:
            reason = explained(error, cfg)
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                log.error("error in %s: %s", " ".join(HydraConfig.get().overrides.task), one_line(reason))
                raise reason from None  # a cause would be lost between processes
            # Not an Exception, for which Hydra would print a line of its own.
            raise SystemExit(f"error: {one_line(reason)}") from error

    return wrapped


@cache
def end_with_parent() -> None:
    """End a process of a launcher's when the one that started it is gone, even if it was before this call:
    joblib's would outlive a killed driver, and keep their memory, for minutes. The run has half a minute to
    finish its step and save."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == parent.pid:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def launch(main: Callable[[], None]) -> None:
    """Run a script's main function, and end the process with a one-line error, if any; with its traceback if
    HYDRA_FULL_ERROR=1 is in the environment."""
    full_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors rather than print them
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as end:
        if full_traceback and end.__cause__ is not None:
            raise end.__cause__  # noqa: B904  # `from` would take its own cause away
        raise
    except Exception as error:
        if full_traceback:
            raise
        sys.exit(f"error: {one_line(error)}")


def explained(error: Exception, cfg: DictConfig) -> Exception:
    """The error itself or, if memory ran out, one that says what to do about it."""
    from torch import OutOfMemoryError

    # On a CPU, PyTorch raises a RuntimeError.
    if not isinstance(error, MemoryError | OutOfMemoryError) and "can't allocate memory" not in str(error):
        return error
    larger = range(cfg.grad_accumulation + 1, cfg.batch_size + 1)
    hints = [f"grad_accumulation={n}" for n in larger if cfg.batch_size % n == 0][:1]
    hints += ["precision=bf16"] if cfg.precision == "fp32" else []
    model = cfg.model.get("name", cfg.model._target_)
    return MemoryError(
        f"out of memory with batch_size={cfg.batch_size} and model={model}: "
        f"try {', '.join([*hints, 'a smaller batch_size'])} or a smaller model"
    )


def one_line(error: Exception) -> str:
    """The error's message on one line, with its type unless it is of a kind that is raised for users."""
    if isinstance(error, MissingConfigException) and error.options:  # Hydra's own message takes 30 lines
        return f"unknown option {error.missing_cfg_file}: choose from {', '.join(sorted(error.options))}"
    message = " ".join(str(error).split())
    # Hydra's advice, +KEY=VALUE, helps with options of a group alone.
    if misspelt := re.match(r"Could not override '(\w+)'\. ", message):
        return f"{misspelt[1]}: unknown, --help lists what can be set"
    for_users = (
        ValueError | OSError | FloatingPointError | MemoryError | HydraException | OmegaConfBaseException
    )
    return message if isinstance(error, for_users) else f"{type(error).__name__}: {message}"
