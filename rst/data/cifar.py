"""CIFAR-10 and CIFAR-100 as torchvision reads, verifies and downloads them."""

import contextlib
import io
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock
from torchvision import datasets

from rst.data.images import ImageData, restrict, with_noise

log = logging.getLogger(__name__)

TIMEOUT = 20.0  # seconds a server may be silent


def cifar10(
    root: str,
    train_size: int | None = None,
    validation: bool = False,
    seed: int = 0,
    download: bool = True,
    fold: int | None = None,
    folds: int | None = None,
    label_noise: float | None = None,
) -> ImageData:
    """CIFAR-10, 50 000 + 10 000 images [3, 32, 32], from `root`/cifar-10-batches-py.

    `validation` trains on the first 45 000 and evaluates on the last 5 000; `train_size` then takes a
    stratified part of the training images, drawn by `seed`. `fold` of `folds` takes one of so many disjoint,
    stratified parts of the training set before (`rst.data.images.part_of`); `label_noise` is the fraction of
    the training labels replaced by random ones. `download`: fetch what is absent.

    Raises FileNotFoundError when it is absent and not to be had, ValueError when its checksums differ.
    """
    data = _read(
        datasets.CIFAR10,
        root,
        download,
        mean=(0.49139968, 0.48215841, 0.44653091),
        std=(0.24703223, 0.24348513, 0.26158784),
    )
    data = restrict(data, train_size, validation, seed, True, fold, folds)
    return with_noise(data, label_noise, seed, fold)


def cifar100(
    root: str,
    train_size: int | None = None,
    validation: bool = False,
    seed: int = 0,
    download: bool = True,
    fold: int | None = None,
    folds: int | None = None,
    label_noise: float | None = None,
) -> ImageData:
    """CIFAR-100 with its 100 fine classes, from `root`/cifar-100-python; otherwise as `cifar10`."""
    data = _read(
        datasets.CIFAR100,
        root,
        download,
        mean=(0.50707516, 0.48654887, 0.44091784),
        std=(0.26733429, 0.25643846, 0.27615047),
    )
    data = restrict(data, train_size, validation, seed, True, fold, folds)
    return with_noise(data, label_noise, seed, fold)


def _read(
    dataset: type[datasets.CIFAR10],
    root: str,
    download: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> ImageData:
    folder = Path(root).expanduser().resolve()
    archive = folder / dataset.base_folder
    if not archive.is_dir():
        failure = _download(dataset, folder) if download else "download=false"
        if failure:
            raise FileNotFoundError(
                f"no {dataset.__name__} in {folder} ({failure}): put {dataset.base_folder}/ there, set "
                "dataset.root=DIR to the folder that holds it, or train on other images with "
                "dataset=image_folder dataset.root=DIR (DIR/train/<class>/*, DIR/test/<class>/*)"
            )
    try:
        train, test = dataset(folder, train=True), dataset(folder, train=False)
    except RuntimeError:
        raise ValueError(
            f"{archive} is incomplete or damaged (checksums differ): remove or replace it"
        ) from None
    return ImageData(
        train_images=torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous(),
        train_labels=torch.tensor(train.targets),
        test_images=torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous(),
        test_labels=torch.tensor(test.targets),
        classes=tuple(train.classes),
        mean=mean,
        std=std,
    )


def _download(dataset: type[datasets.CIFAR10], folder: Path) -> str:
    """Moves the unpacked archive into `folder` when it is complete and verified; before that, nothing there
    changes. One process at a time. Returns what went wrong, or an empty string."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    lock = existing / f".{dataset.base_folder}.lock"
    try:
        with FileLock(lock), contextlib.ExitStack() as stack:
            stack.callback(lock.unlink, missing_ok=True)  # while it is held: who waits for it then notices
            temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=existing, prefix=lock.stem))
            if (folder / dataset.base_folder).is_dir():  # another process held the lock before
                return ""
            if (folder / dataset.filename).is_file():
                shutil.copy(folder / dataset.filename, temporary)
            log.info("downloading %s to %s", dataset.__name__, folder)
            with _quiet_with_timeout():
                dataset(temporary, download=True)
            folder.mkdir(parents=True, exist_ok=True)
            os.replace(Path(temporary) / dataset.base_folder, folder / dataset.base_folder)
    except (OSError, RuntimeError, HTTPException) as error:
        return f"download failed: {error}"
    return ""


@contextlib.contextmanager
def _quiet_with_timeout() -> Iterator[None]:
    """torchvision prints a progress bar and waits for a silent server for ever; here it does neither."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)
