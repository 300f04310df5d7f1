"""The CIFARs, from miniature archives in the official layout whose checksums torchvision is told."""

import functools
import hashlib
import pickle
import socket
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from rst import data
from rst.data import cifar
from rst.data.images import restrict, with_noise


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that hangs up is none of a test's business."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address at which tmp_path is served."""
    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with QuietServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,)).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def serve_archive(root: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packs the miniature as the archive that a download fetches."""
    archive = root.parent / datasets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / datasets.CIFAR10.base_folder, datasets.CIFAR10.base_folder)
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server}/{archive.name}")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


def contents(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_cifar10_reads_the_official_layout(cifar10_root: Path) -> None:
    loaded = data.cifar10(str(cifar10_root), download=False)
    assert loaded.train_images.shape == (100, 3, 32, 32)
    assert loaded.test_images.shape == (20, 3, 32, 32)
    assert loaded.train_images.dtype == torch.uint8
    assert loaded.train_images.is_contiguous()
    assert loaded.train_labels.dtype == torch.int64
    assert loaded.train_images[:, 0, 0, 0].tolist() == list(range(100))
    assert loaded.train_labels.tolist() == [i % 10 for i in range(100)]
    assert loaded.classes == tuple(f"class{i}" for i in range(10))
    # A row of the file is the channels one after the other, each row by row.
    for file, images in (("test_batch", loaded.test_images), ("data_batch_5", loaded.train_images[80:])):
        raw = pickle.loads((cifar10_root / datasets.CIFAR10.base_folder / file).read_bytes())["data"]
        assert np.array_equal(images.numpy(), raw.reshape(-1, 3, 32, 32))


def test_cifar10_statistics_are_the_published_ones(cifar10_root: Path) -> None:
    loaded = data.cifar10(str(cifar10_root))
    assert loaded.mean == (0.49139968, 0.48215841, 0.44653091)
    assert loaded.std == (0.24703223, 0.24348513, 0.26158784)


def test_cifar10_validation_is_the_last_tenth(cifar10_root: Path) -> None:
    loaded = data.cifar10(str(cifar10_root), validation=True, seed=4)
    assert loaded.train_images[:, 0, 0, 0].tolist() == list(range(90))
    assert loaded.test_images[:, 0, 0, 0].tolist() == list(range(90, 100))
    assert loaded.test_labels.tolist() == list(range(10))


def test_cifar10_train_size_is_stratified(cifar10_root: Path) -> None:
    loaded = data.cifar10(str(cifar10_root), train_size=30, validation=True)
    assert loaded.train_labels.bincount().tolist() == [3] * 10
    assert max(loaded.train_images[:, 0, 0, 0].tolist()) < 90
    with pytest.raises(ValueError, match=r"train_size must be 100 .* from 10 to 90 .* got 95"):
        data.cifar10(str(cifar10_root), train_size=95)


def test_cifar10_in_parts_with_random_labels(cifar10_root: Path) -> None:
    whole = data.cifar10(str(cifar10_root))
    loaded = data.cifar10(str(cifar10_root), fold=1, folds=5, label_noise=0.5)
    part = with_noise(restrict(whole, None, False, 0, fold=1, folds=5), 0.5, 0, 1)
    assert torch.equal(loaded.train_images, part.train_images)
    assert torch.equal(loaded.train_labels, part.train_labels)


def test_cifar100_takes_the_fine_labels(cifar100_root: Path) -> None:
    loaded = data.cifar100(str(cifar100_root))
    assert loaded.train_images.shape == (200, 3, 32, 32)
    assert loaded.train_labels.bincount().tolist() == [2] * 100
    assert loaded.classes[99] == "fine99"
    assert loaded.mean == (0.50707516, 0.48654887, 0.44091784)
    assert loaded.std == (0.26733429, 0.25643846, 0.27615047)


def test_absent_and_not_to_be_downloaded(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "data"
    with pytest.raises(FileNotFoundError) as raised:
        data.cifar10(str(root), download=False)
    message = str(raised.value)
    assert "\n" not in message
    for part in (
        f"no CIFAR10 in {root}",
        "download=false",
        "cifar-10-batches-py/",
        "dataset.root=DIR",
        "dataset=image_folder dataset.root=DIR (DIR/train/<class>/*, DIR/test/<class>/*)",
    ):
        assert part in message
    assert contents(tmp_path) == []


def test_failed_download_leaves_nothing(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR100, "url", f"{server}/absent.tar.gz")
    with pytest.raises(
        FileNotFoundError, match=r"no CIFAR100 in .*download failed: HTTP Error 404.*cifar-100-python/ there"
    ):
        data.cifar100(str(tmp_path / "deep" / "data"))
    assert contents(tmp_path) == []


def test_a_silent_server_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "TIMEOUT", 0.2)
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/a.tar.gz")
        with pytest.raises(FileNotFoundError, match="download failed: timed out"):
            data.cifar10(str(tmp_path / "data"))
    assert socket.getdefaulttimeout() is None
    assert contents(tmp_path) == []


def test_download_is_verified_moved_into_place_and_silent(
    cifar10_root: Path,
    tmp_path: Path,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    serve_archive(cifar10_root, server, monkeypatch)
    root = tmp_path / "deep" / "data"
    loaded = data.cifar10(str(root))
    assert torch.equal(loaded.train_images, data.cifar10(str(cifar10_root)).train_images)
    assert [path.name for path in root.iterdir()] == [datasets.CIFAR10.base_folder]
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "official", datasets.CIFAR10.filename}
    assert capfd.readouterr() == ("", "")


def test_archive_put_into_root_by_hand_is_unpacked(
    cifar10_root: Path, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    serve_archive(cifar10_root, server, monkeypatch).rename(root / datasets.CIFAR10.filename)
    assert len(data.cifar10(str(root)).train_labels) == 100


def test_download_with_other_checksum_is_refused(
    cifar10_root: Path, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_archive(cifar10_root, server, monkeypatch)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(FileNotFoundError, match="download failed: File not found or corrupted"):
        data.cifar10(str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damaged", ["data_batch_3", "batches.meta"])
def test_damaged_file_is_named_and_kept(cifar10_root: Path, damaged: str) -> None:
    folder = cifar10_root / datasets.CIFAR10.base_folder
    (folder / damaged).write_bytes(b"cut")
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or damaged"):
        data.cifar10(str(cifar10_root))
    assert (folder / damaged).read_bytes() == b"cut"
