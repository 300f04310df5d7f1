"""A run's identity: what is part of it, and that it outlives changes of the code."""

import copy

import pytest

from rst.training import identity as module
from rst.training.identity import identity

CONFIG = {
    "seed": 0,
    "epochs": 2,
    "device": "auto",
    "outputs": "outputs",
    "dataset": {"_target_": "rst.data.cifar10", "root": "data", "train_size": None, "download": True},
    "model": {"_target_": "rst.models.create", "_partial_": True, "name": "resnet8", "width": 16},
    "schedule": {"_target_": "rst.schedule.Linear.with_mean", "p": 1, "rising": True},
    "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1},
    "tracker": {"_target_": "rst.tracking.NoTracker"},
    "checkpoint": {"every_epochs": 1},
    "milestones": [0.5, 0.75],
}


def changed(path, value):
    config = copy.deepcopy(CONFIG)
    *parents, key = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[key] = value
    return config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("device", "cuda"),
        ("outputs", "/elsewhere"),
        ("tracker", {"_target_": "rst.tracking.Wandb", "project": "p"}),
        ("checkpoint.every_epochs", 5),
        ("dataset.root", "/scratch"),
        ("dataset.download", False),
        ("schedule.p", 1.0),
    ],
)
def test_what_cannot_change_the_result_is_no_part_of_it(path, value):
    assert identity(changed(path, value)) == identity(CONFIG)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("schedule.p", 0.5),
        ("schedule.rising", False),
        ("dataset.train_size", 100),
        ("model.width", 32),
        ("milestones", [0.5]),
        ("schedule._target_", "rst.schedule.Cosine.with_mean"),
        ("schedule._target_", "rst.schedule.Linear"),
        ("optimizer._target_", "timm.optim.SGD"),
        ("model._args_", [8]),
    ],
)
def test_what_changes_the_result_is(path, value):
    assert identity(changed(path, value)) != identity(CONFIG)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("my_data.pets", {}),
        ("my_data.pets", {"name": "pets"}),
        ("rst.data.image_folder", {"name": None}),
        ("rst.data.image_folder", {"name": "pets"}),
    ],
)
def test_data_of_ones_own_are_told_apart_by_their_folder_unless_they_have_a_name(target, named):
    data = [{"_target_": target, "root": root, **named} for root in ("a", "b")]
    one, other = (identity(changed("dataset", node)) for node in data)
    assert (one == other) == bool(named.get("name"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schedule._target_", "rst.method.schedules.Linear.with_mean"),
        ("dataset._target_", "rst.data.cifar.cifar10"),
        ("model._partial_", False),
    ],
)
def test_it_does_not_change_when_code_moves(path, value):
    assert identity(changed(path, value)) == identity(CONFIG)


def test_a_new_option_makes_another_run_only_where_it_is_used(monkeypatch):
    monkeypatch.setattr(module, "NEUTRAL", {"dataset.fold": None, "grad_noise": 0.0})
    assert identity(changed("dataset.fold", None)) == identity(CONFIG)
    assert identity(changed("grad_noise", 0)) == identity(CONFIG)
    assert identity(changed("dataset.fold", 3)) != identity(CONFIG)


@pytest.mark.parametrize("path", module.NEUTRAL)
def test_what_came_later_is_neutral_at_one_value_only(path):
    group, key = path.split(".")

    def with_it(value):
        return identity(CONFIG | {group: CONFIG.get(group, {}) | {key: value}})

    assert with_it(module.NEUTRAL[path]) == identity(CONFIG)
    assert with_it("another") != identity(CONFIG)


def test_the_order_of_keys_does_not_matter():
    assert identity(dict(reversed(CONFIG.items()))) == identity(CONFIG)


def test_identities_are_stable():
    # Recorded results are found by them. Never change what stands here: see `NEUTRAL`.
    assert identity(CONFIG) == "raf19d3d5"
    assert identity(changed("milestones", [])) == "r394c4838"
