"""Vision transformers of 4×4 patches for small images, on timm's `VisionTransformer`.

They keep timm's initialisation (truncated normal of standard deviation 0.02): `registry.initialize` is the
paper's rule for convolutional networks.
"""

from typing import Any

from timm.models import VisionTransformer

from rst.models.registry import register


def vit_patch4(embed_dim: int, num_heads: int, **kwargs: Any) -> VisionTransformer:
    """Class token, `depth` blocks of width `embed_dim`, hidden layers four times as wide.

    The paper's dropout of 0.1 follows the position embedding (`pos_drop_rate`), the attention's projection
    and both layers of each MLP (`proj_drop_rate`), where Dosovitskiy et al. 2021 have theirs (appendix B.1);
    not the attention weights. `kwargs` may change these and any other option of timm's.
    """
    defaults: dict[str, Any] = {
        "img_size": 32,
        "num_classes": 10,
        "depth": 12,
        "pos_drop_rate": 0.1,
        "proj_drop_rate": 0.1,
    }
    return VisionTransformer(patch_size=4, embed_dim=embed_dim, num_heads=num_heads, **(defaults | kwargs))


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
