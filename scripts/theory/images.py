"""The strength law on images: test loss against pγ, from the committed records of results/cpu."""

from pathlib import Path

import pandas as pd
from hydra import initialize_config_dir

from rst.experiments.sweeps import gather
from rst.reporting.records import recorded_in

TABLES = ("constant", "gamma")


def image_runs(root: Path) -> pd.DataFrame:
    """A line for each recorded run of the two tables: p, gamma, strength = pγ (ρ is one and the same), seed,
    test_loss."""
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        _, cells = gather(TABLES, root / "conf", "cpu", [])
    runs = recorded_in(root / "results" / "cpu").runs.set_index("id")
    lines = []
    for run_id in runs.index.intersection(list(cells)):
        config = cells[run_id].run.config
        p, gamma = config["schedule"]["p"], config["method"].get("gamma", 1.0)
        of_run = {"p": p, "gamma": gamma, "strength": p * gamma, "seed": config["seed"]}
        lines.append(of_run | {"test_loss": float(runs.loc[run_id, "test_loss"])})
    return pd.DataFrame(lines).sort_values(["strength", "p", "seed"], ignore_index=True)
