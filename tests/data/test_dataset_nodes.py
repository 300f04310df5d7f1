"""conf/dataset and conf/augment list every keyword of what they build, at its default."""

import inspect
from dataclasses import fields
from pathlib import Path

import hydra.utils
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import rst.data
import rst.experiments.command_line
from rst.data import Augment

CONF = Path(__file__).parents[2] / "conf"
# `root` has no default in code; the folder's name stands in for a name that is not given.
FILLED_IN = {"root", "name"}


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100", "image_folder", "imagenet"])
def test_dataset_node_lists_every_keyword_at_its_default(name: str) -> None:
    node = OmegaConf.to_container(OmegaConf.load(CONF / "dataset" / f"{name}.yaml"), resolve=False)
    node = node.get("dataset", node)  # imagenet's is global, as it also chooses an augmentation
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


BASIC = {"flip": True, "crop_padding": 4}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", Augment()),
        ("shift", Augment(crop_padding=1)),
        ("flip", Augment(flip=True)),
        ("basic", Augment(**BASIC)),
        ("cutout", Augment(**BASIC, cutout=16)),
        ("autoaugment", Augment(**BASIC, autoaugment="auto")),
        ("mixup", Augment(**BASIC, mixup=1.0)),
        ("mixup_cutout", Augment(**BASIC, cutout=16, mixup=1.0)),
        ("autoaugment_mixup_cutout", Augment(**BASIC, cutout=16, mixup=1.0, autoaugment="auto")),
        ("inception", Augment(flip=True, random_resized_crop=True)),
    ],
)
def test_augment_node(name: str, expected: Augment) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", [f"augment={name}"]).augment
    assert set(node) - {"_target_"} == {field.name for field in fields(Augment)}
    assert hydra.utils.instantiate(node) == expected


def test_every_augment_option_is_tested_above() -> None:
    tested = {case[0] for mark in test_augment_node.pytestmark for case in mark.args[1]}
    assert tested == {path.stem for path in (CONF / "augment").glob("*.yaml")}
