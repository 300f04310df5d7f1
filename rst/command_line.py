"""Errors on the command line: one line with the cause and the fix, exit code 1, no traceback."""

import logging
import os
import sys
from collections.abc import Callable
from functools import wraps

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

log = logging.getLogger(__name__)
_failures: list[Exception] = []


def task(function: Callable[[DictConfig], object]) -> Callable[[DictConfig], None]:
    """A Hydra task whose error is reported once, by `launch`.

    A job of a sweep logs its own line and re-raises, as Hydra reports only the first job's failure. Outside a
    sweep raising would make Hydra print a line of its own.
    """

    @wraps(function)
    def wrapped(cfg: DictConfig) -> None:
        try:
            function(cfg)
        except Exception as error:
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                log.error("error in %s: %s", " ".join(HydraConfig.get().overrides.task), one_line(error))
                raise
            _failures.append(error)

    return wrapped


def launch(main: Callable[[], None]) -> None:
    """Run a `hydra.main` function and end the process as a command should."""
    full_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    _failures.clear()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors rather than print them over lines
    try:
        main()
        if _failures:
            raise _failures[0]
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if full_traceback:
            raise
        sys.exit(f"error: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """The error's message on one line, with the choices where an option of a group is unknown."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"unknown {group} '{option}': choose from {', '.join(sorted(error.options))}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: add {error.full_key}=VALUE"
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    message = " ".join(str(error).split())
    # Ours and Hydra's messages speak for themselves; what nobody foresaw needs its type.
    known = isinstance(error, ValueError | OSError | FloatingPointError | HydraException)
    return message if known else f"{type(error).__name__}: {message}"
