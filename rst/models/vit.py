"""Vision transformers of 4×4 patches for small images, on timm's `VisionTransformer`."""

from typing import Any

from timm.layers.weight_init import lecun_normal_
from timm.models import VisionTransformer
from torch import nn

from rst.models.registry import register


def vit_patch4(embed_dim: int, num_heads: int, **kwargs: Any) -> VisionTransformer:
    """Class token, `depth` blocks of width `embed_dim`, hidden layers four times as wide.

    The authors' dropout of 0.1 follows the position embedding (`pos_drop_rate`), the attention's projection
    and both layers of each MLP (`proj_drop_rate`), where Dosovitskiy et al. 2021 have theirs (appendix B.1),
    and the attention weights (`attn_drop_rate`), where they have none. `weight_init` "authors" is
    `initialize`, "" timm's truncated normal of standard deviation 0.02; timm has others, too. `kwargs` may
    change these and any other option of timm's.
    """
    defaults: dict[str, Any] = {
        "img_size": 32,
        "num_classes": 10,
        "depth": 12,
        "pos_drop_rate": 0.1,
        "proj_drop_rate": 0.1,
        "attn_drop_rate": 0.1,
        "weight_init": "authors",
    }
    options = defaults | kwargs
    theirs = options["weight_init"] == "authors"
    if theirs:
        options["weight_init"] = "skip"
    model = VisionTransformer(patch_size=4, embed_dim=embed_dim, num_heads=num_heads, **options)
    if theirs:
        initialize(model)
    return model


def initialize(model: VisionTransformer) -> None:
    """The initialisation of the authors, and of Dosovitskiy et al.'s code.

    Xavier uniform for queries, keys and values, each on its own, for the attention's projection and the MLPs:
    standard deviations 1/√d and √(2/5d) at width d, 0.072 and 0.046 for ViT-Ti. Truncated normal of standard
    deviation 1/√fan_in for the patches, normal of 0.02 for the position embedding and of 1e-6 for the MLPs'
    biases. All else, the head among it, is zero.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            lecun_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            for weight in module.weight.chunk(3) if name.endswith("qkv") else (module.weight,):
                nn.init.xavier_uniform_(weight)
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias") and "mlp" in name:
            nn.init.normal_(parameter, std=1e-6)
        elif name.endswith("bias") or name in ("head.weight", "cls_token"):
            nn.init.zeros_(parameter)


@register
def vit_tiny_patch4(**kwargs: Any) -> VisionTransformer:
    """ViT-Ti: width 192, 3 heads."""
    return vit_patch4(192, 3, **kwargs)


@register
def vit_small_patch4(**kwargs: Any) -> VisionTransformer:
    """ViT-S: width 384, 6 heads."""
    return vit_patch4(384, 6, **kwargs)


@register
def vit_base_patch4(**kwargs: Any) -> VisionTransformer:
    """ViT-B: width 768, 12 heads."""
    return vit_patch4(768, 12, **kwargs)
