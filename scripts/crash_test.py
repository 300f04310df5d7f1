"""Kill small runs with SIGKILL at random points, run them again, and require what an undisturbed run leaves.

A run is train.py's command in a process forked from this one, which has imported everything: that saves most of
its time. It can be killed after each step and each batch of an evaluation, before each of its changes to the run's
folder (opening, renaming and removing files), and in the middle of each piece that it writes, half of which is
then on the disk.
"""

import argparse
import io
import json
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from hydra.core.plugins import Plugins
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402  it lies beside this folder
from rst.command_line import launch  # noqa: E402
from rst.engine import Training  # noqa: E402
from rst.record import provenance  # noqa: E402

# Two epochs of five steps, so that checkpoints fall on the ends of epochs and elsewhere.
SMALL = ["protocol=quick", "model.width=4", "epochs=2", "batch_size=16", "checkpoint.every_steps=2"]
SMALL += ["dataset.train_size=80", "dataset.validation=true", "outputs=outputs"]
METHODS = ("sgd", "sam", "asam", "gnp", "rst", "grst")
OPTIMIZERS = {"sgd": ["optimizer=sgd"], "adamw": ["optimizer=adamw", "l2=0"]}
AUGMENTATIONS = {
    "none": ["augment=none"],
    "shift": ["augment=shift"],
    "mixup_cutout": ["augment=mixup_cutout", "augment.crop_padding=1", "augment.cutout=2"],
}
COMBINATIONS = {
    f"{method}-{optimizer}-{augmentation}": [f"method={method}", *of_optimizer, *of_augmentation]
    for method, (optimizer, of_optimizer), (augmentation, of_augmentation) in product(
        METHODS, OPTIMIZERS.items(), AUGMENTATIONS.items()
    )
}
COMBINATIONS["loss_scaling"] = ["method=grst", "precision=fp16", "grad_accumulation=2"]
COMBINATIONS["dropout"] = ["method=rst", "model=vit_tiny", "~model.width", "+model.depth=1", "l2=0"]
COMBINATIONS["streamed"] = ["method=grst", "dataset=image_folder", "dataset.in_memory=false"]
COMBINATIONS["streamed"] += ["dataset.workers=1", "dataset.name=noise", "dataset.root=../images"]
COMBINATIONS["streamed"] += ["augment=inception", "augment.autoaugment=auto"]

DIFFERS_ANYWAY = re.compile(r"seconds.*|images_per_second|peak_memory_bytes|finished")
TOO_LONG = 120  # seconds: then a run hangs


class Moments:
    """The points at which a run can be killed, counted as it comes by; at the last one it is."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.prefix, self.last = f"{folder}/", last
        self.passed: list[str] = []

    def reach(self, what: str, before_death: Callable[[], object] = lambda: None) -> None:
        self.passed.append(what)
        if len(self.passed) == self.last:
            before_death()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Count, from now on and for good, what this process does."""
        sys.addaudithook(self._change)
        plain_open, plain_run = io.open, Training.run

        def halved_open(file: Any, *arguments: Any, **options: Any) -> Any:
            opened = plain_open(file, *arguments, **options)
            return Halved(opened, self, name) if opened.writable() and (name := self._name(file)) else opened

        def run(training: Training, *arguments: Any) -> Iterator[dict[str, Any] | None]:
            for metrics in plain_run(training, *arguments):
                self.reach("step" if metrics is None else "epoch")
                yield metrics

        io.open = halved_open  # type: ignore[assignment]  # what pathlib opens files with
        Training.run = run  # type: ignore[method-assign]

    def _change(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_change = event in ("os.mkdir", "os.rename", "os.remove") or (
            event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if is_change and (name := self._name(arguments[0])):
            self.reach(f"{event} {name}")

    def _name(self, file: Any) -> str | None:
        """Of a file in the folder of runs, without the writer's process id."""
        if not isinstance(file, str | bytes | os.PathLike):
            return None
        path = os.path.abspath(os.fsdecode(file))
        return re.sub(r"\.\d+\.tmp$", ".tmp", Path(path).name) if path.startswith(self.prefix) else None


class Halved:
    """A file for writing, half of whose last piece is on the disk when its process is killed in it."""

    def __init__(self, file: IO[Any], moments: Moments, name: str) -> None:
        self.file, self.moments, self.name = file, moments, name

    def write(self, data: Any) -> int:
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.moments.reach(f"write {self.name}", half)
        return self.file.write(data)

    def __enter__(self) -> "Halved":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def run(arguments: list[str], folder: Path, last: int | None = None) -> int:
    """`python train.py` with these arguments in `folder`, up to its moment number `last`. Returns its exit code,
    of a process that a signal ended minus the signal. Its output goes to `folder`.log; the moments that it passed,
    where it came to an end, to `folder`.moments."""
    folder.mkdir(exist_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code: Any = 1
    try:  # nothing may get back to the caller, who is in the other process
        signal.alarm(TOO_LONG)
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        sys.argv = ["train.py", *arguments]
        moments = Moments(folder, last)
        moments.watch()
        launch(train.main)
        Path(f"{folder}.moments").write_text("\n".join(moments.passed))
        code = 0
    except SystemExit as end:
        print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def left_by(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions."""
    (folder,) = folder.glob("outputs/*/")
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "config.yaml": (folder / "config.yaml").read_text(),
        "checkpoint.pt": torch.load(folder / "checkpoint.pt", weights_only=True)["training"],
        "metrics.jsonl": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "result.json": json.loads((folder / "result.json").read_text()),
    }


def difference(found: Any, expected: Any, path: str = "") -> str | None:
    """Where two nested containers first differ in a bit, and how; None where they are equal."""
    if type(found) is not type(expected):
        return f"{path} is a {type(found).__name__}, not a {type(expected).__name__}"
    if isinstance(found, torch.Tensor):
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            return f"{path} is {found.dtype} {tuple(found.shape)}"
        differing = found.numpy().view(np.uint8) != expected.numpy().view(np.uint8) if found.ndim else None
        print(differing)
    return None


if __name__ == "__main__":
    pass
