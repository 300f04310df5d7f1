"""Run what is missing of tables under a protocol, then write them (make reproduce-tables, make tables)."""

import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from joblib import cpu_count
from omegaconf import OmegaConf

from rst.experiments.command_line import launch, one_line
from rst.experiments.cost import Measurements, costs_of, schedule_of, steps_per_epoch
from rst.experiments.sweeps import Cell, TableRuns, composed, gather, place, table_names, table_parser
from rst.files import write_text
from rst.reporting import findings
from rst.reporting.figures import (
    error_against_propagations,
    schedule_figure,
    sharpness_figure,
    training_curves,
)
from rst.reporting.pages import to_markdown, write_report
from rst.reporting.records import Finished, Records, collect, index, recorded_in
from rst.reporting.statistics import Statistics, build_table
from rst.reporting.tables import Row
from rst.training.identity import NOT_IDENTITY
from rst.training.run import Run, RunBusyError
from rst.training.tracking import log_table

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
# Of a process that died, beside what joblib raises: submitit's and ray's.
DEATHS = {"UncompletedJobError", "FailedJobError", "WorkerCrashedError", "RayActorError"}
POLL = 5.0  # seconds between looks at a run that another process is at


def missing(tables: Sequence[TableRuns], recorded: set[str]) -> list[Cell]:
    """The runs, each once, that have no result and are not among the recorded ids."""
    unique = {cell.run.id: cell for table in tables for cell in table.cells}
    return [cell for cell in unique.values() if cell.run.id not in recorded and not cell.run.result()]


def longest_first(batch: Sequence[Cell], known: Measurements) -> list[Cell]:
    """So that none of the long ones begins when the others have ended."""
    costed = zip(batch, costs_of((cell.run for cell in batch), known), strict=True)
    return [cell for cell, _ in sorted(costed, key=lambda pair: -pair[1].work)]


class Launcher:
    """A Hydra launcher, given a batch of jobs as `python train.py -m` gives it those of a grid."""

    def __init__(self, name: str, jobs: int, where: Sequence[str]) -> None:
        overrides = ["hydra.mode=MULTIRUN", f"hydra/launcher={name}", "hydra/hydra_logging=none", *where]
        overrides += [f"hydra.launcher.n_jobs={jobs}"] if name == "joblib" else []
        self.config = compose("train", overrides, return_hydra_config=True)

    def run(self, batch: Sequence[Cell]) -> Sequence[JobReturn]:
        import train  # here, as it takes seconds, and a table that is complete does not need it

        context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks(self.config))
        task = train.main.__wrapped__  # what hydra.main decorates
        plugin = Plugins.instance().instantiate_launcher(context, task, self.config)
        return plugin.launch([cell.overrides for cell in batch], initial_job_idx=0)


def run_all(batch: Sequence[Cell], launcher: Launcher) -> dict[str, str]:
    """Run them, in order, waiting for those that another process is at. Returns why runs failed, by id."""
    failures: dict[str, str] = {}
    pending = list(batch)
    while pending:
        pending = [cell for cell in pending if cell.run.result(warn=False) is None]
        free = [cell for cell in pending if not cell.run.is_locked()]
        if not free:
            time.sleep(POLL if pending else 0)
            continue
        reasons = _run_batch(free, launcher)
        for cell in free:
            error = reasons[cell.run.id]
            if error is None and cell.run.result(warn=False) is None:
                error = ChildProcessError("it left no result")
            if error is not None and not isinstance(error, RunBusyError):
                failures[cell.run.id] = one_line(error)
                cell.run.fail(failures[cell.run.id])
        pending = [cell for cell in pending if cell.run.id not in failures]
    return failures


def _run_batch(batch: Sequence[Cell], launcher: Launcher) -> dict[str, Exception | None]:
    """What each run raised, by id.

    A process that is killed takes its launcher's whole batch down. Then the runs that were begun go on one by
    one, so that it is known which of them it is, and the others as a batch again.
    """
    started = time.time()
    try:
        returns = launcher.run(batch)
    except Exception as error:
        if not (isinstance(error, BrokenExecutor) or type(error).__name__ in DEATHS):
            raise  # the launcher's own, such as a cluster that is not there
        if len(batch) == 1:
            return {batch[0].run.id: ChildProcessError(f"its process died ({_kind(error)})")}
        print(f"a process died ({_kind(error)}): looking for the run", flush=True)
        unfinished = [cell for cell in batch if cell.run.result(warn=False) is None]
        begun = [cell for cell in unfinished if cell.run.begun_since(started)] or unfinished[:1]
        others = [cell for cell in unfinished if cell not in begun]
        reasons: dict[str, Exception | None] = {cell.run.id: None for cell in batch}
        for cell in begun:
            reasons |= _run_batch([cell], launcher)
        return reasons | (_run_batch(others, launcher) if others else {})
    failed = [job.status is not JobStatus.COMPLETED for job in returns]
    raised = [job._return_value if bad else None for job, bad in zip(returns, failed, strict=True)]
    return {cell.run.id: error for cell, error in zip(batch, raised, strict=True)}


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def setting_of(run: Run, protocol: str) -> str:
    """Data, model and augmentation, with the values that differ from their group's; epochs and batch size."""
    groups = ("dataset", "model", "augment")
    plain: Any = OmegaConf.to_container(
        composed([f"{group}={run.choices[group]}" for group in groups], CONF)[0], resolve=True
    )
    parts = [f"Protocol {protocol}"]
    for group in groups:
        node = run.config[group].items()
        changed = [f"{k} {v}" for k, v in node if v != plain[group].get(k) and k not in ("root", "name")]
        parts.append(f"{group} {run.choices[group]}" + (f" ({', '.join(changed)})" if changed else ""))
    return ", ".join([*parts, f"{run.config['epochs']} epochs", f"batch size {run.config['batch_size']}"])


