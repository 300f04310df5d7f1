"""`rst.models.create`: any timm model, fitted to the data set, and one-line errors; and conf/model."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import rst.experiments.command_line  # registers the resolver that conf/train.yaml uses
import rst.models
from rst.models import create

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted(path.stem for path in CONF.glob("model/*.yaml"))


def test_a_vit_is_built_for_the_image_size() -> None:
    model = create("vit_tiny_patch16_224", 10, 3, (32, 32), patch_size=4, drop_path_rate=0.1)
    assert model.patch_embed.num_patches == 8 * 8
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert model.training
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_a_cnn_of_timms_takes_one_channel() -> None:
    model = create("resnet18", 7, 1, (28, 28))
    assert model.conv1.in_channels == 1
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_ours_pass_on_width() -> None:
    assert create("resnet20", 10, 1, (8, 8), width=4).head.in_features == 4 * 4


def test_the_image_passed_through_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("resnet8", num_classes=10, in_chans=3)
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    checked = create("resnet8", 10, 3, (32, 32))
    assert torch.equal(torch.random.get_rng_state(), after)
    for (name, a), b in zip(checked.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["vit_tiny_patch4", "vit_tiny_patch16_224", "resnet8", "resnet18"])
def test_images_need_not_be_square(name: str) -> None:
    with torch.device("meta"):
        model = create(name, 10, 3, (32, 64))
        assert model(torch.zeros(1, 3, 32, 64)).shape == (1, 10)
    if hasattr(model, "patch_embed"):
        patch = model.patch_embed.patch_size[0]
        assert model.patch_embed.grid_size == (32 // patch, 64 // patch)


@pytest.mark.parametrize(
    ("image_size", "ours"), [((32, 32), True), ((63, 200), True), ((200, 63), True), ((64, 64), False)]
)
def test_imagenets_counterpart_is_for_images_of_64_pixels_on_both_sides(
    image_size: tuple[int, int], ours: bool
) -> None:
    with torch.device("meta"):
        model = create("cifar_resnet18", 10, 3, image_size, name_from_64_pixels="resnet18")
    assert isinstance(model, rst.models.resnet.ResNet) is ours


def test_a_model_without_counterpart_is_for_any_size() -> None:
    with torch.device("meta"):
        assert isinstance(create("cifar_resnet18", 10, 3, (96, 96)), rst.models.resnet.ResNet)


@pytest.mark.parametrize(
    ("name", "image_size", "kwargs"),
    [
        ("pvt_v2_b0", (32, 32), {}),  # patches of 7×7 pixels that overlap
        ("vit_tiny_patch16_224", (40, 40), {"dynamic_img_pad": True, "dynamic_img_size": True}),
    ],
)
def test_patches_that_ignore_no_pixel_are_not_refused(
    name: str, image_size: tuple[int, int], kwargs: dict[str, Any]
) -> None:
    with torch.device("meta"):
        create(name, 10, 3, image_size, **kwargs)


@pytest.mark.parametrize(
    ("name", "image_size", "kwargs", "message"),
    [
        ("wrn2810", (32, 32), {}, r"unknown model 'wrn2810'; closest are wrn28_10"),
        ("resnet8x", (32, 32), {}, r"unknown model 'resnet8x'; closest are resnet8, "),
        ("qqqqqqqq", (32, 32), {}, r"unknown model 'qqqqqqqq'; timm.list_models\(\) lists them"),
        (
            "resnet8",
            (64, 64),
            {"name_from_64_pixels": "resnt18"},
            r"unknown model 'resnt18'; closest are resnet18",
        ),
        ("resnet8", (32, 32), {"widht": 8}, r"model resnet8 .* unexpected keyword argument 'widht'"),
        ("resnet8", (32, 32), {"pretrained": True}, r"resnet8 has no pretrained weights"),
        ("resnet18", (32, 32), {"drop_pat_rate": 0.1}, r"unexpected keyword argument 'drop_pat_rate'"),
        (
            "vit_tiny_patch16_224",
            (8, 8),
            {},
            r"model vit_tiny_patch16_224 cannot be used on images of 3×8×8: ",
        ),
        (
            "vit_tiny_patch16_224",
            (32, 40),
            {},
            r"on images of 3×32×40: .* multiples of its patches' 16×16 pixels",
        ),
        ("vit_tiny_patch4", (30, 32), {}, r"on images of 3×30×32: .* multiples of its patches' 4×4 pixels"),
        ("swin_tiny_patch4_window7_224", (34, 32), {}, r"multiples of its patches' 4×4 pixels"),
        ("vgg11_bn", (8, 8), {}, r"model vgg11_bn cannot be used on images of 3×8×8: "),
        ("cifar_vgg16_bn", (32, 31), {}, r"model cifar_vgg16_bn cannot be used on images of 3×32×31: "),
    ],
)
def test_a_mistake_is_one_line(
    name: str, image_size: tuple[int, int], kwargs: dict[str, Any], message: str
) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message) as caught:
        create(name, **({"num_classes": 10, "in_chans": 3, "image_size": image_size} | kwargs))
    assert "\n" not in str(caught.value)


def node(option: str) -> DictConfig:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return compose("train", [f"model={option}"]).model


@pytest.mark.parametrize("option", OPTIONS)
def test_every_config_node_builds(option: str) -> None:
    config = node(option)
    if option == "timm":
        assert OmegaConf.is_missing(config, "name")
        config.name = "vit_tiny_patch16_224"
    with torch.device("meta"):
        model = instantiate(config)(num_classes=10, in_chans=3, image_size=(32, 32))
    if option not in ("timm", "resnet8_wide"):
        # The node's `width` or `alpha` spells out the model's own default.
        with torch.device("meta"):
            default = timm.create_model(config.name)
        assert [p.shape for p in model.parameters()] == [p.shape for p in default.parameters()]


@pytest.mark.parametrize("option", [option for option in OPTIONS if "name_from_64_pixels" in node(option)])
def test_imagenets_counterpart_has_the_options_name(option: str) -> None:
    """A misspelt one would fail at 64 pixels only."""
    with torch.device("meta"):
        model = instantiate(node(option))(num_classes=10, in_chans=3, image_size=(64, 64))
    assert model.default_cfg["architecture"] == option


@pytest.mark.parametrize("option", OPTIONS)
def test_every_config_node_begins_with_a_sentence_about_the_model(option: str) -> None:
    """`train.py --list` shows it, and computes the parameters."""
    lines = (CONF / "model" / f"{option}.yaml").read_text().removeprefix("# @package _global_\n").splitlines()
    assert lines[0].startswith("# ")
    assert "parameters" not in lines[0]


def test_every_network_of_ours_has_a_config_node() -> None:
    ours = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("rst.")}
    assert {node(option).name for option in OPTIONS if option != "timm"} == ours
