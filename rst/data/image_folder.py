"""One's own images, train/<class>/* and test/<class>/*: decoded once into a cached array, or streamed."""

import contextlib
import functools
import hashlib
import logging
import os
import threading
import zipfile
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from joblib import cpu_count
from PIL import Image, ImageOps

from rst.data import images
from rst.data.image_files import ImageFiles, Place, is_image, require_eight_bits
from rst.data.images import ImageData
from rst.files import remove_temporary, write_atomically

log = logging.getLogger(__name__)

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MEMORY_SHARE = 0.25  # of the machine's memory that decoded images may take
CIFAR10 = "cifar10-jpeg"  # the name of dataset=cifar10_jpeg, by which runs know it
DECODER = 1  # count it up when decoded pixels change: caches written before are then stale


Arrays = dict[str, np.ndarray]


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
    in_memory: bool | Literal["auto"] = "auto",
    workers: int | None = None,
    fold: int | None = None,
    folds: int | None = None,
    label_noise: float | None = None,
) -> ImageData:
    """Images from `root`/train/<class>/* and `root`/test/<class>/*, sorted by class and file name.

    Decoded to RGB, or to one channel if all of them are 8-bit greyscale (mode L); an alpha channel is
    dropped. They must have one size, unless `image_size` is given: then the shorter side is resized to it
    (bicubic) and the centre cropped. The pixels are kept in `root`/.rst-cache until a file's name, size or
    modification time changes. Mean and standard deviation are those of train/, whatever part is trained on.

    `validation` evaluates on a stratified tenth of train/ in place of test/; `train_size` then takes a
    stratified part of the rest; `seed` draws both. Before them, `fold` of `folds` takes one of so many
    disjoint, stratified parts of train/ (`rst.data.images.part_of`), and after them a fraction `label_noise`
    of the training labels is replaced by random ones. `name` identifies the data set in a run, since the
    path differs from machine to machine; that of CIFAR-10 is refused for other images.

    `in_memory` "auto" holds the decoded images in memory if they take at most a quarter of the machine's.
    Otherwise, or with false, `workers` processes decode the files anew in each epoch, to the same pixels.

    Raises FileNotFoundError when a folder or its images are missing, ValueError when a file cannot be
    decoded, sizes differ, or train/ and test/ have different classes.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size is in pixels and must be at least 1, got {image_size}")
    if in_memory not in (True, False, "auto"):
        raise ValueError(f"in_memory must be auto, true or false, got {in_memory!r}")
    folder = Path(root).expanduser()
    train, test = scan(folder, "train"), scan(folder, "test")
    train_classes, test_classes = {file.class_name for file in train}, {file.class_name for file in test}
    if different := train_classes ^ test_classes:
        only = (f"{c} only in {'train' if c in train_classes else 'test'}/" for c in sorted(different))
        raise ValueError(f"{folder}: train and test must have the same classes: {', '.join(only)}")
    classes = tuple(sorted(train_classes))
    if name == CIFAR10 and (len(train), len(test), len(classes)) != (50_000, 10_000, 10):
        raise ValueError(
            f"{folder} is not CIFAR-10: give the data a name of their own with dataset.name=NAME"
        )
    label_of = {name: label for label, name in enumerate(classes)}

    files = train + test
    if in_memory == "auto":
        size = 3 * image_size**2 if image_size else _open(files[0].path, None)[0].nbytes
        in_memory = len(files) * size <= MEMORY_SHARE * _memory()
    listing = [(str(file.path.relative_to(folder)), file.size, file.modified) for file in files]
    fingerprint = hashlib.sha256(repr((DECODER, image_size, listing)).encode()).hexdigest()
    cache = folder / ".rst-cache" / f"{image_size or 'original'}{'' if in_memory else '-streamed'}.npz"
    pixels: torch.Tensor | ImageFiles
    if in_memory:
        made = _cached(cache, fingerprint, lambda: {"images": _decode(files, image_size)})
        pixels = torch.from_numpy(made["images"])
        mean, std = images.channel_statistics(pixels[: len(train)])
    else:
        made = _cached(cache, fingerprint, lambda: _survey(files, image_size, len(train)))
        mean, std = images.statistics_of_counts(made["counts"])
        height, width = map(int, made["size"])
        mode = "L" if len(mean) == 1 else "RGB"
        places = [Place(str(file.path)) for file in files]
        pixels = ImageFiles(
            places, torch.arange(len(files)), (height, width), _fit(image_size), mode, workers
        )
    labels = torch.tensor([label_of[file.class_name] for file in files])
    data = ImageData(
        train_images=pixels[: len(train)],
        train_labels=labels[: len(train)],
        test_images=pixels[len(train) :],
        test_labels=labels[len(train) :],
        classes=classes,
        mean=mean,
        std=std,
    )
    data = images.restrict(data, train_size, validation, seed, fold=fold, folds=folds)
    return images.with_noise(data, label_noise, seed, fold)


def scan(folder: Path, split: str) -> list[_File]:
    """The images of one split. Skips hidden files, other extensions and classes without images."""
    expected = f"expected {folder}/train/<class>/* and {folder}/test/<class>/*"
    for needed in (folder, folder / split):
        if not needed.is_dir():
            raise FileNotFoundError(f"no folder {needed}: {expected} (set dataset.root=DIR)")
    files = []
    for class_name in sorted(entry.name for entry in os.scandir(folder / split) if entry.is_dir()):
        if class_name.startswith("."):
            continue
        for entry in sorted(os.scandir(folder / split / class_name), key=lambda entry: entry.name):
            if is_image(entry.name, EXTENSIONS):
                stat = entry.stat()
                files.append(_File(Path(entry.path), class_name, stat.st_size, stat.st_mtime_ns))
    if not files:
        raise FileNotFoundError(f"no images in {folder / split}: {expected}, of {' '.join(EXTENSIONS)}")
    return files


def _memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _decode(files: list[_File], image_size: int | None) -> np.ndarray:
    """The images as uint8 [N, C, H, W], C = 3 unless all are mode L."""
    shape = _open(files[0].path, image_size)[0].shape
    pixels = np.empty((len(files), 3, *shape[:2]), dtype=np.uint8)

    def fill(i: int, image: np.ndarray) -> None:
        pixels[i] = image.transpose(2, 0, 1)

    all_grey = _visit(files, image_size, shape, fill)
    return np.ascontiguousarray(pixels[:, :1]) if all_grey else pixels


def _survey(files: list[_File], image_size: int | None, n_train: int) -> Arrays:
    """What is to be known of streamed images: their size (height, width), and how often each value occurs in
    each channel of the training images, [C, 256], with C = 1 if all images are mode L."""
    log.info("decoding %d images once, for their mean and standard deviation", len(files))
    shape = _open(files[0].path, image_size)[0].shape

    total, lock = np.zeros((3, 256), dtype=np.int64), threading.Lock()

    def count(i: int, image: np.ndarray) -> None:
        if i < n_train:
            counts = np.stack([images.value_counts(image[..., c]) for c in range(3)])
            with lock:
                np.add(total, counts, out=total)

    all_grey = _visit(files, image_size, shape, count)
    return {"counts": total[:1] if all_grey else total, "size": np.array(shape[:2])}


def _visit(
    files: list[_File],
    image_size: int | None,
    shape: tuple[int, ...],
    visit: Callable[[int, np.ndarray], None],
) -> bool:
    """Decode all files in threads and call `visit(i, image [H, W, 3])` for each. Whether all are 8-bit
    greyscale."""

    def decode(i: int) -> bool:
        image, grey = _open(files[i].path, image_size)
        if image.shape != shape:
            raise ValueError(
                f"{files[i].path} is {image.shape[1]}×{image.shape[0]} pixels but {files[0].path} is "
                f"{shape[1]}×{shape[0]}: set dataset.image_size to resize and crop them to one size"
            )
        visit(i, image)
        return grey

    with ThreadPool(min(8, cpu_count())) as pool:
        # imap, not map: it raises the first error in order, at once. Chunks, as small images are quick.
        return all(list(pool.imap(decode, range(len(files)), chunksize=64)))


def _open(path: Path, image_size: int | None) -> tuple[np.ndarray, bool]:
    """One image as RGB [H, W, 3], and whether its file is 8-bit greyscale."""
    try:
        with Image.open(path) as image:
            require_eight_bits(image)
            return np.asarray(_fit(image_size)(image.convert("RGB"))), image.mode == "L"
    except Exception as error:  # a damaged file raises whatever its decoder trips over
        raise ValueError(f"cannot decode {path}: {error}") from error


def _fit(image_size: int | None) -> Callable[[Image.Image], Image.Image]:
    """Shorter side resized to `image_size` and the centre cropped; None leaves an image as it is."""
    if image_size is None:
        return _unchanged
    return functools.partial(ImageOps.fit, size=(image_size, image_size), method=Image.Resampling.BICUBIC)


def _unchanged(image: Image.Image) -> Image.Image:
    return image


def _cached(path: Path, fingerprint: str, make: Callable[[], Arrays]) -> Arrays:
    """What `path` holds for `fingerprint`; made and written there first where it holds something else.

    Of several processes one makes it and the others wait. Where nothing can be written, made every time.
    """
    if (arrays := _read(path, fingerprint)) is not None:
        return arrays
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))
        except (OSError, NotImplementedError) as error:  # read-only, or a file system without locks
            log.warning("cannot cache decoded images, so every run decodes them: %s", error)
            return make()
        if (arrays := _read(path, fingerprint)) is not None:
            return arrays
        arrays = make()
        labelled: Any = {"fingerprint": np.array(fingerprint), **arrays}
        try:
            remove_temporary(path.parent, path.name)
            write_atomically(path, lambda file: np.savez(file, **labelled))
        except OSError as error:
            log.warning("cannot cache decoded images, so every run decodes them: %s", error)
        return arrays


def _read(path: Path, fingerprint: str) -> Arrays | None:
    """The cached arrays, or None when they are absent, stale or (by the zip's checksums) damaged."""
    try:
        with np.load(path) as cache:
            return dict(cache) if str(cache["fingerprint"]) == fingerprint else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
