"""Kill small runs with SIGKILL at random points, resume them, and compare what they leave with what
undisturbed runs leave, bit for bit (make crash-test).

A run is train.py in a process forked from this one, which has done the imports: they take longest. It can be
killed after each step and each batch of an evaluation, before each file in its folder is opened for writing,
renamed or removed, and within each write, half of which is then on the disk.
"""

import argparse
import io
import json
import math
import os
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rst.experiments.command_line import launch, one_line
from rst.training.loop import Training
from rst.training.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
# Two epochs of five steps: checkpoints fall between steps and on the ends of epochs.
SMALL = ["protocol=quick", "model.width=4", "epochs=2", "batch_size=16", "checkpoint.every_steps=2"]
SMALL += ["dataset.train_size=80", "dataset.validation=true", "outputs=outputs"]
METHODS = ("sgd", "sam", "asam", "gnp", "rst", "grst")
OPTIMIZERS = {"sgd": ["optimizer=sgd"], "adamw": ["optimizer=adamw", "l2=0"]}
AUGMENTATIONS = {"none": ["augment=none"], "shift": ["augment=shift"]}
AUGMENTATIONS["mixup_cutout"] = ["augment=mixup_cutout", "augment.crop_padding=1", "augment.cutout=2"]
COMBINATIONS = {
    f"{method}-{optimizer}-{augment}": [f"method={method}", *OPTIMIZERS[optimizer], *AUGMENTATIONS[augment]]
    for method, optimizer, augment in product(METHODS, OPTIMIZERS, AUGMENTATIONS)
}
# Other features that have a state, random numbers or processes of their own.
COMBINATIONS["fp16"] = ["method=grst", "precision=fp16", "grad_accumulation=2"]
COMBINATIONS["shakeshake"] = ["method=rst", "model=wrn2x96_shakeshake"]
COMBINATIONS["streamed"] = ["method=grst", "dataset=image_folder", "dataset.root=../images"]
COMBINATIONS["streamed"] += ["dataset.name=noise", "dataset.in_memory=false", "dataset.workers=1"]
COMBINATIONS["streamed"] += ["augment=inception", "augment.autoaugment=auto"]

DIFFERS_ANYWAY = re.compile(r"seconds.*|images_per_second|peak_memory_bytes|finished")


