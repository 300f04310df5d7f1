"""make data: unpack and verify the archive of CIFAR-10 as JPEG files."""

import tarfile

import pytest
import torch
from PIL import Image

from rst.data import cifar10_jpeg


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of 10 × (3 + 2) images with CIFAR-10's means, and the numbers to expect."""
    monkeypatch.setattr(cifar10_jpeg, "COUNTS", {"train": 3, "test": 2})
    monkeypatch.setattr(cifar10_jpeg, "TOLERANCE", 0.002)  # pixels are whole numbers of 255ths
    pixels = (torch.tensor(cifar10_jpeg.MEANS) * 255).round().byte().expand(32, 32, 3).numpy().copy()
    for split, n in cifar10_jpeg.COUNTS.items():
        for name in range(10):
            folder = tmp_path / "images" / split / f"class{name}"
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def packed(images):
    path = images.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        for split in ("train", "test"):
            tar.add(images / split, split)
    return path


def test_unpacks_once_and_verifies_again(images, run_script, capsys):
    folder, archive = images.parent / "data" / "cifar10", packed(images)
    run_script("scripts/data.py", "--archive", archive, "--folder", folder)
    printed = capsys.readouterr().out
    assert "30 + 20 images, channel means 0.49" in printed and "is not the archive of results/cpu" in printed
    archive.unlink()
    run_script("scripts/data.py", "--archive", archive, "--folder", folder)
    assert "30 + 20 images" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == ["cifar10"]


def test_refuses_what_is_not_cifar10(images, monkeypatch):
    folder = images.parent / "data" / "cifar10"
    with pytest.raises(FileNotFoundError, match="make data ARCHIVE=FILE"):
        cifar10_jpeg.unpack(images.parent / "none.tar.gz", folder)
    (images.parent / "bad.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot unpack"):
        cifar10_jpeg.unpack(images.parent / "bad.tar.gz", folder)
    monkeypatch.setattr(cifar10_jpeg, "TOLERANCE", 1e-6)
    with pytest.raises(ValueError, match=r"channel means .* not those of CIFAR-10"):
        cifar10_jpeg.unpack(packed(images), folder)
    (images / "train" / "class3" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"must have 3 images in each of 10 classes: .*class3 2"):
        cifar10_jpeg.unpack(packed(images), folder)
    assert not folder.exists() and not [*folder.parent.iterdir()]
