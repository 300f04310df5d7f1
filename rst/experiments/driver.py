"""Run what tables still need, then write them (make reproduce-tables)."""

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hydra import initialize_config_dir
from hydra.core.utils import JobReturn
from joblib import cpu_count

from rst.experiments.choices import NO_SCHEDULE
from rst.experiments.command_line import one_line
from rst.experiments.cost import cost_of, steps_per_epoch
from rst.experiments.launcher import Launcher, is_death
from rst.experiments.measure_sharpness import measure_all
from rst.experiments.run_progress import RunProgress
from rst.experiments.sweeps import OUTPUTS, Cell, gather, results_of, split, with_outputs
from rst.files import write_atomically
from rst.optim import RST
from rst.reporting.claims import write_claims
from rst.reporting.records import Finished, Records, collect, recorded_in
from rst.reporting.statistics import values
from rst.reporting.tables import Row, Table, write_table
from rst.schedule import probabilities
from rst.training.parts import optimizer_alone, schedule_of
from rst.training.run import Run
from rst.training.tracking import log_table

POLL = 5.0  # seconds between two looks at runs that other processes are at


def reproduce(
    names: Sequence[str],
    conf: Path,
    protocol: str,
    overrides: Sequence[str] = (),
    *,
    outputs: Path = OUTPUTS,
    results: Path | None = None,
    launcher: str = "joblib",
    jobs: int | None = None,
    only_collect: bool = False,
    reuse: bool = False,
    sharpness: bool = False,
    for_print: bool = False,
) -> dict[str, str]:
    """Run what the tables need and is not complete, then write them. Returns why runs failed, by command.

    Interrupted runs go on from their last checkpoint.

    Args:
        names: files of `conf`/table.
        overrides: for every run; those of Hydra's own settings ("hydra.launcher.partition=gpu") are for the
            launcher.
        outputs: folder of the run folders.
        results: folder of the tables; by default `results_of` the overrides.
        launcher: one of Hydra's.
        jobs: processes at once, with joblib; None: one a core.
        only_collect: run nothing.
        reuse: runs that runs.csv records count as complete, and their records stay.
        sharpness: measure the sharpness of all finished runs.
        for_print: write the tables also as LaTeX, the figures also as PDF.
    """
    common, settings = split(overrides)
    folder = (results or results_of(common, outputs)) / protocol
    jobs = jobs or cpu_count()
    if launcher == "joblib":
        settings.insert(0, f"hydra.launcher.n_jobs={jobs}")
        os.environ["OMP_NUM_THREADS"] = str(max(1, cpu_count() // jobs))  # together a thread a core

    with initialize_config_dir(str(conf), version_base="1.3"):
        tables, cells = gather(names, conf, protocol, with_outputs(common, outputs))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(f"cannot write to {folder} ({error.strerror}); choose --results") from error
        older = recorded_in(folder).runs
        recorded = dict(zip(older["id"], older["finished"], strict=True)) if reuse else {}
        todo = [cell for key, cell in cells.items() if key not in recorded and cell.run.result() is None]
        print(f"{len(cells)} runs, {len(todo)} to do", flush=True)
        if todo and not only_collect:
            run_all(todo, len(cells), Launcher(launcher, with_outputs(settings, outputs)))

    here = {key: result for key, cell in cells.items() if (result := cell.run.result(warn=False))}
    failures = {
        key: reason
        for key, cell in cells.items()
        if key not in recorded and key not in here and (reason := cell.run.failure())
    }
    # Of a recorded run only the same attempt counts, as it may add its sharpness.
    done = {key: r for key, r in here.items() if recorded.get(key, r["finished"]) == r["finished"]}
    if sharpness:
        radii = _radii(tables, cells)
        measure_all({cells[key].run.folder: radii[key] for key in done}, jobs=jobs)
    if failures.keys() == cells.keys() and not only_collect:  # the tables that are there are worth more
        reason = next(iter(failures.values()))
        raise ValueError(f"all {len(cells)} runs failed, so no table is written; the first: {reason}")
    finished = [Finished(r, cells[key].run.metrics(), cells[key].run.sharpness()) for key, r in done.items()]
    records = collect(folder, finished)
    # Recorded runs that are not here may count, too, but not those that failed here since.
    ids = records.runs["id"]
    kept = ~ids.isin([*failures]) if reuse or only_collect else ids.isin([*done])
    records = records._replace(runs=records.runs[kept])
    for table in tables:
        files = _write(table, cells, records, failures, folder, for_print)
        page = (folder / table.name / "README.md").read_text()
        print(page.partition("\n## ")[0] if len(tables) == 1 else f"{table.name}: {table.title}")
        _log(table, cells, files, protocol, outputs)
    claims = conf / "claims" / f"{protocol}.yaml"
    if claims.exists():
        by_name = {table.name: table for table in tables}
        if missing := write_claims(claims, by_name, records, folder / "README.md"):
            print(f"claims not tested: they need {', '.join(sorted(missing))}, too")
        else:
            print(f"claims tested: {folder / 'README.md'}")
            if others := {path.parent.name for path in folder.glob("*/table.csv")} - set(by_name):
                print(f"strength.png not redrawn: it needs {', '.join(sorted(others))}, too")
            else:
                _draw_strength(tables, cells, records, folder)
    print(f"written to {folder}: {', '.join(table.name for table in tables)}, runs.csv and curves.csv")
    return {} if only_collect else {cells[key].run.command: reason for key, reason in failures.items()}


def run_all(cells: Sequence[Cell], total: int, launcher: Launcher) -> None:
    """Run the cells and show the progress; `total` includes the runs that are complete. Column by column and
    seed by seed, so that what has run at any time can be compared; of a seed, the longest first. A run that
    fails has a `Run.failure` afterwards. One that another process is working on is waited for.

    A killed process takes its launcher's whole batch down. The runs that had begun then resume one at a time,
    so that only the one at fault fails, and the others as a batch again.
    """
    work = {cell.run.id: cost_of(cell.run.config).work for cell in cells}
    columns = list(dict.fromkeys((cell.table, cell.column) for cell in cells))
    places = {cell.run.id: columns.index((cell.table, cell.column)) for cell in cells}
    pending = sorted(cells, key=lambda c: (places[c.run.id], c.run.config["seed"], -work[c.run.id]))
    for cell in cells:
        (cell.run.folder / "failed.json").unlink(missing_ok=True)
    suspects: set[str] = set()
    with RunProgress(cells, work, total) as progress:
        while pending := [cell for cell in pending if not _has_ended(cell)]:
            free = [cell for cell in pending if not cell.run.is_locked()]
            batch = [cell for cell in free if cell.run.id in suspects][:1] or free
            if not batch:
                time.sleep(POLL)
                continue
            began = time.time()
            try:
                jobs = launcher.run([[*cell.overrides, *_group(cell)] for cell in batch])
            except (KeyboardInterrupt, SystemExit):  # the latter of a process that was told to end
                progress.tell("interrupted: repeat the command to resume")
                raise
            except Exception as error:
                if not is_death(error):
                    raise
                begun = _begun(batch, began)
                if len(batch) == 1 and begun:
                    batch[0].run.fail(f"its process was killed ({type(error).__name__})")
                elif begun:
                    suspects |= {cell.run.id for cell in begun}
                    progress.tell("a process was killed: the runs that had begun resume one at a time")
            else:
                for cell, returned in zip(batch, jobs, strict=True):
                    _check_return(cell, returned)


def _begun(batch: Sequence[Cell], began: float) -> list[Cell]:
    """The runs of a batch, launched at `began`, that a killed process may have been working on."""
    unfinished = [cell for cell in batch if not _has_ended(cell)]
    return [cell for cell in unfinished if cell.run.begun_since(began)] or unfinished[:1]


def _check_return(cell: Cell, returned: JobReturn) -> None:
    try:
        was_busy = returned.return_value
    except Exception as error:  # raised before the run could record its failure
        cell.run.fail(one_line(error))
    else:
        if not was_busy and not _has_ended(cell):
            cell.run.fail("it left no result: have code or settings changed since the start?")


def _has_ended(cell: Cell) -> bool:
    return cell.run.result(warn=False) is not None or cell.run.failure() is not None


def _group(cell: Cell) -> list[str]:
    """The override that groups a table's runs in Weights & Biases, where they are tracked there and have no
    other group."""
    is_free = cell.run.choices["tracker"] == "wandb" and cell.run.config["tracker"]["run_group"] is None
    return [f"tracker.run_group={cell.table}"] if is_free else []


def _radii(tables: Sequence[Table], cells: Mapping[str, Cell]) -> dict[str, float]:
    """By run id, the ρ at which its sharpness is measured: that of its column's baseline, for all rows."""
    radii: dict[str, float] = {}
    for table in tables:
        for column in table.columns:
            (baseline,) = (row for row in column.rows if row.label == table.baseline)
            rho = _a_run(baseline, cells).config["rho"]
            radii |= {run: rho for row in column.rows for run in row.runs.values() if run not in radii}
    return radii


def _write(
    table: Table,
    cells: Mapping[str, Cell],
    records: Records,
    failures: Mapping[str, str],
    folder: Path,
    for_print: bool,
) -> list[Path]:
    # The schedules of the first column, of rows as long as the baseline; another may have other steps, or a
    # warmup.
    runs = {row.label: _a_run(row, cells) for row in table.columns[0].rows if row.epochs_factor == 1}
    runs = {label: run for label, run in runs.items() if _tosses_coins(run)}
    if not runs:
        return write_table(table, records, failures, {}, 0, 0, folder, for_print)
    epoch_steps = _epoch_steps(list(runs.values()), records)
    config = next(iter(runs.values())).config
    steps = config["epochs"] * epoch_steps
    schedules = {label: schedule_of(run.config, epoch_steps) for label, run in runs.items()}
    schedules = {k: p for k, p in schedules.items() if 0 < probabilities(p, steps).mean() < 1}
    return write_table(table, records, failures, schedules, steps, config["seed"], folder, for_print)


def _epoch_steps(runs: Sequence[Run], records: Records) -> int:
    """Of runs that share their data. From a record, where there is one: the images may be elsewhere."""
    for run in runs:
        if len(steps := values("steps", {0: run.id}, records.runs)):
            return int(steps[0]) // run.config["epochs"]
    return steps_per_epoch(runs[0].config)


def _draw_strength(
    tables: Sequence[Table], cells: Mapping[str, Cell], records: Records, folder: Path
) -> None:
    """strength.png, of the rows whose regularization has a strength p̄·γ·ρ, in the setting of the first table
    of one column."""
    from rst.reporting import strength  # here, as matplotlib takes a second

    runs = [_a_run(row, cells) for table in tables for row in table.columns[0].rows if row.epochs_factor == 1]
    pairs = {run.id: _strength(run.config, _epoch_steps([run], records)) for run in runs}
    strengths = {run: strength.Strength(*pair) for run, pair in pairs.items() if pair}
    tables = strength.comparable(tables, strengths)
    frame = strength.points(tables, strengths, records.joined)
    if len(frame):
        figure = strength.figure(frame, tables[0].baseline, tables[0].reference)
        write_atomically(folder / "strength.png", partial(figure.savefig, format="png"))


def _strength(config: Mapping[str, Any], epoch_steps: int) -> tuple[float, str] | None:
    """p̄·γ·ρ, and when most of the SAM steps are; None where a method has more to it."""
    optimizer = optimizer_alone(config, epoch_steps)
    if type(optimizer) is not RST or optimizer.adaptive or optimizer.mix != "gradient":
        return None
    p = probabilities(optimizer.schedule, optimizer.total_steps)
    centre = (p @ np.arange(len(p)) / p.sum() + 0.5) / len(p) if p.any() else 0.5
    when = "even" if abs(centre - 0.5) < 0.01 else "late" if centre > 0.5 else "early"
    return float(p.mean()) * optimizer.gamma * optimizer.rho, when


def _a_run(row: Row, cells: Mapping[str, Cell]) -> Run:
    return cells[row.first_run].run


def _tosses_coins(run: Run) -> bool:
    """Whether each step of the run tosses a coin of its own for its schedule's p(t)."""
    is_systematic = run.config["method"].get("sampling") == "systematic"
    return run.choices["method"] not in NO_SCHEDULE and not is_systematic


def _log(
    table: Table, cells: Mapping[str, Cell], files: Sequence[Path], protocol: str, outputs: Path
) -> None:
    """Log the table to Weights & Biases, where its runs are tracked there."""
    run = _a_run(table.columns[0].rows[0], cells)
    if run.choices["tracker"] == "wandb":
        others = ("_target_", "_partial_", "run_group")
        settings = {key: value for key, value in run.config["tracker"].items() if key not in others}
        name = f"{protocol}-{table.name}"
        group = run.config["tracker"]["run_group"] or table.name
        log_table(files, name=name, group=group, folder=outputs / ".wandb" / name, **settings)
