"""What the authors' experiments need: `protocol=paper` takes it, and other runs stay what they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

import rst.experiments.choices  # noqa: F401  registers the resolver that conf/train.yaml uses
from rst.experiments.measure_sharpness import measure
from rst.models.shake import ShakeDrop
from rst.models.shake_shake import ShiftedShortcut
from rst.training.identity import identity


def composed(arguments: str) -> dict[str, Any]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose("train", arguments.split()), resolve=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("protocol=quick method=grst schedule=linear seed=0", "r20d11138"),
        (
            "protocol=cpu method=rst schedule=piecewise schedule.p=0.25 schedule.rising=false seed=3",
            "r493c8210",
        ),
        (
            "protocol=cpu dataset.train_size=1500 epochs=100 method=sgd dataset.validation=true seed=1",
            "rcbedb2e8",
        ),
    ],
)
def test_recorded_runs_keep_their_identity(arguments: str, expected: str) -> None:
    assert identity(composed(arguments)) == expected


CIFAR = {"policies": "authors", "mixup_first": True}
USUAL = {"policies": "torchvision", "mixup_first": False}


@pytest.mark.parametrize(
    ("arguments", "augment"),
    [
        ("dataset=cifar10 model=resnet18", CIFAR | {"autoaugment": None}),
        ("dataset=cifar100 model=wrn28_10 augment=autoaugment", CIFAR | {"autoaugment": "auto"}),
        (
            "dataset=cifar10 model=pyramidnet272_shakedrop",
            CIFAR | {"autoaugment": "auto", "cutout": 16, "mixup": 1},
        ),
        ("dataset=cifar10 model=wrn2x96_shakeshake", CIFAR),
        ("dataset=cifar10 model=vit_tiny augment=mixup", CIFAR | {"mixup": 1}),
        ("dataset=imagenet model=resnet50", USUAL | {"autoaugment": None}),
        ("dataset=imagenet model=vgg16_bn", USUAL),
    ],
)
def test_the_papers_recipes_clip_and_augment_as_the_authors(arguments: str, augment: dict[str, Any]) -> None:
    config = composed(f"protocol=paper {arguments}")
    assert config["clip_norm"] == 2.0
    assert augment.items() <= config["augment"].items()
    assert config["warmup_epochs"] == 0
    assert composed(arguments)["clip_norm"] == 5.0
    assert composed(arguments)["augment"].items() >= USUAL.items()
    assert (
        composed(f"protocol=paper {arguments} augment.policies=torchvision clip_norm=5")["clip_norm"] == 5.0
    )


def test_warmup_is_a_recipe_of_its_own() -> None:
    config = composed("protocol=paper model=vit_tiny recipe=cifar_vit_warmup method=gnp method.gamma=1")
    plain = composed("protocol=paper model=vit_tiny method=gnp method.gamma=1")
    assert config == plain | {"warmup_epochs": 40}
    assert plain["optimizer"]["weight_decay"] == 0.3


def built(arguments: str, side: int, classes: int) -> nn.Module:
    with torch.device("meta"):
        return instantiate(composed(arguments)["model"])(
            num_classes=classes, in_chans=3, image_size=(side, side)
        )


@pytest.mark.parametrize(("name", "parameters"), [("", 26_210_810), ("_shakedrop", 26_210_842)])
def test_pyramidnets_have_a_norm_after_the_stem_only_with_shakedrop(name: str, parameters: int) -> None:
    model = built(f"model=pyramidnet272{name}", 32, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {m.gate for m in model.modules() if isinstance(m, ShakeDrop)} == ({"image"} if name else set())


def test_the_models_options_are_the_authors() -> None:
    shortcuts = [
        m for m in built("model=wrn2x96_shakeshake", 32, 10).modules() if isinstance(m, ShiftedShortcut)
    ]
    assert [m.kind for m in shortcuts] == ["authors"] * 3
    vit = composed("model=vit_small")["model"]
    assert (vit["attn_drop_rate"], vit["weight_init"]) == (0.1, "authors")
    for side in (32, 224):
        vgg = built("model=vgg16_bn", side, 10)
        assert [m.p for m in vgg.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert composed("dataset=imagenet")["dataset"]["interpolation"] == "bicubic"


def test_sharpness_is_measured_at_the_protocols_radius_whatever_the_methods(
    run_train: Any, tmp_path: Path
) -> None:
    short = ["protocol=quick", "epochs=1", "model.width=4", "dataset.train_size=128", f"outputs={tmp_path}"]
    run_train(*short, "method=asam")
    (folder,) = tmp_path.glob("*asam*")
    measured = []
    for rho in (None, 0.02):
        measure(folder, images=40, rho=rho)
        measured.append(json.loads((folder / "sharpness.json").read_text()))
    assert [one["rho"] for one in measured] == [0.1, 0.02]
    assert measured[0]["in_ball"] > 2 * measured[1]["in_ball"]
