"""Runs of a table as one batch of a Hydra launcher: joblib, submitit, ray, or basic, one after the other."""

import multiprocessing
import threading
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import HydraContext
from omegaconf import DictConfig
from tqdm import tqdm

from rst.experiments.command_line import describe, end_with_parent, explained, one_line
from rst.training.run import RunBusyError

# What launchers raise when a process of theirs was killed, besides BrokenExecutor: submitit and ray.
DEATHS = {"UncompletedJobError", "FailedJobError", "WorkerCrashedError", "RayActorError"}


class Launcher:
    """Hydra's launcher `name`, with settings such as "hydra.launcher.partition=gpu". To be made and used
    within `hydra.initialize_config_dir`."""

    def __init__(self, name: str, settings: Sequence[str]) -> None:
        logging = ["hydra/hydra_logging=none", "hydra.job_logging.root.level=WARNING"]
        overrides = ["hydra.mode=MULTIRUN", f"hydra/launcher={name}", *logging, *settings]
        self.config = compose("train", overrides, return_hydra_config=True)

    def run(self, batch: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """Run jobs, each given by its overrides, until the last one has ended."""
        # A sweeper of Hydra's starts its jobs in the same way, but takes a grid. Its callbacks are of a class
        # that is not public; the public one has the same methods, which do nothing.
        callbacks: Any = Callback()
        context = HydraContext(GlobalHydra.instance().config_loader(), callbacks)
        launcher = Plugins.instance().instantiate_launcher(context, job, self.config)
        return launcher.launch([list(overrides) for overrides in batch], initial_job_idx=0)


def job(cfg: DictConfig) -> bool:
    """One run, in a process of the launcher. A failure is left in the run's folder, for the driver to find at
    once. Returns whether the run was left alone, as another process is working on it."""
    from rst.training.fit import train  # here, as its imports take seconds

    if multiprocessing.current_process().name != "MainProcess":
        end_with_parent()
        tqdm.set_lock(threading.RLock())  # its own is reported as leaked when joblib kills its processes
    run = describe(cfg, HydraConfig.get())
    try:
        if run.result(warn=False) is None:  # it may have been completed since the batch was launched
            train(run, in_sweep=True)
    except RunBusyError:
        return True
    except Exception as error:
        run.fail(one_line(explained(error, cfg)))
    return False


def is_death(error: Exception) -> bool:
    """Whether a launcher raises this because a process was killed, rather than for a fault of its own."""
    return isinstance(error, BrokenExecutor) or type(error).__name__ in DEATHS