def column_names(table: TableRuns) -> dict[tuple[str, ...], str]:
    """Data, model and augmentation of each column; with its overrides where these do not tell them apart."""
    names = {}
    for column, found in table.columns.items():
        choices = found[0][1][0].run.choices
        names[column] = " / ".join(choices[group] for group in ("dataset", "model", "augment"))
    alike = [name for name in names.values() if list(names.values()).count(name) > 1]
    return {c: f"{name} / {' '.join(c)}" if name in alike else name for c, name in names.items()}


def build(
    table: TableRuns, protocol: str, common: Sequence[str], runs: pd.DataFrame, failures: dict[str, str]
) -> list[Statistics]:
    """A report: the table's statistics in each of its columns."""
    spec, report = table.spec, []
    names = column_names(table)
    seeds = [f"seed={spec.seeds}"] if spec.seeds else []
    for column, found in table.columns.items():
        rows = []
        for row, row_cells in found:
            overrides = [f"protocol={protocol}", *column, *row.overrides, *common, *seeds]
            command = shlex.join(["python", "train.py", "-m", *overrides])
            ids = {cell.seed: cell.run.id for cell in row_cells}
            rows.append(Row(row.label, command, ids, row.published, row.source))
        run = found[0][1][0].run
        report.append(
            build_table(
                spec.title,
                setting_of(run, protocol),
                rows,
                runs,
                spec.reference,
                spec.baseline,
                column=names[column],
                failures=failures,
                metrics=spec.metrics,
                split="validation" if run.config["dataset"].get("validation") else "test",
            )
        )
    return report


def write(table: TableRuns, report: list[Statistics], records: Records, folder: Path) -> list[Path]:
    """The report as Markdown, CSV and LaTeX, and its figures as PNG and PDF. Returns the files."""
    name = table.spec.name
    for suffix in (".md", ".csv", ".tex"):
        write_report(report, folder / f"{name}{suffix}")
    stems = [folder / name]
    for one in report:
        stem = folder / (
            name if len(report) == 1 else f"{name}_{re.sub(r'[^A-Za-z0-9_.=]+', '-', one.column)}"
        )
        error_against_propagations(one, stem)
        training_curves(one, records.curves, stem.with_name(f"{stem.name}_curves"))
        stems += [stem, stem.with_name(f"{stem.name}_curves")]
        if set(" ".join(one.frame["runs"]).split()) & set(records.sharpness["id"]):
            sharpness_figure(one, records.sharpness, stem.with_name(f"{stem.name}_sharpness"))
            stems.append(stem.with_name(f"{stem.name}_sharpness"))
    first = next(iter(table.columns.values()))  # another column may have another T, or a warmup
    config = first[0][1][0].run.config
    done = report[0].frame["train_steps"].dropna()
    epoch_steps = int(done.iloc[0]) // config["epochs"] if len(done) else steps_per_epoch(config)
    schedules = {row.label: schedule_of(found[0].run.config, epoch_steps) for row, found in first}
    schedule_figure(schedules, config["epochs"] * epoch_steps, config["seed"], folder / f"{name}_schedules")
    stems.append(folder / f"{name}_schedules")
    return sorted(path for stem in set(stems) for path in folder.glob(f"{stem.name}.*"))


