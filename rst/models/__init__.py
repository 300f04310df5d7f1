"""The authors' networks, registered with timm on import, and `create`, which builds these and timm's own."""

import difflib
from typing import Any

import timm
import torch
from torch import nn

from rst.models import pyramidnet, resnet, shake_shake, vgg, vit, wide_resnet

__all__ = ["create", "pyramidnet", "resnet", "shake_shake", "vgg", "vit", "wide_resnet"]


def create(
    name: str,
    num_classes: int,
    in_chans: int,
    image_size: tuple[int, int],
    name_from_64_pixels: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The model that timm knows as `name`, for `in_chans`-channel images of `image_size` = (height, width).

    Models of a fixed input size (ViTs and the like) are built for `image_size`. `name_from_64_pixels` is the
    model built instead of `name` where both sides have at least 64 pixels: ImageNet's counterpart of one
    for small images, say. The rest of `kwargs` is the model's own: `width` for this package's,
    `drop_path_rate` and others for timm's. One image passes through the model before it is returned, so that
    one that cannot take the size fails here.

    Raises:
        ValueError: unknown name, an option that the model does not have, or images that it cannot take.
    """
    if name_from_64_pixels is not None and min(image_size) >= 64:
        name = name_from_64_pixels
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"closest are {', '.join(close)}" if close else "timm.list_models() lists them"
        raise ValueError(f"unknown model {name!r}; {hint}")
    try:
        model = _build(name, image_size, kwargs | {"num_classes": num_classes, "in_chans": in_chans}).eval()
        _check_patches(model, image_size)
        with torch.no_grad():
            model(torch.zeros(1, in_chans, *image_size))
    except Exception as error:  # timm's hundreds of models reject options and sizes in as many ways
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        images = f"images of {'×'.join(map(str, (in_chans, *image_size)))}"
        raise ValueError(f"model {name} cannot be used on {images}: {cause}") from error
    return model.train()


def _build(name: str, image_size: tuple[int, int], kwargs: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, img_size=image_size, **kwargs)
    except TypeError as error:  # timm has no list of the models that take img_size; asking builds nothing
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **kwargs)


def _check_patches(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Refuse images of which timm's patch embedding, a convolution, would silently ignore the last pixels."""
    embed = getattr(model, "patch_embed", None)
    conv = getattr(embed, "proj", None)
    if not isinstance(conv, nn.Conv2d) or getattr(embed, "dynamic_img_pad", False):
        return
    height, width = conv.kernel_size
    if conv.stride == (height, width) and (image_size[0] % height or image_size[1] % width):
        raise ValueError(f"height and width must be multiples of its patches' {height}×{width} pixels")
