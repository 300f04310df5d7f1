"""ImageNet, or other images in its layout, streamed from a folder, tar files or WebDataset shards."""

import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils.misc import natural_key
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from rst.data import images
from rst.data.image_files import ImageFiles, Place, is_image
from rst.data.images import ImageData

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")
INTERPOLATIONS = ("bicubic", "bilinear")
IMAGENET = (1_281_167, 1000)  # training images and classes
SPLITS = {"train": ("train",), "val": ("val", "validation")}
LAYOUTS = (
    "ROOT/train/<class>/* and ROOT/val/<class>/*, ROOT/train.tar and ROOT/val.tar with <class>/* in them, or "
    "WebDataset shards ROOT/*train*.tar and ROOT/*val*.tar with .cls labels"
)


class _Split(NamedTuple):
    places: list[Place]
    labels: torch.Tensor
    classes: tuple[str, ...]


def imagenet(
    root: str,
    name: str | None = None,
    image_size: int = 224,
    train_size: int | None = None,
    validation: bool = False,
    seed: int = 0,
    workers: int | None = None,
    interpolation: str = "bicubic",
) -> ImageData:
    """ImageNet's training and validation images, decoded by `workers` processes as they are needed.

    From a folder (train/<class>/*, val/<class>/*), tar files (train.tar, val.tar) or WebDataset shards
    (*train*.tar, *val*.tar, pairs of <key>.jpg and <key>.cls). Evaluation takes the centre
    `image_size` pixels of the image resized to 8/7 of it; training does, too, unless the augmentation has
    `random_resized_crop`. Either resizes by `interpolation`: "bicubic", that of the paper's authors, or
    "bilinear", torchvision's. Mean and standard deviation are ImageNet's.

    The classes are the folders' names, in natural order, or for WebDataset the labels. `validation`,
    `train_size`, `seed` and `workers` as in `image_folder`. `name` identifies the data in a run: "imagenet"
    is refused for what has not ImageNet's number of images and classes.

    Raises FileNotFoundError where a split is missing, ValueError where the splits' classes differ or a tar
    file is damaged.
    """
    if image_size < 1:
        raise ValueError(f"image_size is in pixels and must be at least 1, got {image_size}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be {' or '.join(INTERPOLATIONS)}, got {interpolation}")
    folder = Path(root).expanduser()
    train, test = _open(folder, "train"), _open(folder, "val")
    train_classes, test_classes = set(train.classes), set(test.classes)
    if train_classes != test_classes:
        only = [
            *(f"{c} only in train" for c in sorted(train_classes - test_classes)),
            *(f"{c} only in val" for c in sorted(test_classes - train_classes)),
        ]
        more = f" and {len(only) - 5} more" if len(only) > 5 else ""
        raise ValueError(f"{folder}: train and val must have the same classes: {', '.join(only[:5])}{more}")

    if name == "imagenet" and (len(train.places), len(train.classes)) != IMAGENET:
        raise ValueError(
            f"{folder} has {len(train.places)} training images of {len(train.classes)} classes, which is not "
            "ImageNet: give the data a name of their own with dataset.name=NAME"
        )

    resize = Resize(image_size * 8 // 7, InterpolationMode(interpolation))
    fit = Compose([resize, CenterCrop(image_size)])

    def files(split: _Split) -> ImageFiles:
        return ImageFiles(
            split.places,
            torch.arange(len(split.places)),
            (image_size, image_size),
            fit,
            workers=workers,
            interpolation=interpolation,
        )

    data = ImageData(
        train_images=files(train),
        train_labels=train.labels,
        test_images=files(test),
        test_labels=test.labels,
        classes=train.classes,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )
    return images.restrict(data, train_size, validation, seed)


def _open(folder: Path, split: str) -> _Split:
    for name in SPLITS[split]:
        if (folder / name).is_dir():
            return _by_class(list(_files(folder / name)), folder / name)
        shards = sorted(folder.glob(f"*{name}*.tar"))
        if shards and _has_labels(shards[0]):
            return _by_label(shards)
        if (path := folder / f"{name}.tar").is_file():
            with path.open("rb") as file:
                members = _members(file, str(path))
                places = [Place(str(path), *member) for member in members if is_image(member[0], EXTENSIONS)]
            return _by_class(places, path)
    raise FileNotFoundError(f"no {split} images in {folder}: expected {LAYOUTS} (set dataset.root=ROOT)")


def _by_class(places: list[Place], where: Path) -> _Split:
    """The class is the folder that an image is in. Classes and images are in natural order: "2" before "10",
    ignoring case; ties ("1", "01") as text."""
    if not places:
        raise FileNotFoundError(f"no images in {where}: expected {LAYOUTS}")
    places.sort(key=lambda place: (natural_key(place.name), place.name))
    of_images = [os.path.basename(os.path.dirname(place.name)) for place in places]
    classes = sorted(set(of_images), key=lambda name: (natural_key(name), name))
    if "" in classes:
        raise ValueError(f"{where} has images outside of class folders: expected {LAYOUTS}")
    label_of = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([label_of[name] for name in of_images])
    return _Split(places, labels, tuple(classes))


def _by_label(shards: list[Path]) -> _Split:
    """WebDataset shards: pairs of <key>.<image extension> and <key>.cls, images in the shards' order.

    WebDataset's own reader, and timm's around it, shuffle within a buffer and divide shards among workers, so
    that order and epoch depend on how many there are, and skip what they cannot decode.
    """
    places, labels = [], []
    for shard in shards:
        with shard.open("rb") as file:
            members = {name: (offset, size) for name, offset, size in _members(file, str(shard))}
            for name, (offset, size) in members.items():
                if not is_image(name, EXTENSIONS):
                    continue
                key = os.path.splitext(name)[0]
                if (label := members.get(f"{key}.cls")) is None:
                    raise ValueError(f"{shard}: {name} has no label {key}.cls")
                file.seek(label[0])
                labels.append(int(file.read(label[1])))
                places.append(Place(str(shard), name, offset, size))
    if not places:
        raise FileNotFoundError(f"no images ({' '.join(EXTENSIONS)}) in {shards[0]} or the shards beside it")
    present, numbers = torch.tensor(labels).unique(return_inverse=True)
    return _Split(places, numbers, tuple(map(str, present.tolist())))


def _files(folder: Path) -> Iterator[Place]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(parent, folder)
        for name in names:
            if is_image(name, EXTENSIONS):
                yield Place(os.path.join(parent, name), os.path.normpath(f"{inside}/{name}"))


def _members(file: IO[bytes], path: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file in a tar file; those of a tar file in it (ImageNet's has one a
    class) as if they were in a folder of its name. Reads the headers only.

    Raises:
        ValueError: naming `path`, where it does not go on to a tar file's end, two blocks of zeros, or goes
            on after it.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # a million of them take a gigabyte
                if not member.isfile():
                    continue
                name = os.path.normpath(member.name)
                stem, extension = os.path.splitext(name)
                if extension.lower() == ".tar":
                    inner: Any = tar.extractfile(member)
                    for of_inner, offset, size in _members(inner, f"{path}:{name}"):
                        yield f"{stem}/{of_inner}", member.offset_data + offset, size
                else:
                    yield name, member.offset_data, member.size
            file.seek(tar.offset)
            rest = file.read(2**20)  # zeros, to a whole record
            if len(rest) < 1024 or any(rest):  # tarfile makes do with what there is
                raise tarfile.ReadError("it does not end as a tar file does")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is incomplete or no tar file ({error}): replace it") from error


def _has_labels(shard: Path, within: int = 1000) -> bool:
    """Whether .cls files are among the shard's first members, as WebDataset pairs them with images."""
    with shard.open("rb") as file:
        return any(
            name.endswith(".cls") for name, _, _ in itertools.islice(_members(file, str(shard)), within)
        )
