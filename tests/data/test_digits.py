"""scikit-learn's digits: the fixed split, what the seed draws, and label noise in training labels only."""

import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from rst import data
from rst.data import ImageData
from rst.data.images import part_of


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.tobytes() for image in images.numpy()}


def true_labels(split: ImageData) -> dict[bytes, int]:
    return {
        image.tobytes(): int(label)
        for image, label in zip(split.train_images.numpy(), split.train_labels, strict=True)
    }


def test_shapes_types_and_values() -> None:
    digits = data.digits()
    assert digits.train_images.shape == (1297, 1, 8, 8)
    assert digits.test_images.shape == (500, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_labels.dtype == torch.int64
    assert digits.classes == tuple("0123456789")
    both = torch.cat([digits.train_images, digits.test_images])
    assert both.unique().tolist() == [round(v * 255 / 16) for v in range(17)]
    assert len(rows(both)) == len(rows(torch.from_numpy(load_digits().images.astype(np.uint8))))


def test_split_is_stratified_and_never_changes() -> None:
    digits = data.digits()
    share = torch.from_numpy(load_digits().target).bincount() * 500 / 1797
    assert torch.all((digits.test_labels.bincount() - share).abs() < 1)
    for seed in range(3):
        other = data.digits(label_noise=0.4, seed=seed)
        assert torch.equal(other.test_images, digits.test_images)
        assert torch.equal(other.test_labels, digits.test_labels)
        assert torch.equal(other.train_images, digits.train_images)


def test_draws_never_change() -> None:
    """Recorded results depend on them: a change of scikit-learn or of the streams must not go unseen."""

    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]

    assert digest(data.digits().test_images) == "63dcec3d9c98214f"
    assert digest(data.digits(validation=True, seed=1).test_images) == "95873b15a4d3eb5b"
    assert digest(data.digits(train_size=100, seed=1).train_images) == "74d98ab765f5470b"
    assert digest(data.digits(label_noise=0.4, seed=1).train_labels) == "fbaaf741e427d2a2"
    assert digest(part_of(data.digits().train_labels, fold=2, folds=10, seed=0)) == "f60f89f2bd143548"


def test_mean_and_std_are_of_the_training_images() -> None:
    digits = data.digits(train_size=100, seed=1)
    pixels = data.digits().train_images.double() / 255
    assert digits.mean == pytest.approx([pixels.mean().item()], abs=1e-12)
    assert digits.std == pytest.approx([pixels.std(correction=0).item()], abs=1e-12)


def test_label_noise_changes_training_labels_only() -> None:
    clean, noisy = data.digits(), data.digits(label_noise=0.4, seed=5)
    changed = int((clean.train_labels != noisy.train_labels).sum())
    # Of round(0.4·1297) = 519 replaced labels a tenth stays: 467 ± 6.8; within 5 standard deviations.
    assert 433 <= changed <= 501
    assert torch.equal(clean.test_labels, noisy.test_labels)
    assert torch.equal(noisy.train_labels, data.digits(label_noise=0.4, seed=5).train_labels)
    assert not torch.equal(noisy.train_labels, data.digits(label_noise=0.4, seed=6).train_labels)


def test_validation_holds_out_a_tenth_with_true_labels() -> None:
    truth = true_labels(data.digits())
    split = data.digits(label_noise=1.0, validation=True, seed=2)
    assert (len(split.train_labels), len(split.test_labels)) == (1297 - 129, 129)
    assert rows(split.train_images) | rows(split.test_images) == set(truth)
    assert not rows(split.train_images) & rows(split.test_images)
    assert [truth[image.tobytes()] for image in split.test_images.numpy()] == split.test_labels.tolist()


def test_noise_is_a_share_of_what_is_trained_on() -> None:
    truth = true_labels(data.digits())
    part = data.digits(label_noise=1.0, train_size=200, seed=2)
    kept = sum(
        truth[image.tobytes()] == int(label)
        for image, label in zip(part.train_images.numpy(), part.train_labels, strict=True)
    )
    assert len(part.train_labels) == 200
    assert kept <= 45  # 20 ± 4.2 random labels are the true one; 6 standard deviations
    # Noise does not move the part that is drawn.
    assert torch.equal(part.train_images, data.digits(train_size=200, seed=2).train_images)


def test_bad_values() -> None:
    with pytest.raises(ValueError, match=r"label_noise must be between 0 and 1, got 1\.5"):
        data.digits(label_noise=1.5)
    with pytest.raises(ValueError, match=r"train_size must be 1297 .* got 2000"):
        data.digits(train_size=2000)
    with pytest.raises(ValueError, match="seed must be a non-negative integer, got -1"):
        data.digits(train_size=200, seed=-1)
