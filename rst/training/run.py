"""What a run is called, where its files lie, and what is written into them."""

import json
import logging
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from rst import __version__
from rst.files import remove_temporary, write_text
from rst.training import distributed
from rst.training.device import release_memory
from rst.training.identity import identity

log = logging.getLogger(__name__)

SCHEMA = 1
LONGEST_NAME = 200  # characters before the id; file systems allow 255 bytes
_CLEAR_REFS = Path("/proc/self/clear_refs")


class RunBusyError(OSError):
    """Another process is at this run."""


@dataclass(frozen=True)
class Run:
    """A run's files: `config.yaml`, `metrics.jsonl` (a line an epoch), `checkpoint.pt` and `result.json`.

    The last is written at the end, atomically: its presence is completion.

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

    @property
    def id(self) -> str:
        return identity(self.config)

    @property
    def without_seed(self) -> str:
        """`id` of all the runs that differ in nothing but their seed."""
        return identity({key: value for key, value in self.config.items() if key != "seed"})

    @property
    def labels(self) -> list[str]:
        """What the run is, in words: data set, model, augmentation, method, schedule."""
        timm_model = {"model": self.config["model"]["name"]} if self.choices["model"] == "timm" else {}
        chosen = self.choices | timm_model
        return [chosen[group] for group in ("dataset", "model", "augment", "method", "schedule")]

    @property
    def name(self) -> str:
        """`dataset-model-augment-method-schedule-s<seed>-<id>`, safe as a folder's name: cut before the id
        where it would be too long."""
        text = "-".join([*self.labels, f"s{self.config['seed']}"])
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip(".")[:LONGEST_NAME] + f"-{self.id}"

    @property
    def folder(self) -> Path:
        return self.outputs / self.name

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def result(self, warn: bool = True) -> dict[str, Any] | None:
        """The result of a completed run, else None: also where `result.json` is damaged, of another schema
        version or of another run, which is left as it is, with a warning."""
        path = self.folder / "result.json"
        if not path.exists():
            return None
        try:
            result = json.loads(path.read_text())
            if result["schema"] != SCHEMA:
                reason = f"is of schema version {result['schema']}, not {SCHEMA}"
            elif result["id"] != self.id:
                reason = f"is of a run with another configuration ({result['id']}, not {self.id})"
            else:
                return result
        except (ValueError, KeyError, TypeError) as error:
            reason = f"is damaged ({error})"
        if warn:
            log.warning("%s %s: the run counts as not complete", path, reason)
        return None

    def failure(self) -> str | None:
        """Why the run failed last, where it has neither completed nor been taken up since."""
        try:
            return json.loads((self.folder / "failed.json").read_text())["error"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def fail(self, reason: str) -> None:
        """Record why the run failed, until it is taken up again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({"error": reason, "command": self.command, "finished": when}, indent=1)
        write_text(self.folder / "failed.json", text)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run's folder, made first, so that one process at a time runs it. Held by a process that
        died, it is free.

        Raises:
            RunBusyError: another process holds it.
            PermissionError: the folder cannot be made.
        """
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                # A moment's patience, as `is_locked` takes it for an instant.
                stack.enter_context(FileLock(self.folder / ".lock").acquire(timeout=0.5, poll_interval=0.02))
            except Timeout:
                raise RunBusyError(f"{self.folder} is being run by {self._holder()}") from None
            except OSError as error:
                raise PermissionError(
                    f"cannot write to outputs={self.outputs} ({error.strerror}); choose another folder"
                ) from error
            (self.folder / ".holder").write_text(f"process {os.getpid()} on {socket.gethostname()}")
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
        """Whether a process took the run up after `moment`, in seconds since 1970."""
        holder = self.folder / ".holder"
        return holder.exists() and holder.stat().st_mtime >= moment - 1  # file systems round

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`, none where there is no such file."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def sharpness(self) -> dict[str, Any] | None:
        """What scripts/sharpness.py measured of this run."""
        path = self.folder / "sharpness.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("id") == self.id else None

    def _holder(self) -> str:
        try:
            return (self.folder / ".holder").read_text()
        except OSError:
            return "another process"

    def open(self, metrics: list[dict[str, Any]]) -> None:
        """Begin or go on: write the configuration, and the metrics of the epochs that a checkpoint covers."""
        remove_temporary(self.folder)
        (self.folder / "failed.json").unlink(missing_ok=True)
        config = OmegaConf.to_yaml(OmegaConf.create(self.config))
        write_text(self.folder / "config.yaml", config)
        lines = "".join(json.dumps(row) + "\n" for row in metrics)
        write_text(self.folder / "metrics.jsonl", lines)

    def append(self, metrics: dict[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def complete(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Write `result.json`: the figures with the run's identity. Returns it."""
        result = {
            "schema": SCHEMA,
            "id": self.id,
            "name": self.name,
            "command": self.command,
            "choices": self.choices,
            "seed": self.config["seed"],
            **figures,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        text = json.dumps(result, indent=1, allow_nan=False)
        path = self.folder / "result.json"
        if path.exists():  # one that cannot be read: see `result`
            os.replace(path, path.with_suffix(".json.old"))
        write_text(path, text)
        return result


def summarize(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's figures from its epochs' metrics: the last epoch's, the best test accuracy, summed seconds."""
    last = metrics[-1]
    evaluated = [row for row in metrics if "test_accuracy" in row]
    best = max(evaluated, key=lambda row: row["test_accuracy"])  # the earliest of the best
    kept = (
        "steps",
        "sam_steps",
        "propagations",
        "skipped_steps",
        "test_accuracy",
        "test_loss",
        "train_accuracy",
        "train_loss",
    )
    parts = ("train", "evaluate", "data")
    seconds = {part: sum(row.get(f"seconds_{part}", 0.0) for row in metrics) for part in parts}
    seconds["total"] = sum(seconds.values())
    return {
        "epochs": last["epoch"],
        **{key: last[key] for key in kept},
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "seconds": seconds,
        "images_per_second": sum(row["images"] for row in metrics) / (seconds["train"] + seconds["data"]),
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """With what a result is made: versions, commit, host, device.

    The commit is looked up once in a process, to be asked for at its start: the checkout may change later.
    """
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # of a class that a checkpoint could not hold
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
            "rst": __version__,
        },
        **_commit(),
        "host": socket.gethostname(),
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "ranks": str(distributed.ranks()),
    }


def combined(made: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run's parts, from one interruption to the next: the last one's provenance with all commits and all
    numbers of ranks, each once, in order."""

    def every(key: str) -> str | None:
        return "+".join(dict.fromkeys(part[key] for part in made if part[key])) or None

    return {**made[-1], "commit": every("commit"), "ranks": every("ranks")}


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory_bytes` anew: runs of a sweep share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        release_memory()
        _CLEAR_REFS.write_text("5")  # Linux: sets the process's VmHWM to what it holds now


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory held since `reset_peak_memory`: by PyTorch on a CUDA device, by the whole process on
    the CPU under Linux, elsewhere None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _CLEAR_REFS.exists():
        return None
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) * 1024


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{models[0] if models else platform.machine()} ({os.cpu_count()} cores)"


@cache
def _commit() -> dict[str, Any]:
    """The checkout's commit, and whether tracked files outside `results/` differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        status = git("status", "--porcelain", "--untracked-files=no", "--", top, f":!{top}/results")
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(status)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
