"""Images from folders: layout, decoding, the cache, and what a user gets wrong."""

import logging
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rst import data
from rst.data.image_files import ImageFiles
from rst.data.images import ImageData, restrict, with_noise

CLASSES = ("cat", "dog")


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make(
    root: Path, n_train: int = 20, n_test: int = 4, shape: tuple[int, ...] = (6, 5, 3)
) -> dict[str, np.ndarray]:
    """Random images, `n_train` and `n_test` a class, written in reverse order. Returns pixels by path."""
    rng = np.random.default_rng(0)
    made = {}
    for split, n in (("train", n_train), ("test", n_test)):
        for name in reversed(CLASSES):
            for i in reversed(range(n)):
                path = root / split / name / f"{i:03}.png"
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                save(path, pixels)
                made[str(path.relative_to(root))] = pixels
    return made


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that PIL has opened so far."""
    files: list[str] = []
    original = Image.open

    def counting(path: Path) -> Image.Image:
        files.append(str(path))
        return original(path)

    monkeypatch.setattr(Image, "open", counting)
    return files


def looked_at(root: Path) -> list[str]:
    """What is opened to know the images' size, when the rest is in the cache."""
    return [str(root / "train" / "cat" / "000.png")]


def test_images_are_sorted_by_class_and_name(tmp_path: Path) -> None:
    made = make(tmp_path)
    loaded = data.image_folder(str(tmp_path))
    assert loaded.classes == CLASSES
    train = ("train", loaded.train_images, loaded.train_labels)
    test = ("test", loaded.test_images, loaded.test_labels)
    for split, images, labels in (train, test):
        paths = sorted(path for path in made if path.startswith(split))
        assert np.array_equal(images.numpy(), np.stack([made[path].transpose(2, 0, 1) for path in paths]))
        assert [CLASSES[label] for label in labels] == [Path(path).parent.name for path in paths]
    assert loaded.train_images.dtype == torch.uint8
    assert loaded.train_labels.dtype == torch.int64


def test_mean_and_std_are_of_all_training_images(tmp_path: Path) -> None:
    made = make(tmp_path)
    pixels = np.stack([made[path] for path in made if path.startswith("train")]).reshape(-1, 3) / 255
    for loaded in (data.image_folder(str(tmp_path)), data.image_folder(str(tmp_path), train_size=10)):
        assert loaded.mean == pytest.approx(pixels.mean(0), abs=1e-12)
        assert loaded.std == pytest.approx(pixels.std(0), abs=1e-12)


def test_what_is_no_image_of_a_class_is_ignored(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / "._000.png").write_bytes(b"what macOS leaves behind")
    (tmp_path / "train" / "README").write_text("not a class")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "empty").mkdir()
    loaded = data.image_folder(str(tmp_path))
    assert loaded.classes == CLASSES
    assert len(loaded.train_labels) == 40


def test_name_and_trailing_slash_change_nothing(tmp_path: Path, opened: list[str]) -> None:
    make(tmp_path)
    one = data.image_folder(str(tmp_path))
    del opened[:]
    other = data.image_folder(f"{tmp_path}/", name="pets")
    assert torch.equal(one.train_images, other.train_images)
    assert opened == looked_at(tmp_path)


def test_other_images_are_not_called_cifar10(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=r"is not CIFAR-10.*dataset\.name"):
        data.image_folder(str(tmp_path), name="cifar10-jpeg")


def test_validation_and_train_size_are_stratified_and_seeded(tmp_path: Path) -> None:
    make(tmp_path, n_train=50)
    loaded = data.image_folder(str(tmp_path), train_size=20, validation=True, seed=1)
    assert loaded.test_labels.bincount().tolist() == [5, 5]
    assert loaded.train_labels.bincount().tolist() == [10, 10]
    again = data.image_folder(str(tmp_path), train_size=20, validation=True, seed=1)
    other = data.image_folder(str(tmp_path), train_size=20, validation=True, seed=2)
    assert torch.equal(loaded.test_images, again.test_images)
    assert torch.equal(loaded.train_images, again.train_images)
    assert not torch.equal(loaded.test_images, other.test_images)
    with pytest.raises(ValueError, match=r"train_size must be 100 .* from 2 to 98 .* got 99"):
        data.image_folder(str(tmp_path), train_size=99)


