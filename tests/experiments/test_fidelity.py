"""What the authors' experiments need: `protocol=paper` takes it, and other runs stay what they were."""

from typing import Any

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import rst.experiments.choices  # noqa: F401  registers the resolver that conf/train.yaml uses
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
