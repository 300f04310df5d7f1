"""Writing files so that a crash leaves the old one or the new one, never a part."""

import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

log = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], keep: Path | None = None) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, and put it in `path`'s place; what was
    there before becomes `keep`, where given."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is."""
    return path.with_stem(f"{path.stem}-previous")


def save(path: Path, state: dict[str, Any]) -> None:
    """Save a checkpoint, tensors and plain containers only, and keep the one before it."""
    write_atomically(path, lambda file: torch.save(state, file), keep=previous(path))


def load(path: Path) -> dict[str, Any] | None:
    """The checkpoint on the CPU, or None where there is none. Executes no pickled code.

    Where it is damaged, or a crash came between two renamings, the one before it, with a warning.

    Raises:
        ValueError: where neither can be read.
    """
    reasons = []
    for candidate in (path, previous(path)):
        try:
            state = _read(candidate)
        except FileNotFoundError:
            continue
        except Exception as error:  # whatever the readers of zip files and pickles trip over
            reasons.append(f"{candidate} is damaged ({str(error).split('. ')[0] or type(error).__name__})")
            continue
        if candidate != path:
            log.warning("%s: going on from the checkpoint before it", *reasons or [f"{path} is missing"])
        return state
    if reasons:
        raise ValueError(f"{' and '.join(reasons)}: remove it, and the run starts anew")
    return None


def _read(path: Path) -> dict[str, Any]:
    # torch.save writes a zip file with a CRC-32 of each part, which torch.load does not look at.
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} differs")
    return torch.load(path, map_location="cpu", weights_only=True)
