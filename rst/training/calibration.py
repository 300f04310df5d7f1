"""The test loss that remains when the confidence of a network is right."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

TEMPERATURES = 0.02, 50.0  # bounds of the search


def cross_fitted_loss(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """Mean cross entropy of softmax(logits / T) in nats, each half of the images at the temperature T that
    minimises it on the other half (temperature scaling, Guo et al. 2017): no image is scored at a temperature
    that its own label chose. The halves are every other image, so each has its share of a class also where
    images are stored class by class. None where a half has no mistake: ever colder is ever better there.

    Args:
        logits: [n, classes], n ≥ 2.
        labels: [n], whole numbers below `classes`.
    """
    logits = logits.astype(np.float64)
    halves = np.arange(len(labels)) % 2 == 0
    is_right = logits.argmax(axis=1) == labels
    if is_right[halves].all() or is_right[~halves].all():
        return None
    of_each = [
        np.count_nonzero(half) * loss(logits[half], labels[half], temperature(logits[~half], labels[~half]))
        for half in (halves, ~halves)
    ]
    return float(sum(of_each) / len(labels))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T within `TEMPERATURES` that minimises `loss`, which is convex in 1/T."""
    low, high = np.log(TEMPERATURES)
    # By its logarithm, to be as precise where T is small.
    minimum = minimize_scalar(
        lambda x: loss(logits, labels, np.exp(x)),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(minimum.x))


def loss(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Mean cross entropy of softmax(logits / temperature)."""
    scaled = logits / temperature
    return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))
