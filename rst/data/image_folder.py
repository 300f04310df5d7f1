"""One's own images, train/<class>/* and test/<class>/*, decoded once into a cached uint8 array."""

import contextlib
import hashlib
import logging
import os
import zipfile
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps

from rst.data import images
from rst.data.images import ImageData

log = logging.getLogger(__name__)

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
DECODER = 1  # count it up when decoded pixels change: caches written before are then stale


class _File(NamedTuple):
    path: Path
    class_name: str
    size: int  # bytes
    modified: int  # nanoseconds


def image_folder(
    root: str,
    name: str | None = None,
    image_size: int | None = None,
    train_size: int | None = None,
    validation: bool = False,
    seed: int = 0,
) -> ImageData:
    """Images from `root`/train/<class>/* and `root`/test/<class>/*, sorted by class and file name.

    Decoded to RGB, or to one channel if all of them are 8-bit greyscale (mode L); an alpha channel is
    dropped. They must have one size, unless `image_size` is given: then the shorter side is resized to it
    (bicubic) and the centre cropped. The pixels are kept in `root`/.rst-cache until a file's name, size or
    modification time changes. Mean and standard deviation are those of train/, whatever part is trained on.

    `validation` evaluates on a stratified tenth of train/ in place of test/; `train_size` then takes a
    stratified part of the rest; `seed` draws both. `name` is a label and changes nothing here: it identifies
    the data set in a run, since the path differs from machine to machine.

    Raises FileNotFoundError when a folder or its images are missing, ValueError when a file cannot be
    decoded, sizes differ, or train/ and test/ have different classes.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size is in pixels and must be at least 1, got {image_size}")
    folder = Path(root).expanduser()
    train, test = _scan(folder, "train"), _scan(folder, "test")
    train_classes, test_classes = {file.class_name for file in train}, {file.class_name for file in test}
    if different := train_classes ^ test_classes:
        only = (f"{c} only in {'train' if c in train_classes else 'test'}/" for c in sorted(different))
        raise ValueError(f"{folder}: train and test must have the same classes: {', '.join(only)}")
    classes = tuple(sorted(train_classes))
    label_of = {name: label for label, name in enumerate(classes)}

    files = train + test
    listing = [(str(file.path.relative_to(folder)), file.size, file.modified) for file in files]
    pixels = torch.from_numpy(
        _cached(
            folder / ".rst-cache" / f"{image_size or 'original'}.npz",
            hashlib.sha256(repr((DECODER, image_size, listing)).encode()).hexdigest(),
            lambda: _decode([file.path for file in files], image_size),
        )
    )
    labels = torch.tensor([label_of[file.class_name] for file in files])
    mean, std = images.channel_statistics(pixels[: len(train)])
    data = ImageData(
        train_images=pixels[: len(train)],
        train_labels=labels[: len(train)],
        test_images=pixels[len(train) :],
        test_labels=labels[len(train) :],
        classes=classes,
        mean=mean,
        std=std,
    )
    return images.restrict(data, train_size, validation, seed)


def _scan(folder: Path, split: str) -> list[_File]:
    """The images of one split. Skips hidden files, other extensions and classes without images."""
    expected = f"expected {folder}/train/<class>/* and {folder}/test/<class>/*"
    for needed in (folder, folder / split):
        if not needed.is_dir():
            raise FileNotFoundError(f"no folder {needed}: {expected} (set dataset.root=DIR)")
    found = []
    for class_name in sorted(entry.name for entry in os.scandir(folder / split) if entry.is_dir()):
        if class_name.startswith("."):
            continue
        for entry in sorted(os.scandir(folder / split / class_name), key=lambda entry: entry.name):
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
                stat = entry.stat()
                found.append(_File(Path(entry.path), class_name, stat.st_size, stat.st_mtime_ns))
    if not found:
        raise FileNotFoundError(f"no images in {folder / split}: {expected}, of {' '.join(EXTENSIONS)}")
    return found


def _decode(paths: list[Path], image_size: int | None) -> np.ndarray:
    """The images as uint8 [N, C, H, W], C = 3 unless all are mode L."""
    first, _ = _open(paths[0], image_size)
    pixels = np.empty((len(paths), 3, *first.shape[:2]), dtype=np.uint8)

    def fill(i: int) -> bool:
        image, grey = _open(paths[i], image_size)
        if image.shape != first.shape:
            (height, width, _), (first_height, first_width, _) = image.shape, first.shape
            raise ValueError(
                f"{paths[i]} is {width}×{height} pixels but {paths[0]} is {first_width}×{first_height}: "
                "set dataset.image_size to resize and crop them to one size"
            )
        pixels[i] = image.transpose(2, 0, 1)
        return grey

    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        # imap, not map: it raises the first error in order, at once. Chunks, as small images are quick.
        all_grey = all(list(pool.imap(fill, range(len(paths)), chunksize=64)))
    return np.ascontiguousarray(pixels[:, :1]) if all_grey else pixels


def _open(path: Path, image_size: int | None) -> tuple[np.ndarray, bool]:
    """One image as RGB [H, W, 3], and whether its file is 8-bit greyscale."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            rgb = image.convert("RGB")
            if image_size is not None:
                rgb = ImageOps.fit(rgb, (image_size, image_size), method=Image.Resampling.BICUBIC)
            return np.asarray(rgb), image.mode == "L"
    except Exception as error:  # a damaged file raises whatever its decoder trips over
        raise ValueError(f"cannot decode {path}: {error}") from error


def _cached(path: Path, fingerprint: str, decode: Callable[[], np.ndarray]) -> np.ndarray:
    """What `path` holds for `fingerprint`; decoded and written there first where it holds something else.

    Of several processes one decodes and the others wait. Where nothing can be written, decodes every time.
    """
    if (pixels := _read(path, fingerprint)) is not None:
        return pixels
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))
        except (OSError, NotImplementedError) as error:  # read-only, or a file system without locks
            log.warning("cannot cache decoded images, so every run decodes them: %s", error)
            return decode()
        if (pixels := _read(path, fingerprint)) is not None:
            return pixels
        pixels = decode()
        unfinished = path.with_suffix(".tmp")
        try:
            with unfinished.open("wb") as file:
                np.savez(file, images=pixels, fingerprint=np.array(fingerprint))
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            log.warning("cannot cache decoded images, so every run decodes them: %s", error)
        return pixels


def _read(path: Path, fingerprint: str) -> np.ndarray | None:
    """The cached images, or None when they are absent, stale or (by the zip's checksums) damaged."""
    try:
        with np.load(path) as cache:
            return cache["images"] if str(cache["fingerprint"]) == fingerprint else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
