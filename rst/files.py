"""Writing files so that a crash leaves the old one or the new one, never a part of one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], keep: Path | None = None) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, and put it in `path`'s place; what was
    there before becomes `keep`, where given.

    A crash between the two renamings leaves what was there as `keep` alone.

    Raises:
        OSError: when it cannot be written, on a full disk say; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save makes a RuntimeError of what goes wrong in writing.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        kept = "; the one before it is intact" if path.exists() else ""
        raise OSError(f"cannot write {path} ({cause.strerror or cause}){kept}") from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def temporary_files(folder: Path, name: str = "*") -> list[Path]:
    """Those of `write_atomically`, of files of that name: being written, or left by a killed process."""
    return list(folder.glob(f".{name}.*.tmp"))


def remove_temporary(folder: Path, name: str = "*") -> None:
    """Remove `temporary_files`, which nobody may be writing."""
    for path in temporary_files(folder, name):
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """`write_atomically`, of text in UTF-8."""
    content = text.encode()
    write_atomically(path, lambda file: file.write(content))
