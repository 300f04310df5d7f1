"""Unpack and verify the CIFAR-10 images of protocol=cpu, JPEG files in an archive (`make data`)."""

import argparse
import hashlib
import os
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

from rst.data import ImageData, image_folder
from rst.experiments.command_line import launch

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE, FOLDER = ROOT.parent / "shared" / "data" / "cifar10-jpeg.tar.gz", ROOT / "data" / "cifar10"
# Of results/cpu's archive. JPEG files of another quality pass what is verified and train a little otherwise.
SHA256 = "58c58e3af3ec7ed2054f439f35ad3c83dc1ab019f4af6037f60612ea098c8fa1"
COUNTS = {"train": 5000, "test": 1000}  # images of each of the ten classes
MEANS, TOLERANCE = (0.4914, 0.4822, 0.4465), 5e-4  # of train/, in [0, 1]; JPEG moves them by less


def unpack(archive: Path, folder: Path) -> ImageData:
    """`folder` appears when all of it is there and verified. Raises ValueError for anything else."""
    if not archive.is_file():
        raise FileNotFoundError(
            f"no {archive}: name the archive of train/<class>/*.jpg and test/<class>/*.jpg with "
            f"make data ARCHIVE=FILE, or put these folders into {folder}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        inside = Path(temporary) / "images"
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(inside, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"cannot unpack {archive}: {error}") from None
        data = verify(inside)
        with archive.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                print(f"{archive} is not the archive of results/cpu: accuracies will differ a little")
        os.rename(inside, folder)
    return data


def verify(folder: Path) -> ImageData:
    """Ten classes with their number of images, of CIFAR-10's size and channel means. Raises ValueError."""
    data = image_folder(str(folder), name="cifar10-jpeg", in_memory=True)
    images = {"train": data.train_images, "test": data.test_images}
    labels = {"train": data.train_labels, "test": data.test_labels}
    for split, each in COUNTS.items():
        found = Counter(labels[split].tolist())
        if len(found) != 10 or set(found.values()) != {each}:
            counts = ", ".join(f"{name} {found[i]}" for i, name in enumerate(data.classes))
            raise ValueError(f"{folder / split} must have {each} images in each of 10 classes: {counts}")
        if (size := tuple(images[split].shape[1:])) != (3, 32, 32):
            raise ValueError(f"the images in {folder / split} must be 3×32×32, not {size}")
    off = max(abs(mean - expected) for mean, expected in zip(data.mean, MEANS, strict=True))
    if off > TOLERANCE:
        means = ", ".join(f"{mean:.4f}" for mean in data.mean)
        raise ValueError(f"the channel means of {folder}/train are {means}, not those of CIFAR-10, {MEANS}")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="tar file of train/ and test/")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to; verified if it is there")
    arguments = parser.parse_args()
    folder = arguments.folder
    data = verify(folder) if folder.is_dir() else unpack(arguments.archive, folder)
    means = ", ".join(f"{mean:.4f}" for mean in data.mean)
    n_train, n_test = len(data.train_labels), len(data.test_labels)
    print(f"{folder}: {n_train} + {n_test} images, channel means {means}")


if __name__ == "__main__":
    launch(main)
