"""What a plan says against what runs do."""

import json
import math

import pytest
import timm
from conftest import ROOT
from hydra import initialize_config_dir

import rst.models  # noqa: F401  registers the models
from rst.experiments.cost import DataSize, Measurements, cost_of, data_size, steps_per_epoch
from rst.experiments.sweeps import cells_of

CONF = ROOT / "conf"


@pytest.fixture(autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def config_of(*overrides):
    (cell,) = cells_of([*overrides, "seed=0"], CONF)
    return cell.run.config


def test_operations_of_a_network_by_hand(tmp_path):
    """VGG's convolutions and dense layers: two operations a multiply-add, three forward passes a
    propagation."""
    config = config_of("dataset=cifar10", "model=vgg16_bn")
    cost = cost_of(config, Measurements(tmp_path / "none.json"))
    sides_and_channels = [(32, 3, 64), (32, 64, 64), (16, 64, 128), (16, 128, 128), (8, 128, 256)]
    sides_and_channels += [(8, 256, 256)] * 2 + [(4, 256, 512)] + [(4, 512, 512)] * 2 + [(2, 512, 512)] * 3
    convolutions = sum(2 * 9 * side**2 * i * o for side, i, o in sides_and_channels)
    dense = sum(2 * i * o for i, o in ((512, 4096), (4096, 4096), (4096, 10)))
    assert cost.flops == 3 * (convolutions + dense)
    assert cost.steps == 200 * (50_000 // 256)
    # float32 weights and momentum, in the checkpoint and in the one before it
    assert cost.disk_bytes == 16 * sum(p.numel() for p in timm.create_model("cifar_vgg16_bn").parameters())


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["dataset=cifar100"], DataSize(50_000, 3, 32, 100)),
        (["dataset=cifar10", "dataset.validation=true"], DataSize(45_000, 3, 32, 10)),
        (["dataset=cifar10", "dataset.train_size=500"], DataSize(500, 3, 32, 10)),
        (["dataset=digits"], DataSize(1297, 1, 8, 10)),
        (["dataset=imagenet", "dataset.image_size=64"], DataSize(1_281_167, 3, 64, 1000)),
        (["protocol=cpu"], DataSize(1000, 3, 32, 10)),
    ],
)
def test_sizes(overrides, size):
    config = config_of(*overrides)
    if overrides == ["protocol=cpu"]:
        config["dataset"]["root"] = "nowhere"
    assert data_size(config) == size


def test_digits_have_that_many_images():
    from rst.data import digits

    for validation in (False, True):
        config = config_of("dataset=digits", f"dataset.validation={str(validation).lower()}")
        assert data_size(config).train_images == len(digits(validation=validation).train_labels)


def test_a_folder_is_counted(tmp_path):
    config = config_of("dataset=image_folder", f"dataset.root={tmp_path}", "dataset.image_size=16")
    with pytest.raises(FileNotFoundError):
        data_size(config)
    for name, n in (("a", 3), ("b", 2)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "train" / name / f"{i}.png").touch()
    assert data_size(config) == DataSize(5, 3, 16, 2)


def test_warmup_is_of_plain_steps():
    config = config_of("dataset=cifar10", "method=sam", "epochs=10", "warmup_epochs=4")
    cost = cost_of(config, Measurements(CONF / "none.json"))
    epoch_steps = steps_per_epoch(config)
    assert cost.propagations == epoch_steps * (4 + 2 * 6)


def test_measurements_are_kept(tmp_path):
    path = tmp_path / "folder" / "kept.json"
    config = config_of("protocol=quick", "model=resnet20")
    known = Measurements(path)
    first = cost_of(config, known), known.speed(config)
    known.save()
    kept = json.loads(path.read_text())
    assert len(kept) == 2
    path.write_text(path.read_text().replace(str(first[1]), "12345.0"))
    assert Measurements(path).speed(config) == 12345.0
    assert 1e8 < first[1] < 1e13  # operations a second, of one core


def test_the_plan_adds_up(tmp_path, run_script, capsys):
    """The whole of a table."""
    plan = ["scripts/plan.py", "--outputs", tmp_path, "epochs=2", "seed=0,1"]
    run_script(*plan, "--images-per-second", 1000)
    printed = capsys.readouterr().out
    (total,) = [line.split() for line in printed.splitlines() if line.startswith("total")]
    runs, finished, failed, todo, steps, propagations = map(int, total[1:7])
    assert (runs, finished, failed, todo) == (14, 0, 0, 14)
    assert steps == 14 * 2 * (1297 // 64)
    assert math.isclose(propagations, 2 * 40 + 2 * 80 + 10 * 60, abs_tol=10)
    hours = float(total[7])
    assert hours == pytest.approx(propagations * 64 / 1000 / 3600, abs=0.006)
    assert "1000 images a second" in printed
    with pytest.raises(SystemExit) as ended:
        run_script(*plan, "--table", "overview,nothing")
    assert ended.value.code == 2
    assert "unknown table nothing: choose from constant" in capsys.readouterr().err