def main() -> None:
    parser = table_parser(__doc__, CONF)
    parser.add_argument("--launcher", default="joblib", help="Hydra's: joblib, basic, submitit_slurm, ray, …")
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="processes at once, with joblib")
    parser.add_argument("--results", help="folder of the tables: results, with overrides OUTPUTS/results")
    parser.add_argument("--sharpness", action="store_true", help="measure that of all finished runs, too")
    parser.add_argument("--collect", action="store_true", help="run nothing, write tables of what there is")
    arguments = parser.parse_args()
    names = table_names(parser, arguments.table, CONF)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # for train.py, also in a launcher's processes
    # A shortened table must not take the place of the whole one.
    changed = [text for text in arguments.overrides if text.split("=")[0] not in NOT_IDENTITY]
    results = Path(arguments.results or (f"{arguments.outputs}/results" if changed else "results"))
    folder = results / arguments.protocol
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    if arguments.launcher == "joblib":  # together its processes have a thread a core
        os.environ["OMP_NUM_THREADS"] = str(max(1, cpu_count() // arguments.jobs))

    outputs, where = Path(arguments.outputs), place(arguments.outputs)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tables = gather(names, CONF, arguments.protocol, [*arguments.overrides, *where])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(f"cannot write to {folder} ({error.strerror}); choose --results") from error
        recorded = set(recorded_in(folder).runs["id"]) if arguments.reuse else set()
        todo = missing(tables, recorded)
        n_cells = len({cell.run.id for table in tables for cell in table.cells})
        print(f"{n_cells} runs, {len(todo)} of them to do", flush=True)
        failed: dict[str, str] = {}
        if todo and not arguments.collect:
            known = Measurements(outputs / ".measurements.json")
            todo = [with_group(cell, tables) for cell in longest_first(todo, known)]
            known.save()
            failed = run_all(todo, Launcher(arguments.launcher, arguments.jobs, where))

        every = {cell.run.id: cell.run for table in tables for cell in table.cells}
        here = {key for key, run in every.items() if run.result(warn=False)}
        if arguments.sharpness:
            import sharpness  # scripts/sharpness.py

            folders = [run.folder for key, run in every.items() if key in here]
            sharpness.measure_all(folders, sharpness.IMAGES, arguments.jobs)
        finished = (
            Finished(result, run.metrics(), run.sharpness())
            for run in every.values()
            if (result := run.result(warn=False)) is not None
        )
        records = collect(folder, finished, outputs)
        failures = {key: reason for key, run in every.items() if (reason := run.failure())}
        # A record from elsewhere must not hide that a run failed here, nor stand in for one unless asked to.
        shown = records.joined
        shown = shown[~shown["id"].isin(failures)]
        if not (arguments.reuse or arguments.collect):
            shown = shown[shown["id"].isin(here)]
        single: dict[str, Statistics] = {}
        for table in tables:
            report = build(table, arguments.protocol, arguments.overrides, shown, failures)
            files = write(table, report, records, folder)
            print(to_markdown(report) if len(tables) == 1 else f"{table.spec.name}: {table.spec.title}")
            single |= {table.spec.name: report[0]} if len(report) == 1 else {}
            to_wandb(table, files, arguments.protocol, outputs)
        if of_findings := {name: single[name] for name in findings.TABLES if name in single}:
            write_findings(of_findings, shown, folder)
    write_text(results / "README.md", index(results))
    print(f"written to {folder}: runs.csv, curves.csv, {', '.join(f'{name}.*' for name in names)}")
    for key, reason in failed.items():
        print(f"failed: {every[key].command}: {reason}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def write_findings(tables: dict[str, Statistics], runs: pd.DataFrame, folder: Path) -> None:
    """FINDINGS.md, from all of its tables with every row complete."""
    page, names = folder / "FINDINGS.md", ", ".join(findings.TABLES)
    missing = sum((table.frame["status"] != "complete").sum() for table in tables.values())
    if len(tables) < len(findings.TABLES):
        if page.exists():
            print(f"FINDINGS.md is as it was: it is written when the tables {names} are, together")
    elif missing:
        page.unlink(missing_ok=True)
        print(f"FINDINGS.md is written when all rows of {names} are complete: {missing} are not")
    else:
        noise = folder.parent / "quick" / "label_noise.csv"
        there = pd.read_csv(noise) if noise.exists() else None
        write_text(page, findings.findings(tables, runs, there))


def with_group(cell: Cell, tables: Sequence[TableRuns]) -> Cell:
    """With the table that it belongs to as its group in Weights & Biases, where it is tracked there."""
    if cell.run.choices["tracker"] != "wandb":
        return cell
    table = next(table.spec.name for table in tables if cell.run.id in {c.run.id for c in table.cells})
    return replace(cell, overrides=[*cell.overrides, f"tracker.run_group={table}"])


def to_wandb(table: TableRuns, files: list[Path], protocol: str, outputs: Path) -> None:
    run = table.cells[0].run
    if run.choices["tracker"] == "wandb":
        keys = ("project", "entity", "mode", "init_timeout", "finish_timeout")
        settings = {key: run.config["tracker"][key] for key in keys if key in run.config["tracker"]}
        name = f"{protocol}-{table.spec.name}"
        log_table(files, name=name, group=table.spec.name, folder=outputs / ".wandb" / name, **settings)


if __name__ == "__main__":
    launch(main)
