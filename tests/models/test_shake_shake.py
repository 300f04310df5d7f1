"""Shake-Shake networks: branches, shortcuts, groups."""

import pytest
import timm
import torch
from torch import nn

from rst.models.shake_shake import ShakeShakeBlock, ShiftedShortcut


def shortcut_of(kind: str, x: torch.Tensor) -> torch.Tensor:
    shortcut = ShiftedShortcut(1, 2, 2, kind).eval()
    for conv in (shortcut.conv1, shortcut.conv2):
        nn.init.ones_(conv.weight)
    return shortcut(x) * (1 + 1e-5) ** 0.5  # BatchNorm in evaluation divides by √(1 + eps)


def test_the_second_half_of_the_shortcut_sees_the_pixels_right_of_and_below_those_of_the_first() -> None:
    x = torch.randn(2, 1, 6, 8)
    y = shortcut_of("authors", x)
    assert torch.allclose(y[:, 0], x[:, 0, ::2, ::2], atol=1e-6)
    assert torch.allclose(y[:, 1], x[:, 0, 1::2, 1::2], atol=1e-6)
    x = torch.randn(2, 1, 5, 7)  # of odd sides, the last row and column have none
    y = shortcut_of("authors", x)
    assert torch.allclose(y[:, 1, :-1, :-1], x[:, 0, 1::2, 1::2], atol=1e-6)
    assert not y[:, 1, -1].any() and not y[:, 1, :, -1].any()


def test_gastaldis_shortcut_is_rectified_and_shifted_the_other_way() -> None:
    x = torch.randn(2, 1, 6, 8)
    y = shortcut_of("gastaldi", x)
    assert torch.allclose(y[:, 0], x[:, 0, ::2, ::2].relu(), atol=1e-6)
    assert torch.allclose(y[:, 1, 1:, 1:], x[:, 0, 1:-1:2, 1:-1:2].relu(), atol=1e-6)
    assert not y[:, 1, 0].any() and not y[:, 1, :, 0].any()


@pytest.mark.parametrize(("outputs", "stride"), [(4, 1), (8, 2)])
def test_in_evaluation_a_block_is_the_mean_of_its_branches_and_the_shortcut(
    outputs: int, stride: int
) -> None:
    block = ShakeShakeBlock(4, outputs, stride).eval()
    assert isinstance(block.shortcut, nn.Identity) is (outputs == 4)
    x = torch.randn(2, 4, 6, 6)

    def run(branch: nn.Module) -> torch.Tensor:
        _, conv1, norm1, _, conv2, norm2 = branch.children()
        return norm2(conv2(norm1(conv1(x.relu())).relu()))

    expected = (run(block.branch1) + run(block.branch2)) / 2 + block.shortcut(x)
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_the_input_is_left_alone() -> None:
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    ShakeShakeBlock(4, 4, 1)(x)
    assert torch.equal(x, before)


def test_three_groups_of_four_blocks() -> None:
    with torch.device("meta"):
        model = timm.create_model("wrn2x96_shakeshake")
        x = model.stem(torch.zeros(1, 3, 32, 32))
        shapes = [tuple((x := block(x)).shape[1:3]) for group in model.groups for block in group]
    assert shapes == [(96, 32)] * 4 + [(192, 16)] * 4 + [(384, 8)] * 4


def test_the_model_has_the_shortcut_asked_for() -> None:
    for options, kind in (({}, "authors"), ({"shortcut": "gastaldi"}, "gastaldi")):
        model = timm.create_model("wrn2x96_shakeshake", width=2, **options)
        kinds = [m.kind for m in model.modules() if isinstance(m, ShiftedShortcut)]
        assert kinds == [kind] * 3
    with pytest.raises(ValueError, match="shortcut must be authors or gastaldi, got other"):
        timm.create_model("wrn2x96_shakeshake", width=2, shortcut="other")


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="width must be at least 2 channels and even, got 3"):
        timm.create_model("wrn2x96_shakeshake", width=3)


def test_the_last_features_are_rectified() -> None:
    model = timm.create_model("wrn2x96_shakeshake", width=2).eval()
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 8, 8)
    model(x)
    assert torch.equal(seen[0], model.groups(model.stem(x)).relu().mean((2, 3)))
