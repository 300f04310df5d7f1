"""Where a run's metrics go besides its own folder's files: Weights & Biases, TensorBoard, or nowhere."""

import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

# What one compares at equal cost: W&B draws these over propagations too.
HEADLINE = ("test_error_percent", "test_accuracy", "test_loss", "train_loss")


class Tracker:
    """A sink for the metrics of one run, used as a with-block; a subclass fills in the four hooks.

    It cannot harm the run: the first exception in a hook becomes one warning, and nothing more is logged from
    then on. `group` is shared by runs of one kind, `job_type` is the method. `config` and what is logged are
    plain data (dict, list, str, number, None).
    """

    def __init__(
        self,
        *,
        run_name: str,
        group: str,
        job_type: str | None = None,
        tags: Sequence[str],
        folder: Path,
        config: Mapping[str, Any],
    ) -> None:
        self.run_name = run_name
        self.group = group
        self.job_type = job_type
        self.tags = list(tags)
        self.folder = Path(folder).resolve()
        self.config = dict(config)
        self._failed = False

    def __enter__(self) -> Self:
        self._attempt(self._start)
        return self

    def log(self, row: Mapping[str, Any]) -> None:
        """Log one epoch: its number as `epoch`, `propagations` so far, and any metrics."""
        if not self._failed:
            self._attempt(self._log, dict(row))

    def summary(self, result: Mapping[str, Any]) -> None:
        """Log the result of the whole run."""
        if not self._failed:
            self._attempt(self._summary, dict(result))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attempt(self._finish, kind is None)

    def _attempt(self, hook: Callable[..., None], *args: Any) -> None:
        try:
            hook(*args)
        except Exception as error:  # a run of hours must not end for whatever a logging service may raise
            if not self._failed:
                cause = (str(error).splitlines() or [""])[0]
                logger.warning(
                    "%s stopped logging, the run goes on: %s: %s",
                    type(self).__name__,
                    type(error).__name__,
                    cause,
                )
            self._failed = True

    def _start(self) -> None: ...

    def _log(self, row: dict[str, Any]) -> None: ...

    def _summary(self, result: dict[str, Any]) -> None: ...

    def _finish(self, completed: bool) -> None: ...


class NoTracker(Tracker):
    """Logs nothing."""


class Wandb(Tracker):
    """A Weights & Biases run, its files in the run's folder.

    Every metric is drawn over `epoch`. W&B has one axis a metric, so those of `HEADLINE` are logged a second
    time, as `by_propagations/…`, and drawn over `propagations`. The summary is the result with what a table
    derives from it, under the table's names: test errors in percent, and η, the propagations a step, measured
    and expected. `run_group` replaces the run's own group: a table has one for all of its runs.
    `mode` is online, offline, disabled or auto: what WANDB_MODE says, else online where W&B has a key
    and offline where it has none; it never asks for one. An interrupted run that is resumed online continues
    its W&B run; offline, W&B starts another run of the same name. `init_timeout` and `finish_timeout`, in
    seconds, bound how long an unreachable server can hold the run up.

    Raises:
        ValueError: unknown mode, given or in WANDB_MODE.
    """

    def __init__(
        self,
        *,
        project: str = "rst",
        entity: str | None = None,
        run_group: str | None = None,
        mode: str = "auto",
        init_timeout: float = 30,
        finish_timeout: float = 60,
        **run: Any,
    ) -> None:
        super().__init__(**run)
        modes = ("auto", "online", "offline", "disabled")
        if mode not in modes:
            raise ValueError(f"W&B's mode is one of {', '.join(modes)}, got {mode!r}")
        named = os.environ.get("WANDB_MODE", "auto")
        if mode == "auto" and named not in (*modes, "shared", "dryrun", "run"):
            raise ValueError(f"WANDB_MODE must be online, offline or disabled, got {named!r}")
        self.project = project
        self.entity = entity
        self.group = run_group or self.group
        self.mode = mode
        self.init_timeout = init_timeout
        self.finish_timeout = finish_timeout
        self._run: Any = None

    def _start(self) -> None:
        self._open()
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")
        for name in HEADLINE:  # in the summary they stand under their own names
            self._run.define_metric(f"by_propagations/{name}", step_metric="propagations", summary="none")

    def _open(self) -> None:
        import wandb

        # Before anything else of W&B's, which announces each step on the console.
        wandb.setup(wandb.Settings(silent=True))
        mode = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
        if mode in ("auto", "online"):
            has_key = wandb.login(prompt=False, verify=False)
            if mode == "online" and not has_key:
                raise ValueError("mode=online needs a key: run `wandb login`, or take mode=auto")
            mode = "online" if has_key else "offline"
        online = mode == "online"
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.run_name,
            group=self.group,
            job_type=self.job_type,
            tags=self.tags,
            config=self.config,
            dir=self.folder,
            mode=mode,  # type: ignore[arg-type]
            # Always given, or WANDB_RUN_ID would merge a sweep's runs. Offline, a run's parts differ in it:
            # under one id they would overwrite each other when they are synced.
            id=self._id() if online else _new_id(),
            resume="allow" if online else None,
            # In a sweep's process, a run left open would otherwise receive the next one's metrics.
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=self.init_timeout,
                finish_timeout=self.finish_timeout,
            ),
        )
        if online:
            logger.info("W&B run %s", self._run.url)

    def _id(self) -> str:
        """The W&B run's id, kept in the folder: the run's name would not do, for a run repeated under it,
        here or by a colleague, would be appended to the first."""
        file = self.folder / "wandb" / "id"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_new_id())
        return file.read_text()

    def _log(self, row: dict[str, Any]) -> None:
        if "test_accuracy" in row:
            row["test_error_percent"] = _error_percent(row["test_accuracy"])
        row |= {f"by_propagations/{name}": row[name] for name in HEADLINE if name in row}
        self._run.log(row)  # without step=: a resumed run repeats epochs, and W&B drops steps that go back

    def _summary(self, result: dict[str, Any]) -> None:
        derived = {
            "test_error_percent": _error_percent(result["test_accuracy"]),
            "best_epoch_error_percent": _error_percent(result["best_test_accuracy"]),
            "eta": result["propagations"] / result["steps"],
            "eta_expected": result["expected_propagations"] / result["steps"],
        }
        self._run.summary.update(result | derived)

    def _finish(self, completed: bool) -> None:
        # Not W&B's own with-block, which prints the traceback of a failed run.
        if self._run is not None:
            self._run.finish(exit_code=0 if completed else 1)


