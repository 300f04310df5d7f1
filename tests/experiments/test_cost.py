"""What a plan says: sizes, operations, steps and propagations, against counts by hand."""

import math

import pytest
import timm
from conftest import ROOT
from hydra import initialize_config_dir
from torch import nn

import rst.models  # noqa: F401  registers the models
from rst.data import digits
from rst.experiments.cost import DataSize, cost_of, data_size, speed, steps_per_epoch
from rst.experiments.sweeps import cells_of


def config_of(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        (cell,) = cells_of([*overrides, "seed=0"])
    return cell.run.config


def test_operations_of_a_network_by_hand():
    """VGG's convolutions and dense layers: two operations a multiply-add, and the backward pass counts as two
    forward passes."""
    cost = cost_of(config_of("dataset=cifar10", "model=vgg16_bn"))
    sides_and_channels = [(32, 3, 64), (32, 64, 64), (16, 64, 128), (16, 128, 128), (8, 128, 256)]
    sides_and_channels += [(8, 256, 256)] * 2 + [(4, 256, 512)] + [(4, 512, 512)] * 2 + [(2, 512, 512)] * 3
    convolutions = sum(2 * 9 * side**2 * i * o for side, i, o in sides_and_channels)
    dense = sum(2 * i * o for i, o in ((512, 4096), (4096, 4096), (4096, 10)))
    assert cost.flops == 3 * (convolutions + dense)
    assert cost.steps == 200 * (50_000 // 256)
    # float32 weights and momentum, in the checkpoint and in the one before it
    assert cost.disk_bytes == 16 * sum(p.numel() for p in timm.create_model("cifar_vgg16_bn").parameters())


def linear(num_classes, in_chans, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * image_size[0] * image_size[1], num_classes))


def test_operations_of_a_model_of_one_s_own():
    model = {"_target_": f"{__name__}.linear"}  # _partial_ is not needed, as train.py needs none
    cost = cost_of({**config_of("dataset=cifar10"), "model": model})
    assert cost.flops == 3 * 2 * 3 * 32 * 32 * 10


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["dataset=cifar100"], DataSize(50_000, 3, 32, 100)),
        (["dataset=cifar10", "dataset.validation=true"], DataSize(45_000, 3, 32, 10)),
        (["dataset=cifar10", "dataset.train_size=500"], DataSize(500, 3, 32, 10)),
        (["dataset=imagenet", "dataset.image_size=64"], DataSize(1_281_167, 3, 64, 1000)),
        (["protocol=cpu", "dataset.root=nowhere"], DataSize(1000, 3, 32, 10)),
        (
            ["dataset=cifar10_jpeg", "dataset.folds=7", "dataset.fold=8", "dataset.validation=true"],
            DataSize(7143 - 714, 3, 32, 10),
        ),
    ],
)
def test_sizes_are_known_without_the_data(overrides, size):
    assert data_size(config_of(*overrides)) == size


@pytest.mark.parametrize("validation", [False, True])
def test_digits_have_that_many_images(validation):
    size = data_size(config_of("dataset=digits", f"dataset.validation={str(validation).lower()}"))
    assert size.train_images == len(digits(validation=validation).train_labels)


@pytest.mark.parametrize("dataset", ["image_folder", "imagenet"])
def test_an_image_folder_is_counted(dataset, tmp_path):
    named = ["dataset.name=flowers", f"dataset.root={tmp_path}", "dataset.image_size=16"]
    config = config_of(f"dataset={dataset}", *named)
    with pytest.raises(FileNotFoundError, match="no folder"):
        data_size(config)
    for name, n in (("a", 3), ("b", 2)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "train" / name / f"{i}.png").touch()
    (tmp_path / "train" / "a" / ".DS_Store").touch()
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    assert data_size(config) == DataSize(5, 3, 16, 2)


def test_warmup_steps_take_one_propagation():
    config = config_of("dataset=cifar10", "method=sam", "epochs=10", "warmup_epochs=4")
    assert cost_of(config).propagations == steps_per_epoch(config) * (4 + 2 * 6)


def test_speed_is_that_of_a_computer():
    assert 1e8 < speed(config_of("protocol=quick")) < 1e15  # operations a second


def test_the_plan_adds_up(tmp_path, run_script, capsys):
    plan = ["scripts/plan.py", "--outputs", tmp_path, "epochs=2", "seed=0,1"]
    run_script(*plan, "--images-per-second", 1000, "--table", "overview,constant")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (overview,), (constant,), (total,) = (
        [list(map(float, line[1:])) for line in lines if line[:1] == [name]]
        for name in ("overview", "constant", "total")
    )
    assert total == pytest.approx([a + b for a, b in zip(overview, constant, strict=True)], abs=0.011)
    runs, done, failed, todo, steps, propagations, hours, _ = overview
    assert (runs, done, failed, todo) == (14, 0, 0, 14)
    assert steps == 14 * 2 * (1297 // 64)
    assert math.isclose(propagations, 2 * 40 + 2 * 80 + 10 * 60, abs_tol=10)  # SGD, SAM, five of η = 1.5
    assert hours == pytest.approx(propagations * 64 / 1000 / 3600, abs=0.006)
    # SGD's, SAM's and RST's at p = 0.5 are those of the other table.
    assert constant[0] == 2 * 8
