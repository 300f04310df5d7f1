"""Every option composes and builds; presets hold only keys that exist, and win."""

import re

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import rst
import rst.experiments.choices  # registers the resolver that conf/train.yaml uses
from rst.training.parts import GIVEN, part, rehearse
from rst.training.settings import read_settings

CONF = ROOT / "conf"
GROUPS = [*GIVEN, "protocol", "recipe"]
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
        if isinstance(default, dict):  # else another preset, which has its own check
            ((key, option),) = default.items()
            if key.startswith("override "):
                chosen.append(f"{key.removeprefix('override ').removeprefix('/')}={option}")
    base = OmegaConf.to_container(composed(*chosen))
    # A method's options, say, are checked by building it. `l2` comes from conf/optimizer.
    elsewhere = {"defaults", "hydra", group} | ({"l2"} if group == "optimizer" else set())
    values = {k: v for k, v in preset.items() if k not in elsewhere}
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


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_can_be_built(group, option, tmp_path):
    """Data that may be absent and models are built elsewhere: here their options are checked."""
    settings = read_settings(OmegaConf.to_container(composed(f"{group}={option}"), resolve=True))
    rehearse(settings)
    part(settings.tracker)(run_name="r", group="g", tags=[], folder=tmp_path, config={})


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
        ("schedule=linear schedule.rising=false", rst.Linear(0.5, 0.0)),
        ("schedule=piecewise schedule.rising=false", rst.Piecewise(1.0, 0.0, 0.25)),
        ("schedule=trigonometric schedule.rising=false", rst.Cosine(0.5, 0.0)),
    ],
)
def test_schedules_take_p(override, schedule):
    assert instantiate(composed(*override.split(), "schedule.p=0.25").schedule) == schedule


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
