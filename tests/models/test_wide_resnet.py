"""Wide residual networks: their shortcuts."""

import timm
import torch
from torch import nn

from rst.models.wide_resnet import WideBlock


def test_shortcut_averages_and_pads_with_zeros() -> None:
    block = WideBlock(2, 6, 2, activate_shortcut=False)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 2, 4, 4)
    y = block(x)
    assert torch.allclose(y[:, :2], x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)), atol=1e-6)
    assert not y[:, 2:].any()


def test_only_the_first_block_activates_its_shortcut() -> None:
    model = timm.create_model("wrn28_10", width=16)
    blocks = [m for m in model.modules() if isinstance(m, WideBlock)]
    assert [b.activate_shortcut for b in blocks] == [True] + [False] * 11
    nn.init.zeros_(blocks[0].conv2.weight)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(blocks[0](x), blocks[0].norm1(x).relu())
