"""`protocol=paper` has the numbers of the authors' recipes, for each kind of model and data set."""

import json

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rst import Constant, Warmup
from rst.experiments.choices import recipe
from rst.training.lr_schedule import cosine, with_warmup
from rst.training.parts import rehearse
from rst.training.settings import read_settings

# epochs, batch size, learning rate, L2, decoupled decay, ρ, warmup epochs
CNN = (200, 256, 0.1, 1e-3, 0.0, 0.1, 0)
VIT = (300, 256, 1e-3, 0.0, 0.3, 0.1, 0)
VIT_MIXUP = (1200, 256, 5e-4, 0.0, 0.03, 0.1, 0)
SHAKEDROP = (1800, 128, 0.05, 5e-4, 0.0, 0.1, 0)
SHAKE_SHAKE = (1800, 256, 0.1, 1e-3, 0.0, 0.1, 0)
IMAGENET_RESNET = (100, 512, 0.2, 1e-4, 0.0, 0.05, 0)
IMAGENET_VGG = (100, 256, 0.1, 1e-4, 0.0, 0.05, 0)

CNNS = ["resnet18", "resnet34", "resnet50", "resnet101"]
CNNS += ["wrn16_4", "wrn28_10", "wrn40_10", "vgg16_bn", "vgg19_bn", "pyramidnet272"]
SHAKEDROPS = [f"pyramidnet{size}_shakedrop" for size in ("164_48", "164_270", "200", "272")]
TABLE = [
    *((f"dataset=cifar10 model={name}", CNN) for name in CNNS),
    ("dataset=cifar100 model=wrn28_10 augment=cutout", CNN),
    ("dataset=cifar100 model=wrn28_10 augment=autoaugment", CNN),
    *((f"dataset=cifar100 model=vit_{size}", VIT) for size in ("tiny", "small", "base")),
    ("dataset=cifar10 model=vit_small augment=mixup", VIT_MIXUP),
    *((f"dataset=cifar10 model={name}", SHAKEDROP) for name in SHAKEDROPS),
    ("dataset=cifar100 model=wrn2x96_shakeshake", SHAKE_SHAKE),
    ("dataset=imagenet model=resnet50", IMAGENET_RESNET),
    ("dataset=imagenet model=resnet101", IMAGENET_RESNET),
    ("dataset=imagenet model=vgg16_bn", IMAGENET_VGG),
]
AUGMENTATIONS = {  # where none is chosen
    "shakedrop": {"flip": True, "crop_padding": 4, "cutout": 16, "autoaugment": "auto", "mixup": 1.0},
    "imagenet": {
        "flip": True,
        "crop_padding": 0,
        "cutout": 0,
        "autoaugment": None,
        "random_resized_crop": True,
    },
    "": {"flip": True, "crop_padding": 4, "cutout": 0, "autoaugment": None, "mixup": 0.0},
}


def composed(arguments):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose("train", arguments.split()), resolve=True)


@pytest.mark.parametrize(("arguments", "expected"), TABLE, ids=[arguments for arguments, _ in TABLE])
def test_a_recipe(arguments, expected):
    config = composed(f"protocol=paper method=sam {arguments}")
    optimizer = config["optimizer"]
    assert expected == (
        config["epochs"],
        config["batch_size"],
        optimizer["lr"],
        config["l2"],
        optimizer["weight_decay"],
        config["method"]["rho"],
        config["warmup_epochs"],
    )
    assert config["clip_norm"] == 2.0
    assert instantiate(config["lr_schedule"]).func is cosine
    if "vit" in arguments:
        assert optimizer["_target_"] == "torch.optim.AdamW"
    else:
        chosen = {k: optimizer[k] for k in ("_target_", "momentum", "nesterov")}
        assert chosen == {"_target_": "torch.optim.SGD", "momentum": 0.9, "nesterov": True}
    if "augment=" not in arguments:
        expected_augment = next(value for key, value in AUGMENTATIONS.items() if key in arguments)
        assert {key: config["augment"][key] for key in expected_augment} == expected_augment

    side = 224 if "imagenet" in arguments else 32
    instantiate(config["augment"]).check(3, side, side, config["batch_size"], streamed=side == 224)
    rehearse(read_settings(config))


def test_imagenets_networks_are_timms():
    with torch.device("meta"):
        build = instantiate(composed("protocol=paper dataset=imagenet model=resnet50")["model"])
        model = build(num_classes=1000, in_chans=3, image_size=(224, 224))
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert model.conv1.kernel_size == (7, 7)


def test_what_is_given_wins():
    config = composed("protocol=paper model=vit_tiny epochs=3 optimizer.lr=7 warmup_epochs=1 augment=none")
    assert (config["epochs"], config["optimizer"]["lr"], config["warmup_epochs"]) == (3, 7, 1)
    assert config["augment"]["flip"] is False
    config = composed("protocol=paper dataset=imagenet model=resnet50 augment=basic method=rst method.rho=1")
    assert config["augment"]["crop_padding"] == 4
    assert config["method"]["rho"] == 1
    assert composed("protocol=paper model=pyramidnet272_shakedrop augment=cutout")["augment"]["mixup"] == 0


def test_other_protocols_have_none():
    assert composed("model=vit_tiny")["epochs"] == 200
    assert composed("protocol=cpu model=vit_tiny")["epochs"] == 120
    assert recipe(None, "cifar10", "vit_tiny", "basic") == recipe("quick", "imagenet", "x", "basic") == "none"


def test_asam_keeps_its_own_rho():
    assert composed("protocol=paper dataset=imagenet model=resnet50 method=asam")["method"]["rho"] == 0.5


@pytest.mark.parametrize(
    ("dataset", "model"),
    [
        ("imagenet", "vit_tiny"),
        ("imagenet", "resnet20"),
        ("cifar10", "resnet8"),
        ("cifar10", "timm"),
        ("digits", "resnet18"),
        ("image_folder", "resnet50"),
    ],
)
def test_what_the_paper_has_no_recipe_for(dataset, model):
    assert recipe("paper", dataset, model, "basic") == "none"


def test_another_optimizer_than_the_recipes_is_refused(run_train):
    with pytest.raises(SystemExit, match="the recipe for model=vit_tiny is for optimizer=adamw"):
        run_train("protocol=paper", "model=vit_tiny", "optimizer=sgd")


def test_warmup_is_plain_steps_and_a_ramp():
    schedule = Warmup(Constant(1.0), 40)
    assert [schedule(t, 300) for t in (0, 39, 40, 299)] == [0.0, 0.0, 1.0, 1.0]
    factor = with_warmup(cosine, 40 / 300)
    assert factor(0.0) == 0.0
    assert factor(20 / 300) == pytest.approx(0.5)
    assert factor(40 / 300) == pytest.approx(1.0)
    assert factor(170 / 300) == pytest.approx(0.5)  # halfway through the rest
    assert factor(1.0) == pytest.approx(0.0)


def test_a_run_warms_up(run_train, tmp_path):
    short = ["protocol=quick", "method=sam", "model.width=4", "epochs=3"]
    run_train(*short, "warmup_epochs=1", "optimizer.lr=0.1", f"outputs={tmp_path}")
    (metrics,) = tmp_path.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["sam_steps"] for row in rows] == [0, 20, 40]
    assert rows[0]["lr"] == pytest.approx(0.1 * 19 / 20)
    assert rows[0]["lr"] > rows[1]["lr"] > rows[2]["lr"]
