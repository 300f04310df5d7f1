"""`rst.models.create`: any timm model, fitted to the data set, and one-line errors; and conf/model."""

from pathlib import Path

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rst.models import create

NODES = sorted(Path(__file__).parents[2].glob("conf/model/*.yaml"))


def test_a_vit_is_built_for_the_image_size() -> None:
    model = create("vit_tiny_patch16_224", 10, 3, 32, patch_size=4, drop_path_rate=0.1)
    assert model.patch_embed.num_patches == 8 * 8
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert model.training
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_a_cnn_of_timms_takes_one_channel() -> None:
    model = create("resnet18", 7, 1, 28)
    assert model.conv1.in_channels == 1
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_ours_pass_on_width() -> None:
    assert create("resnet20", 10, 1, 8, width=4).head.in_features == 4 * 4


def test_the_image_passed_through_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("resnet8", num_classes=10, in_chans=3)
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    checked = create("resnet8", 10, 3, 32)
    assert torch.equal(torch.random.get_rng_state(), after)
    for (name, a), b in zip(checked.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("name", "image_size", "kwargs", "message"),
    [
        ("wrn2810", 32, {}, r"unknown model 'wrn2810'; closest are wrn28_10"),
        ("resnet8x", 32, {}, r"unknown model 'resnet8x'; closest are resnet8, "),
        ("qqqqqqqq", 32, {}, r"unknown model 'qqqqqqqq'; timm.list_models\(\) lists them"),
        ("resnet8", 32, {"widht": 8}, r"model resnet8 .* unexpected keyword argument 'widht'"),
        ("resnet8", 32, {"pretrained": True}, r"resnet8 has no pretrained weights"),
        ("resnet18", 32, {"drop_pat_rate": 0.1}, r"unexpected keyword argument 'drop_pat_rate'"),
        ("vit_tiny_patch16_224", 8, {}, r"model vit_tiny_patch16_224 cannot be used on images of 3×8×8: "),
        ("vgg11_bn", 8, {}, r"model vgg11_bn cannot be used on images of 3×8×8: "),
        ("resnet18", 32, {"num_classes": 0}, r"returns \(1, 512\) for one image"),
    ],
)
def test_a_mistake_is_one_line(name: str, image_size: int, kwargs: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message) as caught:
        create(name, **({"num_classes": 10, "in_chans": 3, "image_size": image_size} | kwargs))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.stem)
def test_every_config_node_builds(path: Path) -> None:
    with initialize_config_dir(str(path.parents[1].resolve()), version_base="1.3"):
        node = compose("train", [f"model={path.stem}"]).model
    if path.stem == "timm":
        assert OmegaConf.is_missing(node, "name")
        node.name = "vit_tiny_patch16_224"
    with torch.device("meta"):
        model = instantiate(node)(num_classes=10, in_chans=3, image_size=32)
    if path.stem not in ("timm", "resnet8_wide"):
        # The node's `width` spells out the model's own default.
        with torch.device("meta"):
            default = timm.create_model(node.name)
        assert [p.shape for p in model.parameters()] == [p.shape for p in default.parameters()]
