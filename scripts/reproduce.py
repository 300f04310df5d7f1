"""Run what is missing of a table under a protocol, then write the table (`make reproduce-tables`)."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import OmegaConf, open_dict

from rst.command_line import launch, one_line
from rst.plots import error_against_propagations
from rst.record import Run
from rst.tables import Row, build_table, runs_frame, to_markdown, write_runs, write_table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402  (it lies in the root, beside this folder)

CONF = ROOT / "conf"


@dataclass(frozen=True)
class Cell:
    """One run of a table: a row at one seed."""

    overrides: list[str]
    run: Run


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def cells_of(overrides: list[str]) -> list[Cell]:
    """The runs that `python train.py -m` would do: a seed each, those of the overrides or of the protocol."""
    given = [override for override in overrides if override.startswith("seed=")]
    others = [override for override in overrides if override not in given]
    if not given:
        protocol = compose("train", others, return_hydra_config=True)
        given = [f"seed={protocol.hydra.sweeper.params.get('seed', protocol.seed)}"]
    sweep = OverridesParser.create().parse_override(given[-1])
    seeds = sweep.sweep_string_iterator() if sweep.is_sweep_override() else [str(sweep.value())]
    cells = []
    for seed in seeds:
        cell = [*others, f"seed={seed}"]
        cfg = compose("train", cell, return_hydra_config=True)
        with open_dict(cfg):
            hydra_cfg = cfg.pop("hydra")
        cells.append(Cell(cell, train.describe(cfg, hydra_cfg)))
    return cells


def setting_of(run: Run, protocol: str) -> str:
    """Data, model and augmentation, with the values that differ from their group's; epochs and batch size."""
    groups = ("dataset", "model", "augment")
    plain: Any = OmegaConf.to_container(
        compose("train", [f"{group}={run.choices[group]}" for group in groups])
    )
    parts = [f"Protocol {protocol}"]
    for group in groups:
        node = run.config[group].items()
        changed = [f"{k} {v}" for k, v in node if v != plain[group].get(k) and k not in ("root", "name")]
        parts.append(f"{group} {run.choices[group]}" + (f" ({', '.join(changed)})" if changed else ""))
    return ", ".join([*parts, f"{run.config['epochs']} epochs", f"batch size {run.config['batch_size']}"])


def run_batch(batch: list[list[str]], launcher: str, jobs: int, place: list[str]) -> Sequence[JobReturn]:
    """Give the jobs to a Hydra launcher, as `python train.py -m` does with those of a grid."""
    overrides = ["hydra.mode=MULTIRUN", f"hydra/launcher={launcher}", "hydra/hydra_logging=none", *place]
    if launcher == "joblib":
        overrides.append(f"hydra.launcher.n_jobs={jobs}")
    config = compose("train", overrides, return_hydra_config=True)
    context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks(config))
    task = train.main.__wrapped__  # what hydra.main decorates
    plugin = Plugins.instance().instantiate_launcher(context, task, config)
    return plugin.launch(batch, initial_job_idx=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--protocol", default="quick", choices=options("protocol"))
    parser.add_argument("--table", default="overview", choices=options("table"))
    parser.add_argument(
        "--launcher", default="joblib", help="a Hydra launcher: joblib, basic, submitit_slurm, …"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once, with joblib")
    parser.add_argument("--outputs", default="outputs", help="folder of the run folders")
    parser.add_argument("--results", help="folder of the tables: results, with overrides OUTPUTS/results")
    parser.add_argument("overrides", nargs="*", help="added to every run, such as epochs=1")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    # A shortened table must not take the place of the whole one.
    usual = f"{arguments.outputs}/results" if arguments.overrides else "results"
    os.environ["OMP_NUM_THREADS"] = "1"  # in the processes to come: two of one thread beat one of two

    specification: Any = OmegaConf.to_container(OmegaConf.load(CONF / "table" / f"{arguments.table}.yaml"))
    common = [f"protocol={arguments.protocol}", *arguments.overrides]
    # Left out where it is the default, so that the command which a run records holds anywhere.
    place = [] if arguments.outputs == "outputs" else [f"outputs={arguments.outputs}"]
    failures = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cells = {
            row["label"]: cells_of([*common, *row["overrides"], *place]) for row in specification["rows"]
        }
        all_cells = [cell for row in cells.values() for cell in row]
        setting = setting_of(all_cells[0].run, arguments.protocol)
        missing = [cell.overrides for cell in all_cells if cell.run.result() is None]
        print(f"{len(all_cells)} runs, {len(missing)} of them to do", flush=True)
        if missing:
            returns = run_batch(missing, arguments.launcher, arguments.jobs, place)
            failures = [job for job in returns if job.status is not JobStatus.COMPLETED]

    results = [cell.run.result() for cell in all_cells]
    runs = runs_frame(result for result in results if result is not None)
    rows = [
        Row(
            label=row["label"],
            command=shlex.join(["python", "train.py", "-m", *common, *row["overrides"]]),
            runs=[cell.run.id for cell in cells[row["label"]]],
        )
        for row in specification["rows"]
    ]
    names = (specification["title"], setting)
    table = build_table(*names, rows, runs, specification["reference"], specification["baseline"])
    folder = Path(arguments.results or usual) / arguments.protocol
    folder.mkdir(parents=True, exist_ok=True)
    write_runs(runs, folder / "runs.csv")
    write_table(table, folder / f"{arguments.table}.md")
    write_table(table, folder / f"{arguments.table}.csv")
    error_against_propagations(table, folder / f"{arguments.table}.png")
    print(to_markdown(table))
    print(f"written to {folder}: runs.csv, {arguments.table}.md, .csv and .png")
    for job in failures:
        print(f"failed: {' '.join(job.overrides or [])}: {one_line(job._return_value)}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    launch(main)
