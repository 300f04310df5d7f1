"""Randomized Sharpness-Aware Training (RST, G-RST), arXiv 2203.09962."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "AESAM",
    "RST",
    "VSAM",
    "Constant",
    "Cosine",
    "Linear",
    "LookSAM",
    "MomentumSAM",
    "PartialAscent",
    "Periodic",
    "Piecewise",
    "StaleAscent",
    "Warmup",
    "Window",
    "expected_propagations",
    "propagations_std",
    "uniform",
]

if TYPE_CHECKING:
    from rst.optim import RST
    from rst.rivals import AESAM, VSAM, LookSAM, MomentumSAM, PartialAscent, StaleAscent
    from rst.schedule import (
        Constant,
        Cosine,
        Linear,
        Periodic,
        Piecewise,
        Warmup,
        Window,
        expected_propagations,
        propagations_std,
        uniform,
    )
else:
    RIVALS = ("AESAM", "VSAM", "LookSAM", "MomentumSAM", "PartialAscent", "StaleAscent")

    def __getattr__(name):
        # Imported on first use: PyTorch takes over a second, and `python train.py --help` does without it.
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = "optim" if name == "RST" else "rivals" if name in RIVALS else "schedule"
        return getattr(import_module(f"rst.{module}"), name)

    def __dir__():
        return sorted({*globals(), *__all__})
