"""Run what is missing of a table under a protocol, then write the table: `make reproduce-tables` calls this."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from rst.plots import error_against_propagations
from rst.record import Run
from rst.tables import Row, build_table, runs_frame, to_markdown, write_runs, write_table

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


@dataclass(frozen=True)
class Cell:
    """One run of a table: a row at one seed."""

    overrides: list[str]
    run: Run


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def compose_run(overrides: list[str]) -> tuple[Run, list[str]]:
    """The run that `python train.py` would do with these overrides, and the seeds that a sweep would take."""
    cfg = compose("train", overrides, return_hydra_config=True)
    choices = {str(k): str(v) for k, v in cfg.hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
    sweep = OverridesParser.create().parse_override(f"seed={cfg.hydra.sweeper.params.get('seed', cfg.seed)}")
    seeds = list(sweep.sweep_string_iterator()) if sweep.is_sweep_override() else [str(sweep.value())]
    with open_dict(cfg):
        del cfg["hydra"]
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    command = shlex.join(["python", "train.py", *overrides])
    return Run(Path(config["outputs"]), config, choices, command), seeds


def cells_of(overrides: list[str]) -> list[Cell]:
    _, seeds = compose_run(overrides)
    each = [[*overrides, f"seed={seed}"] for seed in seeds]
    return [Cell(cell, compose_run(cell)[0]) for cell in each]


def run_missing(cells: list[Cell], outputs: str, launcher: str, jobs: int) -> int:
    """Give the cells without a result to Hydra's launcher as one batch. Returns the exit code."""
    missing = [cell.overrides for cell in cells if cell.run.result() is None]
    print(f"{len(cells)} runs, {len(cells) - len(missing)} of them done, {len(missing)} to do", flush=True)
    if not missing:
        return 0
    file = Path(outputs) / ".sweep" / "cells.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(missing))
    command = [sys.executable, "train.py", "-m", "hydra/sweeper=cells", f"hydra.sweeper.file={file.resolve()}"]
    command.append(f"hydra/launcher={launcher}")
    if launcher == "joblib":
        command.append(f"hydra.launcher.n_jobs={jobs}")
    # One thread a process: two such runs beat one run on two threads.
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--protocol", default="quick", choices=options("protocol"))
    parser.add_argument("--table", default="overview", choices=options("table"))
    parser.add_argument("--launcher", default="joblib", help="a Hydra launcher: joblib, basic, submitit_slurm …")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once, with joblib")
    parser.add_argument("--outputs", default="outputs", help="folder of the run folders")
    parser.add_argument("--results", default="results", help="folder of the tables")
    parser.add_argument("overrides", nargs="*", help="added to every run, such as epochs=1")
    arguments = parser.parse_args()

    specification: Any = OmegaConf.to_container(OmegaConf.load(CONF / "table" / f"{arguments.table}.yaml"))
    common = [f"protocol={arguments.protocol}", *arguments.overrides]
    # Not where it is the default: the command that a result records should work anywhere.
    place = [] if arguments.outputs == "outputs" else [f"outputs={arguments.outputs}"]
    os.chdir(ROOT)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cells = {
            row["label"]: cells_of([*common, *row["overrides"], *place]) for row in specification["rows"]
        }
    code = run_missing(
        [cell for row in cells.values() for cell in row],
        arguments.outputs,
        arguments.launcher,
        arguments.jobs,
    )

    results = [cell.run.result() for row in cells.values() for cell in row]
    runs = runs_frame(result for result in results if result is not None)
    rows = [
        Row(
            label=row["label"],
            command=shlex.join(["python", "train.py", "-m", *common, *row["overrides"]]),
            runs=[cell.run.id for cell in cells[row["label"]]],
        )
        for row in specification["rows"]
    ]
    table = build_table(
        specification["title"], rows, runs, specification["reference"], specification["baseline"]
    )
    folder = Path(arguments.results) / arguments.protocol
    write_runs(runs, folder / "runs.csv")
    write_table(table, folder / f"{arguments.table}.md")
    write_table(table, folder / f"{arguments.table}.csv")
    error_against_propagations(table, folder / f"{arguments.table}.png")
    print(to_markdown(table))
    print(f"written to {folder}: runs.csv, {arguments.table}.md, .csv and .png")
    sys.exit(code)


if __name__ == "__main__":
    main()
