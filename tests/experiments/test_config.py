"""Every option composes and builds, and presets win over defaults."""

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
GROUPS = [*(group for group in GIVEN if group != "model"), "protocol", "recipe"]  # see tests/models
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


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
    """Data sets may be absent: their options are checked. A misspelt key is refused wherever it is."""
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


@pytest.mark.parametrize(
    ("protocol", "own"),
    [("quick", set()), ("cpu", {"train_size"}), ("folds", {"crop_padding", "fold", "folds"})],
)
def test_protocols_leave_the_options_of_other_groups_alone(protocol, own):
    """They choose options and set what every run has, so that they go with any other option."""
    choices = ["dataset=cifar10", "augment=cutout", "model=wrn28_10", "optimizer=adamw", "l2=0"]
    plain, preset = composed(*choices), composed(f"protocol={protocol}", *choices)
    for group in ("dataset", "augment", "model", "optimizer"):
        of_plain, of_preset = dict(plain[group]), dict(preset[group])
        assert {key for key in of_plain if of_plain[key] != of_preset[key]} <= own
        assert of_plain.keys() == of_preset.keys()
