"""How a model of this package becomes one of timm's, and the initialisation that they all share."""

import functools
import math
from collections.abc import Callable
from typing import Any

from timm.models import is_model, register_model
from torch import nn


def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register `build(num_classes, in_chans, ...)` with timm under its name; `timm.create_model` finds it.

    Raises:
        RuntimeError: timm has a model of that name, which registering would silently replace.
    """
    name = build.__name__
    if is_model(name):
        raise RuntimeError(f"timm already has a model called {name}: give ours another name")

    @functools.wraps(build)
    def entrypoint(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **kwargs: Any,
    ) -> nn.Module:
        if pretrained or pretrained_cfg or pretrained_cfg_overlay:
            raise ValueError(f"{name} has no pretrained weights: create it with pretrained=False")
        return build(**kwargs)

    return register_model(entrypoint)


def initialize(model: nn.Module) -> None:
    """Convolutions He normal with fan-out, dense layers U(−1/√n_out, 1/√n_out), every bias 0.

    This is the initialisation of the authors' models. BatchNorm keeps torch's defaults, which are theirs:
    scale 1, shift 0, eps 1e-5, and momentum 0.1, in torch the weight of the *new* statistics.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.out_features)
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
