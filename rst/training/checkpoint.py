"""Checkpoints, and when they are written."""

import hashlib
import logging
import shutil
import time
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import PositiveFloat, PositiveInt

from rst.files import temporary_files, write_atomically

log = logging.getLogger(__name__)

SCHEMA = 2
_DIGEST_BYTES = hashlib.sha256().digest_size


def require_space(folder: Path, n_bytes: int) -> None:
    """Raises OSError if the disk of `folder`, which need not exist yet, has no room for that many bytes of
    checkpoints, including those that are there and what a killed process left of one."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    there = [*folder.glob("*.pt"), *temporary_files(folder)]
    free = shutil.disk_usage(existing).free + sum(path.stat().st_size for path in there)
    if free < n_bytes:
        raise OSError(
            f"not enough space in {folder}: {n_bytes / 2**20:.0f} MiB are needed for checkpoints, "
            f"{free / 2**20:.0f} MiB are free; choose another folder with outputs=DIR"
        )


class Every:
    """When a checkpoint is due: at each multiple of `every_steps` and of `every_epochs`, and `every_minutes`
    after the last one; None is never. The end of a run is up to the caller."""

    def __init__(
        self,
        every_steps: PositiveInt | None,
        every_epochs: PositiveInt | None,
        every_minutes: PositiveFloat | None,
    ) -> None:
        self.every_steps, self.every_epochs, self.every_minutes = every_steps, every_epochs, every_minutes
        self._steps, self._time = 0, time.monotonic()

    def is_due(self, steps: int, epochs: int | None) -> bool:
        """Call it after each step and each epoch.

        Args:
            steps: taken so far.
            epochs: completed so far, just after an epoch; else None.
        """
        stepped, self._steps = steps != self._steps, steps
        due = bool(
            (self.every_steps and stepped and steps % self.every_steps == 0)
            or (self.every_epochs and epochs is not None and epochs % self.every_epochs == 0)
            or (self.every_minutes and time.monotonic() - self._time >= 60 * self.every_minutes)
        )
        if due:
            self._time = time.monotonic()
        return due


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_stem(f"{path.stem}-previous")


def save(path: Path, state: dict[str, Any], run_id: str) -> None:
    """Save a checkpoint and keep the one before it. The file is torch.save's, followed by its SHA-256.

    Args:
        state: tensors and plain containers.
        run_id: of the run that it belongs to.
    """
    content = {"schema": SCHEMA, "id": run_id, **state}

    def write(file: IO[bytes]) -> None:
        hashed = _Hashed(file)
        torch.save(content, hashed)  # type: ignore[arg-type]  # it writes and flushes, no more
        file.write(hashed.digest())  # torch.load does not mind

    write_atomically(path, write, keep=previous(path))


class _Hashed:
    """A file that computes the SHA-256 of what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self._hash = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def digest(self) -> bytes:
        return self._hash.digest()


def load(path: Path, run_id: str) -> dict[str, Any] | None:
    """The checkpoint, on the CPU, or None if there is none. Executes no pickled code.

    If it is damaged, or missing after a crash between two renamings, the one before it, with a warning.

    Raises:
        ValueError: neither can be read, or it belongs to another run or another version.
    """
    reasons = []
    for candidate in (path, previous(path)):
        try:
            state = _read(candidate)
        except FileNotFoundError:
            continue
        except (OSError, MemoryError):  # of the machine, not of the file
            raise
        except Exception as error:  # readers of zip files and pickles raise all kinds
            reasons.append(f"{candidate} is damaged ({str(error).split('. ')[0] or type(error).__name__})")
            continue
        if candidate != path:
            log.warning("%s: resuming from the checkpoint before it", *reasons or [f"{path} is missing"])
            path.unlink(missing_ok=True)  # or the next save would keep it instead of the intact one
        if (schema := state.get("schema")) != SCHEMA:
            raise ValueError(
                f"{candidate} has schema {schema}, and this version reads {SCHEMA}: resume with the version "
                "that wrote it, or remove it to start the run again"
            )
        if state["id"] != run_id:
            raise ValueError(
                f"{candidate} belongs to a run with another configuration ({state['id']}, not {run_id}): "
                "remove it to start the run again"
            )
        return state
    if reasons:
        raise ValueError(f"{' and '.join(reasons)}: remove what is damaged to start the run again")
    return None


def _read(path: Path) -> dict[str, Any]:
    # Before torch.load, which looks at no checksum and can be led astray by a damaged file.
    with path.open("rb") as file:
        left, digest = path.stat().st_size - _DIGEST_BYTES, hashlib.sha256()
        while left > 0:
            chunk = file.read(min(left, 2**20))
            left -= len(chunk)
            digest.update(chunk)
        if left < 0 or file.read() != digest.digest():
            raise ValueError("its checksum differs")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError("it holds no run")
    return state
