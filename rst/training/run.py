"""A run: what it is called, and the files in its folder."""

import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from rst.files import remove_temporary, write_text
from rst.training.identity import identity
from rst.training.settings import Settings, read_settings

log = logging.getLogger(__name__)

SCHEMA = 1
LONGEST_NAME = 200  # characters before the id; file systems allow 255 bytes


class RunBusyError(OSError):
    """Another process is running this run."""


@dataclass(frozen=True)
class Run:
    """A run, whose folder holds config.yaml, metrics.jsonl (a line per epoch), checkpoint.pt and result.json.

    result.json is written last, atomically: when it is there, the run is complete.

    Args:
        outputs: the folder of run folders.
        config: the resolved configuration, as plain containers.
        choices: the option chosen in each configuration group.
        command: the command line that repeats the run.
    """

    outputs: Path
    config: dict[str, Any]
    choices: dict[str, str]
    command: str

    @cached_property
    def settings(self) -> Settings:
        return read_settings(self.config)

    @cached_property
    def id(self) -> str:
        return identity(self.config)

    @property
    def split(self) -> str:
        """What the error is measured on, "test" or "validation" images, whatever its key says."""
        return "validation" if self.config["dataset"].get("validation") else "test"

    @property
    def labels(self) -> list[str]:
        """Data set, model, augmentation, method and schedule."""
        model = self.config["model"]["name"] if self.choices["model"] == "timm" else self.choices["model"]
        chosen = self.choices | {"model": model}
        return [chosen[group] for group in ("dataset", "model", "augment", "method", "schedule")]

    @property
    def name(self) -> str:
        """`dataset-model-augment-method-schedule-s<seed>-<id>`, made safe as a folder's name, the part before
        the id cut to a length that every file system allows."""
        text = "-".join([*self.labels, f"s{self.config['seed']}"])
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip(".")[:LONGEST_NAME] + f"-{self.id}"

    @property
    def folder(self) -> Path:
        return self.outputs / self.name

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def result(self, warn: bool = True) -> dict[str, Any] | None:
        """The result of a complete run, else None. A `result.json` that is damaged, or that another run or
        another version wrote, does not count; it is left as it is, with a warning."""
        path = self.folder / "result.json"
        if not path.exists():
            return None
        try:
            result = json.loads(path.read_text())
            if result["schema"] != SCHEMA:
                reason = f"has schema version {result['schema']}, not {SCHEMA}"
            elif result["id"] != self.id:
                reason = f"belongs to a run with another configuration ({result['id']}, not {self.id})"
            else:
                return result
        except (ValueError, KeyError, TypeError) as error:
            reason = f"is damaged ({error})"
        if warn:
            log.warning("%s %s: the run does not count as complete", path, reason)
        return None

    def failure(self) -> str | None:
        """Why the run failed last, unless it has been started again since."""
        try:
            return json.loads((self.folder / "failed.json").read_text())["error"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def fail(self, reason: str) -> None:
        """Record why the run failed, until it is started again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({"error": reason, "command": self.command, "finished": when}, indent=1)
        write_text(self.folder / "failed.json", text)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the run's folder and hold it, so that one process at a time runs it. A process that dies lets
        go of it.

        Raises:
            RunBusyError: another process holds it.
            OSError: it cannot be written to.
        """
        holder = self.folder / ".holder"
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                # With some patience, as `is_locked` holds it for an instant.
                stack.enter_context(FileLock(self.folder / ".lock").acquire(timeout=0.5, poll_interval=0.02))
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            except Timeout:
                other = holder.read_text() if holder.exists() else "another process"
                raise RunBusyError(f"{self.folder} is being run by {other}") from None
            except OSError as error:
                raise OSError(
                    f"cannot write to outputs={self.outputs} ({error.strerror}); choose another folder"
                ) from error
            yield

    def is_locked(self) -> bool:
        path = self.folder / ".lock"
        if not path.exists():
            return False
        try:
            with FileLock(path).acquire(timeout=0):
                return False
        except Timeout:
            return True

    def begun_since(self, moment: float) -> bool:
        """Whether a process started the run after `moment`, in seconds since 1970."""
        holder = self.folder / ".holder"
        return holder.exists() and holder.stat().st_mtime >= moment - 1  # file systems round

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; none if there is no such file."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def sharpness(self) -> dict[str, Any] | None:
        """What scripts/sharpness.py measured of this run."""
        path = self.folder / "sharpness.json"
        measured = json.loads(path.read_text()) if path.exists() else {}
        return measured if measured.get("id") == self.id else None

    def open(self, metrics: list[dict[str, Any]]) -> None:
        """Start or resume: write the configuration, and the metrics of the epochs up to the checkpoint."""
        remove_temporary(self.folder)
        (self.folder / "failed.json").unlink(missing_ok=True)
        config = OmegaConf.to_yaml(OmegaConf.create(self.config))
        write_text(self.folder / "config.yaml", config)
        lines = "".join(json.dumps(row) + "\n" for row in metrics)
        write_text(self.folder / "metrics.jsonl", lines)

    def append(self, metrics: dict[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def complete(self, measured: dict[str, Any]) -> dict[str, Any]:
        """Write `result.json`, what was measured and which run it is, and return its content."""
        result = {
            "schema": SCHEMA,
            "id": self.id,
            "name": self.name,
            "command": self.command,
            "choices": self.choices,
            "seed": self.config["seed"],
            **measured,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        text = json.dumps(result, indent=1, allow_nan=False)
        path = self.folder / "result.json"
        if path.exists():  # one that cannot be read: see `result`
            os.replace(path, path.with_suffix(".json.old"))
        write_text(path, text)
        return result