def test_parts_and_random_labels(tmp_path: Path) -> None:
    make(tmp_path, n_train=50)
    whole = data.image_folder(str(tmp_path))
    for fold in (1, 2):
        loaded = data.image_folder(str(tmp_path), fold=fold, folds=4, label_noise=0.4, seed=1)
        part = with_noise(restrict(whole, None, False, 1, fold=fold, folds=4), 0.4, 1, fold)
        assert torch.equal(loaded.train_images, part.train_images)
        assert torch.equal(loaded.train_labels, part.train_labels)
        assert torch.equal(loaded.test_labels, whole.test_labels)


def test_grey_images_have_one_channel_unless_one_is_not_grey(tmp_path: Path) -> None:
    made = make(tmp_path, shape=(6, 5))
    grey = data.image_folder(str(tmp_path))
    assert grey.train_images.shape == (40, 1, 6, 5)
    assert np.array_equal(grey.train_images[0, 0], made["train/cat/000.png"])
    assert len(grey.mean) == len(grey.std) == 1

    colour = np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    save(tmp_path / "test" / "dog" / "003.png", colour)
    mixed = data.image_folder(str(tmp_path))
    assert mixed.train_images.shape == (40, 3, 6, 5)
    assert torch.equal(mixed.train_images, grey.train_images.expand(-1, 3, -1, -1))
    assert np.array_equal(mixed.test_images[-1], colour.transpose(2, 0, 1))


def test_alpha_is_dropped(tmp_path: Path) -> None:
    make(tmp_path)
    rgba = np.random.default_rng(1).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    save(tmp_path / "train" / "cat" / "000.png", rgba)
    loaded = data.image_folder(str(tmp_path))
    assert np.array_equal(loaded.train_images[0], rgba[..., :3].transpose(2, 0, 1))


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    save(tmp_path / "train" / "cat" / "007.png", np.full((6, 5), 40_000, dtype=np.uint16))
    with pytest.raises(
        ValueError, match=r"cannot decode .*train/cat/007.png: mode I;16 has more than 8 bits"
    ):
        data.image_folder(str(tmp_path))


def test_sizes_that_differ_name_the_file_and_both_sizes(tmp_path: Path) -> None:
    make(tmp_path)
    save(tmp_path / "test" / "cat" / "001.png", np.zeros((7, 5, 3), dtype=np.uint8))
    message = r"test/cat/001\.png is 5×7 pixels but .*/000\.png is 5×6: set dataset\.image_size to resize"
    with pytest.raises(ValueError, match=message):
        data.image_folder(str(tmp_path))
    assert data.image_folder(str(tmp_path), image_size=5).train_images.shape == (40, 3, 5, 5)


def test_image_size_resizes_the_shorter_side_and_crops_the_centre(tmp_path: Path) -> None:
    made = make(tmp_path, shape=(8, 12, 3))
    wide = np.zeros((16, 32, 3), dtype=np.uint8)
    wide[:, 8:24] = 200  # of 32 columns the middle 16 remain
    save(tmp_path / "train" / "cat" / "000.png", wide)
    loaded = data.image_folder(str(tmp_path), image_size=8)
    assert loaded.train_images.shape == (40, 3, 8, 8)
    assert loaded.train_images[0].min() > 150  # 187: bicubic looks a little beyond the crop
    # The shorter side is 8 already: nothing is interpolated.
    assert np.array_equal(loaded.train_images[1], made["train/cat/001.png"][:, 2:10].transpose(2, 0, 1))
    with pytest.raises(ValueError, match="image_size is in pixels and must be at least 1, got 0"):
        data.image_folder(str(tmp_path), image_size=0)


def test_second_load_decodes_nothing(tmp_path: Path, opened: list[str]) -> None:
    make(tmp_path)
    first = data.image_folder(str(tmp_path))
    assert len(opened) == 50  # each once, and the first twice more for its size
    del opened[:]
    second = data.image_folder(str(tmp_path))
    assert opened == looked_at(tmp_path)
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_images, second.test_images)
    assert (first.mean, first.std) == (second.mean, second.std)
    data.image_folder(str(tmp_path), train_size=10, validation=True, seed=3)
    assert opened == 2 * looked_at(tmp_path)


def test_each_image_size_has_its_own_cache(tmp_path: Path, opened: list[str]) -> None:
    make(tmp_path)
    for size in (None, 5, 4):
        data.image_folder(str(tmp_path), image_size=size)
    del opened[:]
    for size in (None, 5, 4):
        shape = data.image_folder(str(tmp_path), image_size=size).train_images.shape
        assert shape[2:] == ((6, 5) if size is None else (size, size))
    assert opened == looked_at(tmp_path)


