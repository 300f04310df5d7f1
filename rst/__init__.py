"""Randomized Sharpness-Aware Training (RST, G-RST), arXiv 2203.09962."""

from importlib import import_module
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
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
else:

    def __getattr__(name):
        # Imported on first use: PyTorch takes over a second, and `python train.py --help` does without it.
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("rst.optim" if name == "RST" else "rst.schedule"), name)
