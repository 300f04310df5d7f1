"""Train one model: `python train.py method=rst schedule=linear model=wrn28_10`, or a sweep with `-m`."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from rst.experiments.command_line import describe, launch, task

log = logging.getLogger("train")
ROOT = Path(__file__).resolve().parent


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="train")
@task
def main(cfg: DictConfig) -> None:
    run = describe(cfg, HydraConfig.get())
    result = run.result()
    if result is not None:
        log.info("%s is complete, nothing to run", run.folder)
        if (ranks := os.environ.get("WORLD_SIZE", "1")) != result["ranks"]:
            log.warning("it had ranks=%s, not %s: SAM depends on their number", result["ranks"], ranks)
    else:
        from rst.training.fit import train  # here, as its imports take seconds
        from rst.training.run import RunBusyError

        in_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        try:
            result = train(run, in_sweep)
        except RunBusyError as error:
            if not in_sweep:
                raise
            log.info("%s", error)  # such as SGD's run at another rho, which is the same run
            return
    log.info("%s: %s %s", run.name, run.split, in_words(result))


def in_words(result: dict[str, Any]) -> str:
    """A run's result in a line."""
    return (
        f"accuracy {result['test_accuracy']:.2%}, best {result['best_test_accuracy']:.2%}, "
        f"propagation count {result['propagations'] / result['steps']:.3f}, "
        + (f"expected {n / result['steps']:.3f}, " if (n := result["expected_propagations"]) else "")
        + f"{result['seconds']['train']:.1f} s of training"
        + (f", {n} steps skipped for an overflow" if (n := result["skipped_steps"]) else "")
    )


if __name__ == "__main__":
    if "--list" in sys.argv[1:]:
        from rst.experiments.listing import listing

        print(listing(ROOT / "conf"))
        sys.exit()
    import train as importable  # for launchers: other processes can import this module, but not __main__

    launch(importable.main)