@pytest.mark.parametrize("change", ["content", "size", "modification time", "added", "removed", "renamed"])
def test_cache_is_stale_when_a_file_changes(tmp_path: Path, opened: list[str], change: str) -> None:
    make(tmp_path)
    data.image_folder(str(tmp_path))
    del opened[:]
    path = tmp_path / "train" / "dog" / "004.png"
    if change == "content":
        save(path, np.full((6, 5, 3), 9, dtype=np.uint8))
    elif change == "size":
        modified = path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=(0, modified))
    elif change == "modification time":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif change == "added":
        save(path.with_name("999.png"), np.full((6, 5, 3), 9, dtype=np.uint8))
    elif change == "removed":
        path.unlink()
    else:
        path.rename(path.with_name("999.png"))
    loaded = data.image_folder(str(tmp_path))
    assert opened != []
    assert len(loaded.train_labels) == 40 + (change == "added") - (change == "removed")
    if change in ("content", "added"):
        assert bool((loaded.train_images == 9).flatten(1).all(1).any())
    assert [file.name for file in (tmp_path / ".rst-cache").glob("*.npz")] == ["original.npz"]


def test_damaged_cache_is_made_again(tmp_path: Path, opened: list[str]) -> None:
    make(tmp_path)
    first = data.image_folder(str(tmp_path))
    cache = tmp_path / ".rst-cache" / "original.npz"
    whole = cache.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], b"", b"not a zip file", bytes(flipped)):
        cache.write_bytes(damaged)
        del opened[:]
        assert torch.equal(data.image_folder(str(tmp_path)).train_images, first.train_images)
        assert opened != []
        assert len(cache.read_bytes()) == len(whole)


def test_what_a_killed_process_left_of_a_cache_goes_with_the_next(tmp_path: Path) -> None:
    make(tmp_path)
    data.image_folder(str(tmp_path))
    folder = tmp_path / ".rst-cache"
    (folder / "original.npz").unlink()
    left, others = folder / ".original.npz.123.tmp", folder / ".8.npz.123.tmp"
    for path in (left, others):  # another size has a lock of its own
        path.touch()
    data.image_folder(str(tmp_path))
    assert not left.exists() and others.exists()


def test_unwritable_folder_is_decoded_in_memory_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path)
    (tmp_path / ".rst-cache").write_text("in the way")  # permissions do not stop root, this does
    with caplog.at_level(logging.WARNING):
        loaded = data.image_folder(str(tmp_path))
    assert len(loaded.train_labels) == 40
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot cache decoded images" in caplog.text


def test_cache_of_a_folder_that_became_unwritable_is_used(tmp_path: Path, opened: list[str]) -> None:
    make(tmp_path)
    data.image_folder(str(tmp_path))
    lock = tmp_path / ".rst-cache" / "original.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()  # taking the lock would fail
    del opened[:]
    data.image_folder(str(tmp_path))
    assert opened == looked_at(tmp_path)


def test_full_disk_leaves_no_file_and_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path)

    def full(file: object, **arrays: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    loaded = data.image_folder(str(tmp_path))
    assert len(loaded.train_labels) == 40
    assert "No space left on device" in caplog.text
    assert [file.suffix for file in (tmp_path / ".rst-cache").iterdir()] == [".lock"]


def test_two_processes_at_once_decode_once(tmp_path: Path, opened: list[str]) -> None:
    made = make(tmp_path)
    total = sum(int(pixels.sum()) for path, pixels in made.items() if path.startswith("train"))
    context = multiprocessing.get_context("fork")  # spawned processes would import torch, seconds each
    start, results = context.Barrier(2), context.Queue()

    def load() -> None:
        counting = Image.open

        def slow(path: Path) -> Image.Image:
            time.sleep(0.02)
            return counting(path)

        Image.open = slow  # type: ignore[assignment]  # in this process only
        start.wait(timeout=30)
        loaded = data.image_folder(str(tmp_path))
        results.put((len(opened), int(loaded.train_images.sum())))

    processes = [context.Process(target=load) for _ in range(2)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=30) for _ in processes) == [(1, total), (50, total)]
    for process in processes:
        process.join(timeout=30)


def raises_one_line(kind: type[Exception], root: Path) -> str:
    with pytest.raises(kind) as raised:
        data.image_folder(str(root))
    assert "\n" not in str(raised.value)
    assert not list(root.glob(".rst-cache/*.npz"))
    assert not list(root.glob(".rst-cache/*.tmp"))
    return str(raised.value)


