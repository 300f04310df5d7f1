"""Writing files so that a crash leaves the old one or the new one, never a part."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, and put it in `path`'s place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Save a checkpoint: tensors and plain containers only."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path) -> dict[str, Any] | None:
    """The checkpoint on the CPU, or None where there is none. Executes no pickled code.

    Raises:
        ValueError: for a file that is no checkpoint.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged: remove it, and the run starts anew") from error
