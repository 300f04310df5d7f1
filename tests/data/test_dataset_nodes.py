"""conf/dataset and conf/augment list every keyword of what they build, at its default."""

import inspect
from pathlib import Path

import hydra.utils
import pytest
from omegaconf import OmegaConf

import rst.data
from rst.data import Augment

CONF = Path(__file__).parents[2] / "conf"
# `root` has no default in code; the folder's name stands in for a name that is not given.
FILLED_IN = {"root", "name"}


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100", "image_folder"])
def test_dataset_node_lists_every_keyword_at_its_default(name: str) -> None:
    node = OmegaConf.to_container(OmegaConf.load(CONF / "dataset" / f"{name}.yaml"), resolve=False)
    assert isinstance(node, dict)
    assert hydra.utils.get_object(node.pop("_target_")) is getattr(rst.data, name)
    parameters = inspect.signature(getattr(rst.data, name)).parameters
    assert list(node) == list(parameters)
    for keyword, parameter in parameters.items():
        if keyword not in FILLED_IN:
            assert node[keyword] == parameter.default, keyword


def test_image_folder_is_named_after_its_root() -> None:
    config = OmegaConf.create({"dataset": OmegaConf.load(CONF / "dataset" / "image_folder.yaml")})
    config.dataset.root = "data/flowers"
    assert config.dataset.name == "data/flowers"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", Augment()),
        ("basic", Augment(flip=True, crop_padding=4)),
        ("cutout", Augment(flip=True, crop_padding=4, cutout=16)),
    ],
)
def test_augment_node(name: str, expected: Augment) -> None:
    node = OmegaConf.load(CONF / "augment" / f"{name}.yaml")
    assert set(node) - {"_target_"} == {"flip", "crop_padding", "cutout"}
    assert hydra.utils.instantiate(node) == expected