def stream(root: Path, **options: object) -> ImageData:
    return data.image_folder(str(root), in_memory=False, **{"workers": 0} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("image_size", [None, 4])
@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5)], ids=["rgb", "grey"])
def test_streamed_images_are_those_in_memory(
    tmp_path: Path, shape: tuple[int, ...], image_size: int | None
) -> None:
    make(tmp_path, shape=shape)
    part = {"image_size": image_size, "train_size": 11, "validation": True, "seed": 2}
    held, streamed = data.image_folder(str(tmp_path), **part), stream(tmp_path, **part)  # type: ignore[arg-type]
    assert streamed.train_images.shape == held.train_images.shape
    assert (streamed.mean, streamed.std, streamed.classes) == (held.mean, held.std, held.classes)
    augment = data.Augment(flip=True, crop_padding=1, cutout=2)
    for one, other in (
        (data.train_batches(held, 4, augment, 0, 1), data.train_batches(streamed, 4, augment, 0, 1)),
        (data.evaluation_batches(held, 3), data.evaluation_batches(streamed, 3)),
    ):
        for (x, y), (x2, y2) in zip(one, other, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)


def test_auto_streams_what_would_take_too_much_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    decoded = 48 * 6 * 5 * 3
    monkeypatch.setattr(sys.modules["rst.data.image_folder"], "_memory", lambda: 4 * decoded)
    assert isinstance(data.image_folder(str(tmp_path)).train_images, torch.Tensor)
    monkeypatch.setattr(sys.modules["rst.data.image_folder"], "_memory", lambda: 4 * decoded - 1)
    assert isinstance(data.image_folder(str(tmp_path)).train_images, ImageFiles)
    assert isinstance(data.image_folder(str(tmp_path), image_size=4).train_images, torch.Tensor)
    with pytest.raises(ValueError, match="in_memory must be auto, true or false, got 'yes'"):
        data.image_folder(str(tmp_path), in_memory="yes")  # type: ignore[arg-type]


def test_streaming_surveys_once(tmp_path: Path, opened: list[str]) -> None:
    make(tmp_path)
    stream(tmp_path)
    assert len(opened) == 49
    del opened[:]
    stream(tmp_path)
    assert opened == []
    save(tmp_path / "test" / "dog" / "999.png", np.zeros((6, 5, 3), dtype=np.uint8))
    stream(tmp_path)
    assert len(opened) == 50


def test_a_file_damaged_after_the_survey_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    streamed = stream(tmp_path)
    (tmp_path / "test" / "dog" / "001.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot decode .*test/dog/001.png"):
        list(data.evaluation_batches(streamed, 3))


def test_root_missing(tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    message = raises_one_line(FileNotFoundError, root)
    assert message == (
        f"no folder {root}: expected {root}/train/<class>/* and {root}/test/<class>/* (set dataset.root=DIR)"
    )
    assert not root.exists()


@pytest.mark.parametrize("missing", ["train", "test"])
def test_split_missing(tmp_path: Path, missing: str) -> None:
    make(tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    assert f"no folder {tmp_path / missing}: expected" in raises_one_line(FileNotFoundError, tmp_path)


def test_empty(tmp_path: Path) -> None:
    assert "/train/<class>/*" in raises_one_line(FileNotFoundError, tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat").mkdir(parents=True)
    message = raises_one_line(FileNotFoundError, tmp_path)
    assert message.startswith(f"no images in {tmp_path / 'train'}: expected {tmp_path}/train/<class>/*")
    assert ".png" in message
    save(tmp_path / "train" / "000.png", np.zeros((6, 5, 3), dtype=np.uint8))  # not in a class folder
    assert raises_one_line(FileNotFoundError, tmp_path) == message


@pytest.mark.parametrize("cut", [0, 30, 0.6])
def test_corrupt_image_is_named(tmp_path: Path, cut: float) -> None:
    make(tmp_path)
    path = tmp_path / "train" / "dog" / "003.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole)) if cut < 1 else int(cut)])
    assert raises_one_line(ValueError, tmp_path).startswith(f"cannot decode {path}: ")


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    make(tmp_path)
    save(tmp_path / "train" / "emu" / "0.png", np.zeros((6, 5, 3), dtype=np.uint8))
    save(tmp_path / "test" / "ape" / "0.png", np.zeros((6, 5, 3), dtype=np.uint8))
    message = raises_one_line(ValueError, tmp_path)
    assert message == (
        f"{tmp_path}: train and test must have the same classes: ape only in test/, emu only in train/"
    )
