"""Randomized Sharpness-Aware Training (RST, G-RST), arXiv 2203.09962."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    # On first use: PyTorch takes over a second to import, and `python train.py --help` does without.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("rst.optim" if name == "RST" else "rst.schedule"), name)
