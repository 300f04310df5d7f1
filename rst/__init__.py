"""Randomized Sharpness-Aware Training (RST, G-RST), arXiv 2203.09962."""

from rst.optim import RST
from rst.schedule import (
    Constant,
    Cosine,
    Linear,
    Periodic,
    Piecewise,
    Warmup,
    expected_propagations,
    propagations_std,
    uniform,
)

__version__ = "0.1.0"
__all__ = [
    "RST",
    "Constant",
    "Cosine",
    "Linear",
    "Periodic",
    "Piecewise",
    "Warmup",
    "expected_propagations",
    "propagations_std",
    "uniform",
]
