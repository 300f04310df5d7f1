"""PyramidNets: widths, shortcuts, and ShakeDrop's probabilities."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from rst.models.pyramidnet import PyramidBlock
from rst.models.shake import ShakeDrop


@pytest.mark.parametrize(
    ("name", "blocks", "first", "last"),
    [
        ("pyramidnet164_48", 54, 17, 64),
        ("pyramidnet164_270", 54, 21, 286),
        ("pyramidnet200", 66, 20, 256),
        ("pyramidnet272", 90, 18, 216),
    ],
)
def test_width_grows_from_block_to_block_and_the_image_halves_twice(
    name: str, blocks: int, first: int, last: int
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        x = model.stem(torch.zeros(1, 3, 32, 32))
        shapes = [(x := block(x)).shape for block in model.blocks]
    widths = [shape[1] // 4 for shape in shapes]
    assert (len(widths), widths[0], widths[-1]) == (blocks, first, last)
    exact = [16 + (last - 16) * (i + 1) / blocks for i in range(blocks)]
    assert all(abs(w - e) <= 0.5 for w, e in zip(widths, exact, strict=True))
    assert [shape[2] for shape in shapes] == [side for side in (32, 16, 8) for _ in range(blocks // 3)]


def test_keep_probability_falls_linearly_to_one_half() -> None:
    model = timm.create_model("pyramidnet164_48_shakedrop", alpha=0)
    keeps = [m.keep for m in model.modules() if isinstance(m, ShakeDrop)]
    assert len(keeps) == 54
    assert keeps == pytest.approx([1 - 0.5 * (i + 1) / 54 for i in range(54)], abs=1e-12)
    plain = timm.create_model("pyramidnet164_48", alpha=0)
    assert not any(isinstance(m, ShakeDrop) for m in plain.modules())


def test_options() -> None:
    def stem(name: str, **options: bool) -> nn.Module:
        return timm.create_model(name, alpha=0, **options).stem[1]

    assert isinstance(stem("pyramidnet164_48"), nn.Identity)
    assert isinstance(stem("pyramidnet164_48", stem_norm=True), nn.BatchNorm2d)
    assert isinstance(stem("pyramidnet164_48_shakedrop"), nn.BatchNorm2d)
    for gate in ("image", "batch"):
        model = timm.create_model("pyramidnet164_48_shakedrop", alpha=0, gate=gate)
        assert {m.gate for m in model.modules() if isinstance(m, ShakeDrop)} == {gate}
    with pytest.raises(ValueError, match="gate must be image or batch, got pixel"):
        timm.create_model("pyramidnet164_48_shakedrop", alpha=0, gate="pixel")


def test_shortcut_averages_and_pads_with_zeros() -> None:
    block = PyramidBlock(3, 2, 2, keep=None)
    nn.init.zeros_(block.norm4.weight)
    x = torch.randn(1, 3, 4, 4)
    y = block(x)
    assert torch.equal(y[:, :3], F.avg_pool2d(x, 2))
    assert y.shape == (1, 8, 2, 2) and not y[:, 3:].any()


def test_the_block_is_its_formula_and_shakedrop_leaves_the_shortcut_alone() -> None:
    plain, shaken = PyramidBlock(8, 2, 1, keep=None), PyramidBlock(8, 2, 1, keep=0.0)
    shaken.load_state_dict(plain.state_dict())
    x = torch.randn(4, 8, 3, 3)
    y = plain.conv1(plain.norm1(x))
    y = plain.conv2(plain.norm2(y).relu())
    residual = plain.norm4(plain.conv3(plain.norm3(y).relu()))
    assert torch.allclose(plain(x), residual + x, atol=1e-6)
    factor = (shaken(x) - x) / residual
    assert torch.allclose(factor, factor[:, :1, :1, :1].expand_as(factor), atol=1e-3)
    assert len(factor[:, 0, 0, 0].unique()) == 4


def test_the_last_features_are_normed_and_rectified() -> None:
    model = timm.create_model("pyramidnet164_48", alpha=0)
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    x = torch.randn(4, 3, 8, 8)
    model(x)
    expected = model.norm(model.blocks(model.stem(x))).relu().mean((2, 3))
    assert torch.allclose(seen[0], expected, atol=1e-5)
