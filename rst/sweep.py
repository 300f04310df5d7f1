"""A Hydra sweeper for jobs that are a list, not a grid: the rows of a table, all in one batch."""

import json
from collections.abc import Sequence
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Cells(Sweeper):
    """Hands each job of `file` (JSON: a list of lists of overrides) to the launcher.

    A job that fails lets the others run; the first failure is raised when all have ended.
    """

    launcher: Launcher

    def __init__(self, file: str) -> None:
        self.file = file

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        cells = json.loads(Path(self.file).read_text())
        returns = self.launcher.launch([[*arguments, *cell] for cell in cells], initial_job_idx=0)
        for job in returns:
            _ = job.return_value  # raises what the job raised
        return returns
