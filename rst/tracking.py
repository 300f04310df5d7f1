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


class Tracker:
    """A sink for the metrics of one run, used as a with-block; a subclass fills in the four hooks.

    It cannot harm the run: the first exception in a hook becomes one warning, and nothing more is logged from
    then on. `config` and what is logged are plain data (dict, list, str, number, None).
    """

    def __init__(
        self, *, run_name: str, group: str, tags: Sequence[str], folder: Path, config: Mapping[str, Any]
    ) -> None:
        self.run_name = run_name
        self.group = group
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
    """A Weights & Biases run, its files in the run's folder; every metric is drawn over `epoch`.

    `mode` is online, offline, disabled or auto: what WANDB_MODE says, else online where W&B has a key
    and offline where it has none; it never asks for one. An interrupted run that is resumed online continues
    its W&B run; offline, W&B starts another run of the same name. `init_timeout` and `finish_timeout`, in
    seconds, bound how long an unreachable server can hold the run up.

    Raises:
        ValueError: unknown mode.
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
        self.project = project
        self.entity = entity
        self.group = run_group or self.group
        self.mode = mode
        self.init_timeout = init_timeout
        self.finish_timeout = finish_timeout
        self._run: Any = None

    def _start(self) -> None:
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
            tags=self.tags,
            config=self.config,
            dir=self.folder,
            mode=mode,  # type: ignore[arg-type]
            # Two offline parts under one id would overwrite each other when they are synced.
            id=self._id() if online else None,
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
        # W&B has one axis a metric. `propagations` is in every row, so that a workspace can be set to it.
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")
        if online:
            logger.info("W&B run %s", self._run.url)

    def _id(self) -> str:
        """The W&B run's id, kept in the folder: the run's name would not do, for a run repeated under it,
        here or by a colleague, would be appended to the first."""
        file = self.folder / "wandb" / "id"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(uuid.uuid4().hex[:8])
        return file.read_text()

    def _log(self, row: dict[str, Any]) -> None:
        self._run.log(row)  # without step=: a resumed run repeats epochs, and W&B drops steps that go back

    def _summary(self, result: dict[str, Any]) -> None:
        self._run.summary.update(result)

    def _finish(self, completed: bool) -> None:
        # Not W&B's own with-block, which prints the traceback of a failed run.
        if self._run is not None:
            self._run.finish(exit_code=0 if completed else 1)


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


def _as_markdown(data: Mapping[str, Any]) -> str:
    return f"```\n{json.dumps(data, indent=2, default=str)}\n```"
