"""Where a run's metrics go besides the files in its folder: Weights & Biases, TensorBoard, or nowhere."""

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Tracker:
    """Logs the metrics of one run, used as a with-block. Subclasses implement the four hooks.

    Logging never ends a run: the first exception in a hook becomes a warning, and nothing more is logged.
    """

    run_name: str
    group: str  # shared by runs of one kind
    job_type: str | None = None  # the method
    tags: Sequence[str] = ()
    folder: Path  # the run's
    config: Mapping[str, Any] = field(default_factory=dict)  # plain data: dict, list, str, number, None
    _failed: bool = field(default=False, init=False)

    def __enter__(self) -> Self:
        self._attempt(self._start)
        return self

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one epoch: its number as `epoch`, the `propagations` so far, and any metrics."""
        if not self._failed:
            self._attempt(self._log, dict(row))

    def summary(self, result: Mapping[str, Any]) -> None:
        """Log the result of the whole run."""
        if not self._failed:
            self._attempt(self._summary, dict(result))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attempt(self._finish, kind is None and not self._failed)

    def _attempt(self, hook: Callable[..., None], *args: Any) -> None:
        try:
            hook(*args)
        except Exception as error:  # whatever a logging service may raise
            if not self._failed:
                cause = f"{type(error).__name__}: {error}".splitlines()[0]
                logger.warning("%s stopped logging, the run goes on: %s", type(self).__name__, cause)
            self._failed = True

    def _start(self) -> None: ...

    def _log(self, row: dict[str, Any]) -> None: ...

    def _summary(self, result: dict[str, Any]) -> None: ...

    def _finish(self, succeeded: bool) -> None: ...


class NoTracker(Tracker):
    """Logs nothing."""


@dataclass(kw_only=True)
class Wandb(Tracker):
    """A Weights & Biases run whose local files are in the run's folder.

    All metrics have `epoch` as their x-axis; choose `propagations` in a panel to compare at equal cost. The
    summary adds to the run's result its test errors in percent and η, the propagations per step, measured and
    expected. A run that is resumed online continues its W&B run; offline it starts another of the same name.

    Raises:
        ValueError: unknown mode.
    """

    project: str = "rst"
    entity: str | None = None
    run_group: str | None = None  # replaces the run's group; a table has one for all of its runs
    mode: str = (
        "auto"  # WANDB_MODE if set, else online or offline: whether W&B has a key. It never asks for one
    )
    init_timeout: float = 30  # seconds that an unreachable server can hold up the run
    finish_timeout: float = 60  # seconds
    _run: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        modes = ("auto", "online", "offline", "disabled")
        if self.mode not in modes:
            raise ValueError(f"W&B's mode is one of {', '.join(modes)}, got {self.mode!r}")

    def _start(self) -> None:
        import wandb

        timeouts: Any = {"init_timeout": self.init_timeout, "finish_timeout": self.finish_timeout}
        settings = wandb.Settings(silent=True, console="off", **timeouts)
        wandb.setup(settings)  # or `login` would print
        mode: Any = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
        if mode in ("auto", "online"):
            has_key = wandb.login(prompt=False, verify=False)
            if mode == "online" and not has_key:
                raise ValueError("mode=online needs a key: run `wandb login`, or use mode=auto")
            mode = "online" if has_key else "offline"
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.run_name,
            group=self.run_group or self.group,
            job_type=self.job_type,
            tags=self.tags,
            config=dict(self.config),
            dir=self.folder,
            mode=mode,
            # Always given, or WANDB_RUN_ID would merge the runs of a sweep. Offline, a resumed run needs a
            # new one, or syncing it would overwrite the first part.
            id=self._saved_id() if mode == "online" else _new_id(),
            resume="allow" if mode == "online" else None,
            # A run left open in a sweep's process would otherwise receive the next run's metrics.
            reinit="finish_previous",
            settings=settings,
        )
        self._run.define_metric("*", step_metric="epoch")
        if mode == "online":
            logger.info("W&B run %s", self._run.url)

    def _saved_id(self) -> str:
        """The W&B run's id, saved in the folder. The run's name would not do: somebody else's run of the same
        configuration has it, too."""
        file = self.folder / "wandb" / "id"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_new_id())
        return file.read_text()

    def _log(self, row: dict[str, Any]) -> None:
        if "test_accuracy" in row:
            row["test_error_percent"] = 100 * (1 - row["test_accuracy"])
        self._run.log(row)  # without step=: a resumed run repeats epochs, and W&B drops steps that go back

    def _summary(self, result: dict[str, Any]) -> None:
        result["test_error_percent"] = 100 * (1 - result["test_accuracy"])
        result["best_epoch_error_percent"] = 100 * (1 - result["best_test_accuracy"])
        result["eta"] = result["propagations"] / result["steps"]
        if result["expected_propagations"] is not None:
            result["eta_expected"] = result["expected_propagations"] / result["steps"]
        self._run.summary.update(result)

    def _log_files(self, files: Sequence[Path]) -> None:
        import pandas as pd
        import wandb

        artifact = wandb.Artifact(self.run_name, type="table")
        top = os.path.commonpath([file.parent for file in files])
        names = {
            file: file.relative_to(top).as_posix() for file in files
        }  # columns have folders of their own
        for file, name in names.items():
            artifact.add_file(str(file), name=name)
        self._run.log_artifact(artifact)
        for file, name in names.items():
            if file.suffix == ".png":
                self._run.log({f"figure/{name.removesuffix('.png')}": wandb.Image(str(file))})
            elif file.suffix == ".csv":
                frame = pd.read_csv(file).astype(object)
                frame = frame.where(frame.notna(), None)  # W&B would write NaN, which is not JSON
                self._run.log({f"table/{name.removesuffix('.csv')}": wandb.Table(dataframe=frame)})

    def _finish(self, succeeded: bool) -> None:
        # W&B's with-block would print the traceback of a failed run.
        if self._run is not None:
            self._run.finish(exit_code=0 if succeeded else 1)


def log_table(files: Sequence[Path], *, name: str, group: str, folder: Path, **settings: Any) -> None:
    """Log a finished table to Weights & Biases: a run of job type `table` in the group of the table's runs.

    The files are one artifact of type `table`; PNGs are logged as images, too, and CSVs as W&B tables. Logged
    again online from the same folder, the artifact gets a new version.

    Args:
        name: of the W&B run and the artifact; letters, digits, `-`, `_` and `.`.
        folder: for W&B's local files; a different one for each table.
        settings: `Wandb`'s project, entity, mode and timeouts.
    """
    with Wandb(run_name=name, group=group, job_type="table", folder=folder, **settings) as tracker:
        tracker._attempt(tracker._log_files, files)


@dataclass(kw_only=True)
class TensorBoard(Tracker):
    """TensorBoard event files in the run's folder: a scalar for each metric over `epoch`.

    Raises:
        ValueError: the tensorboard package is not installed.
    """

    _writer: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "tracker=tensorboard needs the tensorboard package: pip install -e '.[tensorboard]'"
            ) from error

    def _log(self, row: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        epoch = row.pop("epoch")
        # purge_step hides what an interrupted run had logged of this and later epochs.
        self._writer = self._writer or SummaryWriter(str(self.folder / "tensorboard"), purge_step=epoch)
        for name, value in row.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def _finish(self, succeeded: bool) -> None:
        if self._writer is not None:
            self._writer.close()


def _new_id() -> str:
    return uuid.uuid4().hex[:8]
