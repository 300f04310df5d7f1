"""What a result was made with: versions, commit, machine."""

import os
import platform
import re
import socket
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rst import __version__
from rst.training import distributed


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, commit, host and device of this process.

    The commit is looked up once in a process: call it at the start, as the checkout may change later.
    """
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a plain string, which a checkpoint can hold
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


def combined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The provenance of an interrupted run: that of its last part, with the commits, machines and numbers of
    ranks of all its parts, in order, such as "2+1". It is dirty if any part was."""

    def joined(key: str) -> str | None:
        return "+".join(dict.fromkeys(part[key] for part in parts if part[key])) or None

    all_of_them = {key: joined(key) for key in ("commit", "host", "device_name", "ranks")}
    dirty = any(part["dirty"] for part in parts) or parts[-1]["dirty"]
    return {**parts[-1], **all_of_them, "dirty": dirty}


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
        status = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results")
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(status)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
