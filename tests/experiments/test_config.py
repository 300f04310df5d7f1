"""Every option composes and builds; presets hold only keys that exist, and win."""

import inspect
import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import rst
import rst.experiments.command_line  # registers the resolver that conf/train.yaml uses
from rst.data import ImageData
from rst.experiments.settings import check_groups
from rst.training.loop import Training

CONF = ROOT / "conf"
GROUPS = sorted({path.parent.name for path in CONF.glob("*/*.yaml")} - {"table", "columns"})
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
PRESETS = sorted(p for p in CONF.rglob("*.yaml") if p.read_text().startswith("# @package _global_"))


def composed(*overrides):
    if "model=timm" in overrides:
        overrides = (*overrides, "model.name=resnet8")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


def leaves(node, path=""):
    for key, value in node.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value:
            yield from leaves(value, where)
        else:
            yield where


def unknown_keys(preset, group=None):
    """Keys of a preset that the configuration it applies to does not have."""
    chosen = []
    for default in preset.get("defaults", []):
        if isinstance(default, dict):  # else a preset beside it, which is checked for itself
            ((key, option),) = default.items()
            if key.startswith("override "):
                chosen.append(f"{key.removeprefix('override ').removeprefix('/')}={option}")
    base = OmegaConf.to_container(composed(*chosen))
    # A method, say, *is* its node: what it holds is checked by building it. Not every optimizer has an l2.
    own = {"defaults", "hydra", group} | ({"l2"} if group == "optimizer" else set())
    values = {k: v for k, v in preset.items() if k not in own}
    return sorted(set(leaves(values)) - set(leaves(base)))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_presets_hold_only_keys_that_exist(path):
    preset = OmegaConf.to_container(OmegaConf.load(path))
    assert unknown_keys(preset, path.parent.name) == []
    assert set(preset.get("hydra", {"sweeper": 0})) == {"sweeper"}


def test_a_misspelt_key_is_found():
    preset = {"defaults": [{"override /model": "resnet8"}], "model": {"widht": 8}, "epoch": 1}
    assert unknown_keys(preset, "recipe") == ["epoch", "model.widht"]


def test_presets_win_over_the_defaults():
    assert composed().epochs == 200
    assert composed("protocol=quick").epochs == 30
    assert composed("protocol=cpu").dataset.train_size == 1000
    assert composed("protocol=quick", "epochs=3").epochs == 3


def test_defaults_are_cifar10_and_rst():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        choices = compose("train", return_hydra_config=True).hydra.runtime.choices
    assert (choices.dataset, choices.method) == ("cifar10", "rst")
    assert len((CONF / "train.yaml").read_text().splitlines()) <= 60


@pytest.fixture(scope="module")
def tiny_data():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(8) % 2
    return ImageData(images, labels, images, labels, ("a", "b"), (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_builds(group, option, tiny_data, tmp_path):
    """Calls each node as train.py does: a wrong keyword in a `_partial_` only raises then."""
    config = OmegaConf.to_container(composed(f"{group}={option}"), resolve=True)
    check_groups(config)

    def build(name):
        return instantiate(config[name], _convert_="all")

    if group in ("dataset", "tracker", "model", "protocol"):
        # Data that may be absent, and models of a size that has tests of its own: the keywords are bound.
        late = {
            "dataset": {},
            "model": {"num_classes": 2, "in_chans": 3, "image_size": (32, 32)},
            "tracker": {"run_name": "r", "group": "g", "tags": [], "folder": tmp_path, "config": {}},
        }
        for name in late if group == "protocol" else [group]:
            target = instantiate({**config[name], "_partial_": True})
            inspect.signature(target.func).bind(**target.keywords, **late[name])
        return
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    optimizer = build("method")(
        build("optimizer")(model.parameters()), build("schedule"), 4, module=model, seed=0
    )
    assert isinstance(optimizer, rst.RST)
    augment = replace(build("augment"), random_resized_crop=False)  # for streamed images: test_imagenet.py
    training = Training(
        model, optimizer, build("lr_schedule"), tiny_data, augment, epochs=1, batch_size=2, seed=0
    )
    (metrics,) = [each for each in training.run() if each]
    assert metrics["steps"] == 4


@pytest.mark.parametrize(
    ("override", "schedule"),
    [
        ("schedule=constant", rst.Constant(0.25)),
        ("schedule=piecewise", rst.Piecewise(0.0, 1.0, 0.75)),
        ("schedule=linear", rst.Linear(0.0, 0.5)),
        ("schedule=trigonometric", rst.Cosine(0.0, 0.5)),
        ("schedule=piecewise1", rst.Piecewise(0.0, 1.0, 0.25)),
        ("schedule=piecewise2", rst.Piecewise(1.0, 0.0, 0.25)),
        ("schedule=piecewise3", rst.Piecewise(0.25, 0.75, 0.5)),
        ("schedule=linear1", rst.Linear(0.0, 0.5)),
        ("schedule=linear2", rst.Linear(0.25, 0.75)),
    ],
)
def test_schedules_take_p(override, schedule):
    assert instantiate(composed(override, "schedule.p=0.25").schedule) == schedule


def test_families_take_a_direction():
    falling = ["schedule.p=0.75", "schedule.rising=false"]
    assert instantiate(composed("schedule=linear", *falling).schedule) == rst.Linear(1.0, 0.5)
    assert instantiate(composed("schedule=piecewise", *falling).schedule) == rst.Piecewise(1.0, 0.0, 0.75)
    assert instantiate(composed("schedule=trigonometric", *falling).schedule) == rst.Cosine(1.0, 0.5)
    assert instantiate(composed("schedule=constant", *falling).schedule) == rst.Constant(0.75)


def test_every_preset_says_where_its_numbers_come_from():
    for path in CONF.glob("protocol/*.yaml"):
        header = path.read_text().split("defaults:")[0]
        assert re.search("Command:", header), path
        assert re.search("choice|authors|paper", header), path


def test_protocols_leave_the_other_choices_alone():
    """They choose options and set what every run has, so any of these goes with any other option."""
    assert composed("protocol=cpu", "model=wrn28_10").model == composed("model=wrn28_10").model
    for protocol in ("quick", "cpu"):
        for choice in ("dataset=cifar10", "augment=cutout"):
            group = choice.split("=")[0]
            plain = dict(composed(choice)[group])
            preset = dict(composed(f"protocol={protocol}", choice)[group])
            assert {key for key in preset if preset[key] != plain[key]} <= {"train_size"}
