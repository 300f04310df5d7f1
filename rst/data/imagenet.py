"""ImageNet, or other images in its layout, streamed from a folder, tar files or WebDataset shards."""

import io
import itertools
import os
import tarfile
from pathlib import Path
from typing import IO, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from rst.data import images
from rst.data.image_files import ImageFiles, Reader
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
    reader: Reader
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

    Read by timm from a folder (train/<class>/*, val/<class>/*) or tar files (train.tar, val.tar), or from
    WebDataset shards (*train*.tar, *val*.tar, pairs of <key>.jpg and <key>.cls). Evaluation takes the centre
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

    if name == "imagenet" and (len(train.reader), len(train.classes)) != IMAGENET:
        raise ValueError(
            f"{folder} has {len(train.reader)} training images of {len(train.classes)} classes, which is not "
            "ImageNet: give the data a name of their own with dataset.name=NAME"
        )

    resize = Resize(image_size * 8 // 7, InterpolationMode(interpolation))
    fit = Compose([resize, CenterCrop(image_size)])

    def files(split: _Split) -> ImageFiles:
        return ImageFiles(
            split.reader,
            torch.arange(len(split.reader)),
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
            folders = _ClassFolders(folder / name)
            if "" in folders.class_to_idx:
                raise ValueError(f"{folder / name} has images outside of class folders: expected {LAYOUTS}")
            labels = torch.tensor([label for _, label in folders.samples])
            return _Split(folders, labels, tuple(folders.class_to_idx))
        shards = sorted(folder.glob(f"*{name}*.tar"))
        for shard in shards:
            _check_end(shard)
        if shards and _has_labels(shards[0]):
            sharded = _Shards(shards)
            present, labels = torch.tensor(sharded.labels).unique(return_inverse=True)
            return _Split(sharded, labels, tuple(map(str, present.tolist())))
        if (path := folder / f"{name}.tar").is_file():
            try:
                tar = ReaderImageInTar(str(path))
            except ValueError as error:
                if "unpack" not in str(error):  # it unpacks its list of images
                    raise
                raise FileNotFoundError(f"no images in {path}: expected {LAYOUTS}") from None
            return _Split(tar, torch.from_numpy(tar.targets), tuple(tar.class_name_to_idx))
    raise FileNotFoundError(f"no {split} images in {folder}: expected {LAYOUTS} (set dataset.root=ROOT)")


def _check_end(path: Path, block: int = 512) -> None:
    """Refuse a file without a tar file's end, two blocks of zeros: readers make do with what there is of one
    that is incomplete.

    Raises:
        ValueError: naming the file.
    """
    with path.open("rb") as file:
        file.seek(-min(2 * block, path.stat().st_size), os.SEEK_END)
        if file.read() != bytes(2 * block):
            raise ValueError(f"{path} is incomplete or no tar file (it lacks a tar file's end): replace it")


def _has_labels(shard: Path, within: int = 1000) -> bool:
    """Whether .cls files are among the shard's first members, as WebDataset pairs them with images."""
    with tarfile.open(shard) as tar:
        return any(member.name.endswith(".cls") for member in itertools.islice(tar, within))


class _Shards:
    """WebDataset shards, read at random: pairs of <key>.<image extension> and <key>.cls in tar files.

    WebDataset's own reader, and timm's around it, shuffle within a buffer and divide shards among workers, so
    that order and epoch depend on how many there are, and skip what they cannot decode.
    """

    def __init__(self, shards: list[Path]) -> None:
        self.places: list[tuple[Path, str, int, int]] = []  # shard, member, offset, bytes
        self.labels: list[int] = []
        for shard in shards:
            with tarfile.open(shard) as tar:
                members = {member.name: member for member in tar if member.isfile()}
                for name, member in members.items():
                    key, extension = os.path.splitext(name)
                    if extension.lower() not in EXTENSIONS:
                        continue
                    if (label := members.get(f"{key}.cls")) is None:
                        raise ValueError(f"{shard}: {name} has no label {key}.cls")
                    self.places.append((shard, name, member.offset_data, member.size))
                    self.labels.append(int(tar.extractfile(label).read()))  # type: ignore[union-attr]
        if not self.places:
            raise FileNotFoundError(
                f"no images ({' '.join(EXTENSIONS)}) in {shards[0]} or the shards beside it"
            )

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        shard, _, offset, size = self.places[index]
        with shard.open("rb") as file:  # opened anew: a shared one would be moved by other workers
            file.seek(offset)
            return io.BytesIO(file.read(size)), self.labels[index]

    def filename(self, index: int) -> str:
        shard, name, _, _ = self.places[index]
        return f"{shard}:{name}"


class _ClassFolders(ReaderImageFolder):
    """timm's, with whole paths in its messages."""

    def __init__(self, folder: Path) -> None:
        try:
            super().__init__(str(folder))
        except RuntimeError:
            raise FileNotFoundError(f"no images in {folder}: expected {LAYOUTS}") from None

    def filename(self, index: int, basename: bool = False, absolute: bool = True) -> str:
        return super().filename(index, basename, absolute)