class Moments:
    """Counts the points at which a run can be killed, and kills it at number `last`."""

    def __init__(self, folder: Path, last: int | None) -> None:
        self.outputs, self.last = f"{folder}/outputs", last
        self.passed: list[str] = []

    def reach(self, what: str, before_death: Callable[[], object] = lambda: None) -> None:
        self.passed.append(what)
        if len(self.passed) == self.last:
            before_death()
            os.write(1, f"killed at moment {self.last}: {what}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Count from now on, in the whole process."""
        open_file, run_training = io.open, Training.run

        def open_watched(path: Any, *arguments: Any, **options: Any) -> Any:
            file, name = open_file(path, *arguments, **options), self._name(path)
            if name and file.writable():
                write: Callable[[Any], int] = file.write

                def write_watched(data: Any) -> int:
                    self.reach(f"write {name}", lambda: (write(data[: len(data) // 2]), file.flush()))
                    return write(data)

                file.write = write_watched
            return file

        def run_watched(training: Training, *arguments: Any) -> Iterator[dict[str, Any] | None]:
            for metrics in run_training(training, *arguments):
                self.reach("step")
                yield metrics

        sys.addaudithook(self._hear)
        io.open = open_watched  # type: ignore[assignment]  # what pathlib opens files with
        Training.run = run_watched  # type: ignore[assignment,method-assign]

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: Python calls it before the event happens."""
        changes = event in ("os.mkdir", "os.rename", "os.remove")
        to_write = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (changes or to_write) and (name := self._name(arguments[0])):
            self.reach(f"{event} {name}")

    def _name(self, path: Any) -> str | None:
        """The name of a file in the run's folder, without the process's number; None for other files."""
        path = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        return re.sub(r"\.\d+\.tmp$", ".tmp", Path(path).name) if path.startswith(self.outputs) else None


def run(arguments: list[str], folder: Path, last: int | None = None) -> int:
    """`python train.py` with these arguments in `folder`, to its end or to moment `last`.

    Its output is appended to `folder`/log. At the end, `folder`/report.json lists the moments it passed and
    the modules it imported. Returns the exit code, or minus the signal that ended it.
    """
    folder.mkdir(exist_ok=True)
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        signal.alarm(120)  # ends a run that hangs
        os.chdir(folder)
        with open("log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.argv = ["train.py", *arguments]
        moments = Moments(folder, last)
        moments.watch()
        launch(import_module("train").main)
        report = {"moments": moments.passed, "modules": list(sys.modules)}
        Path("report.json").write_text(json.dumps(report))
        code = 0
    except BaseException:  # SystemExit too: from here there is no way back into the caller
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def left_by(folder: Path) -> dict[str, Any]:
    """What a run leaves in its folder, none of which an interruption may change."""
    (folder,) = folder.glob("outputs/*")
    return {
        "checkpoint.pt": torch.load(folder / "checkpoint.pt", weights_only=True)["training"],
        "metrics.jsonl": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "result.json": json.loads((folder / "result.json").read_text()),
        "config.yaml": (folder / "config.yaml").read_text(),
        "files": dict.fromkeys(path.name for path in folder.iterdir()),
    }


def difference(actual: Any, expected: Any, path: str = "") -> str | None:
    """Where two nested containers first differ, if only by a bit; None if they are equal."""
    if isinstance(actual, list | tuple) and type(actual) is type(expected):
        actual, expected = dict(enumerate(actual)), dict(enumerate(expected))
    if isinstance(actual, dict) and isinstance(expected, dict):
        if one_sided := actual.keys() ^ expected.keys():
            return f"only one has {', '.join(f'{path}/{key}' for key in one_sided)}"
        keys = [key for key in actual if not DIFFERS_ANYWAY.fullmatch(str(key))]
        each = (difference(actual[key], expected[key], f"{path}/{key}") for key in keys)
        return next((text for text in each if text is not None), None)
    if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
        same_kind = (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        tensors = [tensor.reshape(-1).view(torch.uint8) for tensor in (actual, expected)]
        return None if same_kind and torch.equal(*tensors) else f"{path} differs"
    return None if repr(actual) == repr(expected) else f"{path} is {actual!r}, not {expected!r}"


def draw_kills(moments: list[str], points: int, draws: random.Random) -> list[list[int]]:
    """The moments at which to kill a run, for each of the points: a quarter of them are within the writing of
    a checkpoint. At every fifth, the resumed run is killed too."""
    inside = [i for i, what in enumerate(moments, 1) if what == "write .checkpoint.pt.tmp"]
    elsewhere = sorted({*range(1, len(moments) + 1)} - {*inside})
    n_inside = math.ceil(points / 4)
    kills = [[i] for i in draws.sample(inside, n_inside) + draws.sample(elsewhere, points - n_inside)]
    for lasts in kills[::5]:
        if left := len(moments) - lasts[0]:  # the resumed run passes at least as many
            lasts.append(draws.randint(1, left))
    return kills


def crash(arguments: list[str], seed: int, points: int, work: Path) -> str:
    """Compare a run in `work`/whole with killed ones in `work`/killed. Returns a summary in words.

    Raises:
        ValueError: a run goes wrong or leaves something else.
    """
    arguments = [*SMALL, *arguments, f"seed={seed}"]
    whole, killed = work / "whole", work / "killed"
    shutil.rmtree(whole, ignore_errors=True)
    if code := run(arguments, whole):
        raise ValueError(f"undisturbed it exited with {code}")
    expected, report = left_by(whole), json.loads((whole / "report.json").read_text())
    for module in report["modules"]:
        with suppress(ImportError):  # of names that are no modules
            import_module(module)
    kills = draw_kills(report["moments"], points, random.Random(seed))
    for lasts in kills:
        shutil.rmtree(killed, ignore_errors=True)
        where = f"killed at moment {' and then '.join(map(str, lasts))} of {len(report['moments'])}"
        for last in lasts:
            if (code := run(arguments, killed, last)) != -signal.SIGKILL:
                raise ValueError(f"to be {where} it exited with {code}")
        if code := run(arguments, killed):
            raise ValueError(f"{where} and run again it exited with {code}")
        if text := difference(left_by(killed), expected):
            raise ValueError(f"{where} and run again: {text}")
    return f"{sum(map(len, kills))} kills at {points} points of {len(report['moments'])}"


def write_images(root: Path) -> None:
    """A folder of noise for `dataset=image_folder`: 100 + 100 images of two classes."""
    draws = random.Random(0)
    for split, name, i in product(("train", "test"), ("a", "b"), range(50)):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (8, 8), draws.randbytes(192)).save(root / split / name / f"{i}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=20, help="to kill each run at (default: 20)")
    parser.add_argument(
        "--seed", type=int, help="of a run and its points (default: 0, and then a random one)"
    )
    parser.add_argument("--combination", nargs="+", default=["*"], metavar="PATTERN", help="such as 'grst-*'")
    options = parser.parse_args()
    names = [name for name in COMBINATIONS if any(fnmatch(name, p) for p in options.combination)]
    if not names:
        parser.error(f"no such --combination: choose from {', '.join(COMBINATIONS)}")
    sys.path.insert(0, str(ROOT))  # train.py is there
    # Looked up once: a commit in the checkout meanwhile is then no difference between two runs.
    provenance(torch.device("cpu"))
    work = Path(tempfile.mkdtemp(prefix="rst-crash-"))
    write_images(work / "images")
    for name in names:
        for seed in (0, secrets.randbelow(2**31)) if options.seed is None else (options.seed,):
            begun = time.monotonic()
            try:
                done = crash(COMBINATIONS[name], seed, options.points, work)
            except Exception as error:
                print(max(work.glob("*/log"), key=os.path.getmtime).read_text(), file=sys.stderr)
                again = f"scripts/crash_test.py --points {options.points} --seed {seed} --combination {name}"
                sys.exit(f"error: {name}, seed {seed}, {one_line(error)} (in {work}; again: python {again})")
            print(f"{name}, seed {seed}: {done}, {time.monotonic() - begun:.1f} s", flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
