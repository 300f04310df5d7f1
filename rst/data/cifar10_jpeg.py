"""CIFAR-10 as JPEG files, from an archive that is verified when it is unpacked."""

import hashlib
import os
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

from rst.data.image_folder import image_folder
from rst.data.images import ImageData

# Of the archive that the recorded results come from. JPEG files of another quality pass the other checks, but
# give slightly different accuracies.
SHA256 = "58c58e3af3ec7ed2054f439f35ad3c83dc1ab019f4af6037f60612ea098c8fa1"
COUNTS = {"train": 5000, "test": 1000}  # images of each of the ten classes
MEANS, TOLERANCE = (0.4914, 0.4822, 0.4465), 5e-4  # of train/, in [0, 1]; JPEG moves them by less


def unpack(archive: Path, folder: Path) -> ImageData:
    """Unpack an archive of train/<class>/*.jpg and test/<class>/*.jpg; `folder` appears once all of it has
    been verified.

    Raises:
        FileNotFoundError: there is no such archive.
        ValueError: it cannot be unpacked, or its images are not CIFAR-10's.
    """
    if not archive.is_file():
        raise FileNotFoundError(
            f"no {archive}: name the archive of train/<class>/*.jpg and test/<class>/*.jpg with "
            f"make data ARCHIVE=FILE, or put these folders into {folder}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        unpacked = Path(temporary) / "images"
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"cannot unpack {archive}: {error}") from None
        data = verify(unpacked)
        with archive.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                print(f"{archive} is not the archive of results/cpu: accuracies will differ a little")
        os.rename(unpacked, folder)
    return data


def verify(folder: Path) -> ImageData:
    """The images in `folder`.

    Raises:
        ValueError: they are not ten classes of CIFAR-10's sizes, with its channel means.
    """
    data = image_folder(str(folder), in_memory=True)
    images = {"train": data.train_images, "test": data.test_images}
    labels = {"train": data.train_labels, "test": data.test_labels}
    for split, number in COUNTS.items():
        per_class = Counter(labels[split].tolist())
        if len(per_class) != 10 or set(per_class.values()) != {number}:
            counts = ", ".join(f"{name} {per_class[i]}" for i, name in enumerate(data.classes))
            raise ValueError(f"{folder / split} must have {number} images in each of 10 classes: {counts}")
        if (size := tuple(images[split].shape[1:])) != (3, 32, 32):
            raise ValueError(f"the images in {folder / split} must be 3×32×32, not {size}")
    if max(abs(mean - expected) for mean, expected in zip(data.mean, MEANS, strict=True)) > TOLERANCE:
        means = ", ".join(f"{mean:.4f}" for mean in data.mean)
        raise ValueError(f"the channel means of {folder}/train are {means}, not those of CIFAR-10, {MEANS}")
    return data
