"""make data: unpack and verify the archive of CIFAR-10 as JPEG files."""

import sys
import tarfile

import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "scripts"))
import data as archive_script


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An archive of 10 × (3 + 2) images of CIFAR-10's means, and numbers to match."""
    monkeypatch.setattr(archive_script, "COUNTS", {"train": 3, "test": 2})
    means = torch.tensor(archive_script.MEANS) * 255
    for split, n in archive_script.COUNTS.items():
        for name in range(10):
            folder = tmp_path / "images" / split / f"class{name}"
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = means.round().byte().expand(32, 32, 3).contiguous()
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path


def packed(folder):
    path = folder / "images.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for split in ("train", "test"):
            tar.add(folder / "images" / split, split)
    return path


def run(monkeypatch, archive, folder):
    monkeypatch.setattr(sys, "argv", ["data.py", "--archive", str(archive), "--folder", str(folder)])
    archive_script.main()


def test_unpacks_once_and_verifies_again(small, monkeypatch, capsys):
    monkeypatch.setattr(archive_script, "TOLERANCE", 0.002)  # these images are of whole numbers
    folder = small / "data" / "cifar10"
    archive = packed(small)
    run(monkeypatch, archive, folder)
    said = capsys.readouterr().out
    assert "30 + 20 images, channel means 0.49" in said and "is not the archive of results/cpu" in said
    archive.unlink()
    run(monkeypatch, archive, folder)
    assert "30 + 20 images" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == ["cifar10"]


def test_what_is_not_cifar10(small, monkeypatch):
    folder = small / "data" / "cifar10"
    with pytest.raises(FileNotFoundError, match="make data ARCHIVE=FILE"):
        run(monkeypatch, small / "none.tar.gz", folder)
    (small / "bad.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot unpack"):
        run(monkeypatch, small / "bad.tar.gz", folder)
    monkeypatch.setattr(archive_script, "TOLERANCE", 1e-6)
    with pytest.raises(ValueError, match=r"channel means .* not those of CIFAR-10"):
        run(monkeypatch, packed(small), folder)
    (small / "images" / "train" / "class3" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"must have 3 images in each of 10 classes: .*class3 2"):
        run(monkeypatch, packed(small), folder)
    assert not folder.exists() and not [*folder.parent.iterdir()]
