"""Vision transformers: timm's, with the paper's patches and dropout."""

import math

import pytest
import timm
import torch
from torch import nn

import rst.models  # noqa: F401  registers the models


def build(**options: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch4", depth=2, **options)


def test_dropout_follows_the_position_embedding_and_every_dense_layer_but_qkv() -> None:
    model = build()
    dropouts = {key: m.p for key, m in model.named_modules() if isinstance(m, nn.Dropout)}
    expected = {
        "pos_drop": 0.1,
        **{f"blocks.{i}.{key}": 0.1 for i in (0, 1) for key in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")},
    }
    assert {key: p for key, p in dropouts.items() if p} == expected
    rates = {"pos_drop_rate": 0.0, "proj_drop_rate": 0.0}
    assert not any(m.p for m in build(**rates).modules() if isinstance(m, nn.Dropout))


@pytest.mark.parametrize(
    ("name", "width", "heads"),
    [("vit_tiny_patch4", 192, 3), ("vit_small_patch4", 384, 6), ("vit_base_patch4", 768, 12)],
)
def test_sizes(name: str, width: int, heads: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert len(model.blocks) == 12
    assert model.blocks[0].attn.num_heads == heads
    assert model.blocks[0].mlp.fc1.weight.shape == (4 * width, width)
    assert model.cls_token.shape == (1, 1, width)
    assert model.pos_embed.shape == (1, 1 + 8 * 8, width)


def test_initialisation_is_timms() -> None:
    """Within 5 standard errors of 0.02, for one matrix; the seed is fixed."""
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(32, 4, 3, 10, embed_dim=192, num_heads=3, depth=2)
    for (key, a), b in zip(model.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    weight = model.blocks[0].attn.qkv.weight
    assert weight.std().item() == pytest.approx(0.02, rel=5 * math.sqrt(1 / (2 * weight.numel())))


def test_images_of_any_multiple_of_the_patch() -> None:
    model = build(img_size=(8, 20), in_chans=1, num_classes=7)
    assert model.patch_embed.grid_size == (2, 5)
    assert model(torch.zeros(2, 1, 8, 20)).shape == (2, 7)
