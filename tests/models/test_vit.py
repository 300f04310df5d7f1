"""Vision transformers: timm's, with the paper's patches and dropout."""

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
        **{
            f"blocks.{i}.{key}": 0.1
            for i in (0, 1)
            for key in ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2")
        },
    }
    assert {key: p for key, p in dropouts.items() if p} == expected
    rates = {"pos_drop_rate": 0.0, "proj_drop_rate": 0.0, "attn_drop_rate": 0.0}
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


def test_initialisation_is_the_authors() -> None:
    """Standard deviations within 5 standard errors, at most 1/√(2n) of n weights; the seed is fixed."""
    torch.manual_seed(0)
    model = build()
    expected = {"pos_embed": 0.02, "patch_embed.proj.weight": (3 * 16) ** -0.5}
    for i in (0, 1):
        expected |= {f"blocks.{i}.attn.qkv.weight": 192**-0.5, f"blocks.{i}.attn.proj.weight": 192**-0.5}
        expected |= {f"blocks.{i}.mlp.fc{j}.weight": (2 / (5 * 192)) ** 0.5 for j in (1, 2)}
        expected |= {f"blocks.{i}.mlp.fc{j}.bias": 1e-6 for j in (1, 2)}
    seen = {key: p for key, p in model.named_parameters() if p.any() and "norm" not in key}
    assert seen.keys() == expected.keys()
    for key, p in seen.items():
        assert p.std().item() == pytest.approx(expected[key], rel=5 / (2 * p.numel()) ** 0.5), key
    attention, mlp = expected["blocks.0.attn.qkv.weight"], expected["blocks.0.mlp.fc1.weight"]
    assert [attention, mlp] == pytest.approx([0.072, 0.046], abs=5e-4)


def test_initialisation_may_be_timms() -> None:
    torch.manual_seed(0)
    model = build(weight_init="")
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(32, 4, 3, 10, embed_dim=192, num_heads=3, depth=2)
    for (key, a), b in zip(model.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_images_of_any_multiple_of_the_patch() -> None:
    model = build(img_size=(8, 20), in_chans=1, num_classes=7)
    assert model.patch_embed.grid_size == (2, 5)
    assert model(torch.zeros(2, 1, 8, 20)).shape == (2, 7)
