"""The same samples from a folder, a tar and WebDataset shards; draws by (seed, epoch, image) only."""

import io
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from rst import data
from rst.data import Augment, ImageData, imagenet

CLASSES = {"n01440764": 5, "n01443537": 4, "n02102040": 6}  # training images of each
N_VAL = 2  # of each class
SMALL = {"image_size": 32, "workers": 0}
CROPPED = Augment(flip=True, random_resized_crop=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of several sizes and modes, ImageNet's names."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, n in CLASSES.items():
            (root / split / name).mkdir(parents=True)
            for i in range(n if split == "train" else N_VAL):
                height, width = rng.integers(40, 90, 2)
                noise = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
                image = Image.fromarray(noise).resize((width, height))
                image = image.convert("L") if i == 1 else image
                image.save(root / split / name / f"{name}_{i}.JPEG")
    return root


def files_of(folder: Path, split: str) -> list[Path]:
    return sorted((folder / split).rglob("*.JPEG"))


@pytest.fixture
def tar(folder: Path, tmp_path: Path) -> Path:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for path in files_of(folder, split):
                archive.add(path, path.relative_to(folder / split))
    return tmp_path


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def webdataset(folder: Path, tmp_path: Path) -> Path:
    """Two shards a split, as `imagenet-train-000000.tar`."""
    labels = {name: label for label, name in enumerate(sorted(CLASSES))}
    for split in ("train", "val"):
        paths = files_of(folder, split)
        for shard, chosen in enumerate((paths[: len(paths) // 2], paths[len(paths) // 2 :])):
            with tarfile.open(tmp_path / f"imagenet-{split}-{shard:06}.tar", "w") as archive:
                for path in chosen:
                    archive.add(path, f"{path.stem}.jpg")
                    label = str(labels[path.parent.name]).encode()
                    add(archive, f"{path.stem}.cls", label)
    return tmp_path


def batches(source: ImageData, epoch: int = 0, augment: Augment = CROPPED) -> list[tuple[torch.Tensor, ...]]:
    return list(data.train_batches(source, 4, augment, seed=3, epoch=epoch))


def same(some: list[tuple[torch.Tensor, ...]], others: list[tuple[torch.Tensor, ...]]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("layout", ["tar", "webdataset"])
def test_the_same_samples_in_every_layout(layout: str, folder: Path, request: pytest.FixtureRequest) -> None:
    expected, source = imagenet(str(folder), **SMALL), imagenet(str(request.getfixturevalue(layout)), **SMALL)
    assert len(expected.train_labels) == sum(CLASSES.values()) == 15
    assert len(expected.test_labels) == 6
    assert torch.equal(source.train_labels, expected.train_labels)
    assert same(batches(source), batches(expected))
    assert same(list(data.evaluation_batches(source, 4)), list(data.evaluation_batches(expected, 4)))
    assert len(source.classes) == 3
    if layout == "tar":
        assert source.classes == expected.classes == tuple(sorted(CLASSES))


def test_evaluation_is_the_centre_of_the_resized_image(folder: Path) -> None:
    source = imagenet(str(folder), **SMALL)
    images, labels = map(torch.cat, zip(*data.evaluation_batches(source, 4), strict=True))
    for path, image, label in zip(files_of(folder, "val"), images, labels, strict=True):
        resized = F.resize(Image.open(path).convert("RGB"), 36, F.InterpolationMode.BICUBIC)
        pixels = F.pil_to_tensor(F.center_crop(resized, [32, 32]))
        assert torch.equal(image, data.normalize(pixels[None], source.mean, source.std)[0])
        assert source.classes[label] == path.parent.name
    # Without a random crop, training sees the same.
    plain = batches(imagenet(str(folder), **SMALL), augment=Augment())
    assert plain[0][0].shape == (4, 3, 32, 32)


def test_interpolation_is_of_evaluation_and_of_random_crops(folder: Path) -> None:
    bilinear, bicubic = (imagenet(str(folder), interpolation=by, **SMALL) for by in ("bilinear", "bicubic"))
    assert same(batches(imagenet(str(folder), **SMALL)), batches(bicubic))
    path = files_of(folder, "val")[0]
    for source, how in ((bilinear, Image.Resampling.BILINEAR), (bicubic, Image.Resampling.BICUBIC)):
        image, _ = next(iter(data.evaluation_batches(source, 1)))
        picture = Image.open(path).convert("RGB")
        scale = 36 / min(picture.size)
        resized = picture.resize([int(side * scale) for side in picture.size], how)
        pixels = F.pil_to_tensor(F.center_crop(resized, [32, 32]))
        assert torch.equal(image[0], data.normalize(pixels[None], source.mean, source.std)[0])
    # The same crops, resized otherwise.
    for (some, labels), (others, also) in zip(batches(bilinear), batches(bicubic), strict=True):
        assert torch.equal(labels, also)
        assert 0 < (some - others).abs().mean() < 0.2 * some.std()
    with pytest.raises(ValueError, match="interpolation must be bicubic or bilinear, got nearest"):
        imagenet(str(folder), interpolation="nearest", **SMALL)


def test_whatever_the_number_of_workers(folder: Path) -> None:
    augment = Augment(flip=True, random_resized_crop=True, autoaugment="imagenet")
    alone = imagenet(str(folder), image_size=32, workers=0)
    shared = imagenet(str(folder), image_size=32, workers=2)
    assert same(batches(alone, 1, augment), batches(shared, 1, augment))
    assert same(list(data.evaluation_batches(alone, 4)), list(data.evaluation_batches(shared, 4)))


def test_order_and_crops_follow_from_seed_and_epoch(folder: Path) -> None:
    source = imagenet(str(folder), **SMALL)
    state = random.getstate(), torch.get_rng_state()
    first = batches(source, epoch=0)
    assert same(first, batches(source, epoch=0))
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    random.seed(1)
    assert same(first, batches(source, epoch=0))
    assert not same(first, batches(source, epoch=1))
    assert same(first[2:], list(data.train_batches(source, 4, CROPPED, seed=3, epoch=0, start=2)))
    # One image, four epochs: a crop each.
    alone = imagenet(str(folder), train_size=3, **SMALL)
    views = {
        (int(label), image.numpy().tobytes())
        for epoch in range(4)
        for x, y in data.train_batches(alone, 3, Augment(random_resized_crop=True), seed=0, epoch=epoch)
        for image, label in zip(x, y, strict=True)
    }
    assert len(views) == 12


def test_train_size_and_too_few_images_for_validation_mode(folder: Path) -> None:
    whole = imagenet(str(folder), **SMALL)
    part = imagenet(str(folder), train_size=6, seed=1, **SMALL)
    assert len(part.train_images) == len(part.train_labels) == 6
    assert set(part.train_labels.tolist()) == {0, 1, 2}
    assert len(part.test_labels) == len(whole.test_labels)
    with pytest.raises(ValueError, match="cannot divide 15 images by class"):  # a tenth of 15 is one image
        imagenet(str(folder), validation=True, **SMALL)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_file_is_named(folder: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    broken = tmp_path / "copy" / "val" / "n01443537" / "n01443537_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:-300])
    source = imagenet(str(tmp_path / "copy"), image_size=32, workers=workers)
    with pytest.raises(
        ValueError, match=r"cannot decode .*/copy/val/n01443537/n01443537_0.JPEG: .*trunc"
    ) as e:
        list(data.evaluation_batches(source, 4))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("layout", ["folder", "webdataset"])
def test_a_class_missing_in_validation(
    layout: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if layout == "folder":
        shutil.copytree(folder, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy" / "val" / "n01443537")
        root, missing = tmp_path / "copy", "n01443537"
    else:
        root, missing = request.getfixturevalue("webdataset"), "2"
        (root / "imagenet-val-000001.tar").unlink()
    with pytest.raises(ValueError, match=rf"same classes: .*{missing} only in train"):
        imagenet(str(root), **SMALL)


def test_a_root_without_the_splits(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train images in .*expected ROOT/train/<class>/\*"):
        imagenet(str(tmp_path), **SMALL)
    shutil.copytree(folder / "train", tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"no val images in .*dataset.root=ROOT"):
        imagenet(str(tmp_path), **SMALL)
    (tmp_path / "val" / "n01443537").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no images in .*/val"):
        imagenet(str(tmp_path), **SMALL)


def test_other_data_under_imagenets_name(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"15 training images of 3 classes, which is not ImageNet"):
        imagenet(str(folder), name="imagenet", **SMALL)
    assert len(imagenet(str(folder), name="mini", **SMALL).classes) == 3


def test_images_outside_of_class_folders(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "flat")
    for path in files_of(tmp_path / "flat", "val"):
        path.rename(tmp_path / "flat" / "val" / path.name)
    with pytest.raises(ValueError, match=r"flat/val has images outside of class folders"):
        imagenet(str(tmp_path / "flat"), **SMALL)


def archive_of(images: dict[str, Image.Image]) -> bytes:
    """A tar file with these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, image in images.items():
            content = io.BytesIO()
            image.save(content, "PNG")
            add(archive, name, content.getvalue())
    return buffer.getvalue()


def grey_of_classes(source: ImageData, images: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, int]:
    """The grey level of each class's images, which are uniform."""
    levels: dict[str, set[int]] = {}
    for x, y in images:
        for pixels, label in zip(x, y, strict=True):
            level = pixels[0, 0, 0] * source.std[0] + source.mean[0]
            levels.setdefault(source.classes[label], set()).add(round(255 * float(level)))
    return {name: level for name, (level,) in sorted(levels.items())}


def test_names_alike_but_for_case_or_zeros_have_an_order_of_their_own(tmp_path: Path) -> None:
    names = ["1", "01", "A", "a", "b10", "b2"]
    levels = {name: 40 * i for i, name in enumerate(names)}
    for split, order in (("train", names), ("val", names[::-1])):
        images = {f"{n}/{i}.png": Image.new("RGB", (40, 40), (levels[n],) * 3) for n in order for i in (1, 2)}
        (tmp_path / f"{split}.tar").write_bytes(archive_of(images))
    source = imagenet(str(tmp_path), **SMALL)
    assert source.classes == ("01", "1", "A", "a", "b2", "b10")
    for of_split in (batches(source, augment=Augment()), list(data.evaluation_batches(source, 4))):
        assert grey_of_classes(source, of_split) == dict(sorted(levels.items()))


def test_a_tar_file_of_a_tar_file_per_class_as_imagenets_own(tmp_path: Path) -> None:
    levels = {"n01440764": 50, "n01443537": 200}
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for name, level in levels.items():
                images = {f"{name}_{i}.png": Image.new("RGB", (40, 40), (level,) * 3) for i in range(3)}
                add(archive, f"{name}.tar", archive_of(images))
    source = imagenet(str(tmp_path), **SMALL)
    assert grey_of_classes(source, list(data.evaluation_batches(source, 4))) == levels
    assert len(source.train_images) == 6


def test_a_tar_file_of_the_folder_itself_with_a_link(tmp_path: Path) -> None:
    """As `tar -C train -cf train.tar .` makes it."""
    content = archive_of({f"./{name}/{i}.png": Image.new("RGB", (40, 40)) for name in "ab" for i in (1, 2)})
    for split in ("train", "val"):
        path = tmp_path / f"{split}.tar"
        path.write_bytes(content)
        with tarfile.open(path, "a") as archive:
            link = tarfile.TarInfo("./elsewhere.tar")
            link.type, link.linkname = tarfile.SYMTYPE, "/elsewhere.tar"
            archive.addfile(link)
    source = imagenet(str(tmp_path), **SMALL)
    assert (source.classes, source.train_labels.tolist()) == (("a", "b"), [0, 0, 1, 1])
    for split in ("train", "val"):
        (tmp_path / f"{split}.tar").write_bytes(archive_of({"./1.png": Image.new("RGB", (40, 40))}))
    with pytest.raises(ValueError, match=r"train.tar has images outside of class folders"):
        imagenet(str(tmp_path), **SMALL)


def test_a_tar_file_with_a_damaged_header(tar: Path) -> None:
    with tarfile.open(tar / "val.tar") as archive:
        third = archive.getmembers()[2].offset
    content = bytearray((tar / "val.tar").read_bytes())
    content[third] ^= 1
    (tar / "val.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"val.tar is incomplete or no tar file"):
        imagenet(str(tar), **SMALL)


def test_a_tar_file_that_goes_on_after_its_end(tar: Path) -> None:
    """As `cat` makes it of two, whose second one readers pass over."""
    (tar / "val.tar").write_bytes(2 * (tar / "val.tar").read_bytes())
    with pytest.raises(ValueError, match=r"val.tar is incomplete or no tar file"):
        imagenet(str(tar), **SMALL)


def test_a_tar_file_that_is_written_again(tar: Path) -> None:
    before = {path.name for path in tar.iterdir()}
    first = batches(imagenet(str(tar), **SMALL))
    assert {path.name for path in tar.iterdir()} == before  # the folder may be read-only
    with tarfile.open(tar / "train.tar") as archive:
        images = {m.name: Image.open(archive.extractfile(m)).copy() for m in archive}  # type: ignore[arg-type]
    (tar / "train.tar").write_bytes(archive_of(dict(reversed(images.items()))))
    assert same(batches(imagenet(str(tar), **SMALL)), first)


def test_sixteen_bit_images_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    Image.fromarray(np.full((40, 40), 700, dtype=np.uint16)).save(tmp_path / "copy/val/n01440764/0.png")
    source = imagenet(str(tmp_path / "copy"), **SMALL)
    with pytest.raises(ValueError, match=r"0.png: mode I\S* has more than 8 bits a channel"):
        list(data.evaluation_batches(source, 4))


def test_a_shard_without_a_label_or_images(webdataset: Path, tmp_path: Path) -> None:
    with tarfile.open(webdataset / "imagenet-val-000000.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("extra.jpg"))
    with pytest.raises(ValueError, match=r"imagenet-val-000000.tar: extra.jpg has no label extra.cls"):
        imagenet(str(webdataset), **SMALL)


def test_both_names_of_the_validation_split(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    shutil.copytree(folder / "val", tmp_path / "validation")
    assert len(imagenet(str(tmp_path), **SMALL).test_labels) == 6