class WandbTable(Wandb):
    """The W&B run of a finished table: its files, and no metrics."""

    def __init__(self, files: Sequence[Path], **run: Any) -> None:
        super().__init__(**run)
        self.files = list(files)

    def _start(self) -> None:
        import pandas as pd
        import wandb

        self._open()
        artifact = wandb.Artifact(self.run_name, type="table")
        for file in self.files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)
        for file in self.files:
            if file.suffix == ".png":
                self._run.log({f"figure/{file.stem}": wandb.Image(str(file))})
            elif file.suffix == ".csv":
                frame = pd.read_csv(file)
                # W&B would write an empty cell as NaN, which is not JSON.
                frame = frame.astype(object).where(frame.notna(), None)
                self._run.log({f"table/{file.stem}": wandb.Table(dataframe=frame)})

    def _finish(self, completed: bool) -> None:
        super()._finish(completed and not self._failed)


def log_table(files: Sequence[Path], *, name: str, group: str, folder: Path, **settings: Any) -> None:
    """Log a finished table to Weights & Biases, as a run of job type `table` beside the table's own runs.

    It holds the files as one artifact of type `table`; PNGs are logged as images too, CSVs as W&B tables. As
    with a tracker, a failure is one warning.

    Args:
        name: of the W&B run and of the artifact; letters, digits, `-`, `_` and `.`.
        group: that of the table's runs.
        folder: for W&B's files, another for each table: logged again from there online, a table continues its
            W&B run, and its artifact gets a new version.
        settings: `Wandb`'s project, entity, mode and timeouts.
    """
    try:
        table = WandbTable(
            files, run_name=name, group=group, job_type="table", tags=[], folder=folder, config={}, **settings
        )
    except ValueError as error:  # the runs would have raised it, but all of them may be complete
        logger.warning("the table is not logged: %s", error)
        return
    with table:
        pass


class TensorBoard(Tracker):
    """TensorBoard event files in the run's folder: a scalar a metric over `epoch`; config and result as text.

    Raises:
        ValueError: the tensorboard package is not installed.
    """

    def __init__(self, **run: Any) -> None:
        super().__init__(**run)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tracker=tensorboard needs the tensorboard package: pip install -e '.[tensorboard]'"
            ) from error
        self._writer_class = SummaryWriter
        self._writer: Any = None

    def _log(self, row: dict[str, Any]) -> None:
        epoch = row["epoch"]
        if self._writer is None:
            # Opened at the first row: purge_step hides what an interrupted run had logged of the epochs from
            # this one on, which are now repeated.
            self._writer = self._writer_class(str(self.folder / "tensorboard"), purge_step=epoch)
            self._writer.add_text("config", _as_markdown(self.config), epoch)
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def _summary(self, result: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.add_text("result", _as_markdown(result), 0)

    def _finish(self, completed: bool) -> None:
        if self._writer is not None:
            self._writer.close()


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


def _error_percent(accuracy: float) -> float:
    return 100 * (1 - accuracy)


def _as_markdown(data: Mapping[str, Any]) -> str:
    return f"```\n{json.dumps(data, indent=2, default=str)}\n```"
