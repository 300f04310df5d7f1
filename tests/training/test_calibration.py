"""Temperature scaling against closed forms and an independent minimiser."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rst.training.calibration import TEMPERATURES, cross_fitted_loss, temperature


def sample(n=400, classes=5, scale=3.0):
    """Logits `scale` times too confident for the labels, which are drawn from softmax(logits / scale)."""
    generator = np.random.default_rng(0)
    right = generator.normal(0, 1.5, (n, classes))
    chances = np.exp(right) / np.exp(right).sum(1, keepdims=True)
    labels = np.array([generator.choice(classes, p=p) for p in chances])
    return (scale * right).astype(np.float32), labels


def test_two_classes_by_hand():
    """Of logits (a, 0) and a share q of the first class, the best T has softmax((a, 0) / T) = (q, 1 − q)."""
    logits, labels = np.tile([4.0, 0.0], (10, 1)), np.array([0] * 8 + [1] * 2)
    assert temperature(logits, labels) == pytest.approx(4 / math.log(4), rel=1e-4)
    # Every other image: 4 of 5 in each half, so each is scored at the best temperature of all.
    mixed = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1])
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert cross_fitted_loss(logits, mixed) == pytest.approx(entropy, rel=1e-8)


def test_each_half_is_scored_at_the_others_temperature():
    logits, labels = sample()
    z, y = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    grid = torch.logspace(-1, 2, 30_001, dtype=torch.float64)

    def best(half):
        return min(grid[::10].tolist(), key=lambda t: F.cross_entropy(z[half] / t, y[half]).item())

    even, odd = slice(0, None, 2), slice(1, None, 2)
    scores = [F.cross_entropy(z[ours] / best(other), y[ours]) for ours, other in ((even, odd), (odd, even))]
    assert cross_fitted_loss(logits, labels) == pytest.approx(sum(s.item() for s in scores) / 2, rel=1e-4)
    assert best(even) == pytest.approx(temperature(logits[even], labels[even]), rel=2e-3)


def test_the_scale_of_logits_does_not_matter_and_scaling_helps():
    logits, labels = sample()
    scaled = cross_fitted_loss(logits, labels)
    assert scaled == pytest.approx(cross_fitted_loss(logits / 7, labels), rel=1e-6)
    assert scaled < F.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item() - 0.1


def test_no_temperature_is_beyond_the_bounds():
    """Where every answer is right, ever colder is ever better; where all are wrong, ever hotter."""
    logits = np.eye(4)
    assert TEMPERATURES[0] <= temperature(logits, np.arange(4)) < 0.05
    assert temperature(logits, (np.arange(4) + 1) % 4) == pytest.approx(TEMPERATURES[1], rel=1e-3)


def test_without_a_mistake_in_a_half_no_temperature_is_best():
    logits, labels = np.tile(np.eye(4), (2, 1)), np.arange(8) % 4
    assert cross_fitted_loss(logits, labels) is None
    labels[0] = 1  # in the other half there is none yet
    assert cross_fitted_loss(logits, labels) is None
    labels[1] = 2
    assert math.isfinite(cross_fitted_loss(1e4 * logits, labels))
