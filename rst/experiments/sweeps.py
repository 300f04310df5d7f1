"""From a table's specification (conf/table) to the runs that it stands for under a protocol."""

import argparse
import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rst.experiments.command_line import describe
from rst.reporting.tables import Column, Row, Table
from rst.training.identity import can_change_results
from rst.training.run import Run

OUTPUTS = Path("outputs")
SETTING = ("dataset", "model", "augment")  # the groups whose options say what a column is


@dataclass
class RowSpec:
    """A method with its settings. Where `overrides` sweep, a row for each combination; `label` then names the
    swept values in braces: `p = {schedule.p}`. A `published` test error, in percent, needs its `source`.
    `epochs_factor` multiplies the row's epochs, which are then rounded; it may have `seeds` of its own."""

    label: str = MISSING
    overrides: list[str] = MISSING
    epochs_factor: float = 1.0
    seeds: str | None = None
    published: float | None = None
    source: str | None = None


@dataclass
class TableSpec:
    """A file of conf/table: the same `rows` in each column, differences to the rows labelled `reference` and
    `baseline`.

    Args:
        columns: the key of conf/columns/<protocol>.yaml that lists the columns.
        seeds: such as "0,1,2", in place of the protocol's. A column may have others, as an override.
        metrics: what the table's page shows (`rst.reporting.pages.METRICS`), None for the usual ones.
    """

    title: str = MISSING
    reference: str = MISSING
    baseline: str = MISSING
    rows: list[RowSpec] = MISSING
    columns: str = "one"
    seeds: str | None = None
    metrics: list[str] | None = None


@dataclass(frozen=True)
class Cell:
    """A run, the overrides that make `train.py` do it, and where it belongs: the table's name, the column's,
    and a title from column, row and seed. A run of several tables belongs to the first."""

    overrides: list[str]
    run: Run
    table: str = ""
    column: str = ""
    title: str = ""


def options(conf: Path, group: str) -> list[str]:
    """The names of a group's files."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def read_table(conf: Path, name: str, protocol: str) -> tuple[TableSpec, dict[str, list[str]]]:
    """conf/table/`name`.yaml, its rows expanded, and the overrides of each of its columns, by name.

    Columns come from conf/columns/`protocol`.yaml, and so do the values that a row takes as `${grid.…}`, and
    `anchors`, the seeds of the rows that all others are compared with, where they have more than those.

    Raises:
        ValueError: the specification has an unknown key, lacks one, or contradicts itself.
    """
    where = f"table {name}"
    settings: Any = OmegaConf.load(conf / "columns" / f"{protocol}.yaml")
    try:
        table = OmegaConf.merge(TableSpec, OmegaConf.load(conf / "table" / f"{name}.yaml"))
        anchors = settings.pop("anchors", None)
        both = OmegaConf.create({"grid": settings.pop("grid", {}), "table": table})
        spec: TableSpec = OmegaConf.to_object(both)["table"]  # type: ignore[assignment,call-overload,index]
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    if spec.columns not in settings:
        raise ValueError(f"{where}: columns must be one of {', '.join(settings)}, got {spec.columns!r}")
    rows = []
    for row in spec.rows:
        is_anchor = row.label in (spec.reference, spec.baseline)
        seeds = row.seeds or spec.seeds or (anchors if is_anchor else None)
        for label, overrides in expand(row.label, row.overrides, where):
            rows.append(replace(row, label=label, overrides=overrides, seeds=seeds))
    columns: dict[str, list[str]] = {}
    for template, sweep in settings[spec.columns].items():
        for column, overrides in expand(template, sweep, where):
            if column in columns:
                raise ValueError(f"{where}: two columns are called {column}")
            columns[column] = overrides
    return replace(spec, rows=rows), columns


def expand(name: str, overrides: Sequence[str], where: str) -> list[tuple[str, list[str]]]:
    """Each combination of the values that `overrides` sweep over, the seed excepted, the last one varying
    fastest, with its name: `name` with the values in place of the keys in braces.

    Raises:
        ValueError: naming `where`, for an override that Hydra rejects or a key that no override sets.
    """
    choices = []
    for override in _parse(overrides, where):
        if override.is_sweep_override() and (key := override.get_key_element()) != "seed":
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([str(override.input_line)])
    named = []
    for combination in itertools.product(*choices):
        label = name
        for text in combination:
            key, _, value = text.partition("=")
            label = label.replace(f"{{{key}}}", value)
        if unset := re.search(r"\{.*\}", label):
            raise ValueError(f"{where}: {name!r} names {unset[0]}, which no override sets")
        named.append((label, list(combination)))
    return named


def _parse(overrides: Sequence[str], where: str) -> list[Override]:
    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            raise ValueError(f"{where}: cannot read {text!r}: {str(error).splitlines()[0]}") from None
    return parsed


def cells_of(overrides: Sequence[str]) -> list[Cell]:
    """The runs that `python train.py -m` would do with these overrides, of which only the seed may sweep.

    Without an override of the seed, its seeds are the protocol's. To be called within
    `hydra.initialize_config_dir`, as `gather`.
    """
    given = [text for text in overrides if _key(text) == "seed"]
    others = _but_seeds(overrides)
    if sweeps := [str(o.input_line) for o in _parse(others, "overrides") if o.is_sweep_override()]:
        raise ValueError(f"only seed= may sweep here, not {' '.join(sweeps)}: list the rows in conf/table")
    cfg, hydra_cfg = _compose(others)
    given = given or [f"seed={(hydra_cfg.sweeper.params or {}).get('seed', cfg.seed)}"]
    (swept,) = _parse(given[-1:], "overrides")
    cells: list[Cell] = []
    for seed in swept.sweep_iterator() if swept.is_sweep_override() else [swept.value()]:
        if cells and (type(seed) is not int or seed < 0):
            raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}")
        cfg.seed = seed
        if not cells:  # runs that differ in their seed need one composition and one check
            first = describe(cfg, hydra_cfg)
        single = [*others, f"seed={seed}"]
        config: Any = OmegaConf.to_container(cfg, resolve=True)  # the part of the data may follow the seed
        cells.append(Cell(single, replace(first, config=config, command=_train(single))))
    return cells


def _compose(overrides: Sequence[str]) -> tuple[DictConfig, Any]:
    """train.yaml with these overrides, and Hydra's own part."""
    cfg = compose("train", list(overrides), return_hydra_config=True)
    with open_dict(cfg):
        hydra_cfg = cfg.pop("hydra")
    return cfg, hydra_cfg


def _train(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "train.py", *arguments])


def gather(
    names: Iterable[str], conf: Path, protocol: str, common: Sequence[str]
) -> tuple[list[Table], dict[str, Cell]]:
    """The tables, and the runs of all of them by run id.

    `common` are overrides for every run.

    Raises:
        ValueError: one of them would override what a row is, or all that tells two columns apart.
    """
    tables: list[Table] = []
    cells: dict[str, Cell] = {}
    for name in names:
        spec, settings = read_table(conf, name, protocol)
        columns = []
        for column, chosen in settings.items():
            rows, epochs, setting, shown = [], {}, "", column if len(settings) > 1 else ""
            for row in spec.rows:
                if both := _keys(row.overrides) & _keys(common):
                    raise ValueError(f"table {name}: its row {row.label} has a {both.pop()} of its own")
                overrides = [f"protocol={protocol}", *chosen, *row.overrides, *common]
                if row.epochs_factor != 1:
                    usual = _compose(_but_seeds(overrides))[0].epochs
                    overrides.append(f"epochs={max(1, round(row.epochs_factor * usual))}")
                if row.seeds and overrides == _but_seeds(overrides):
                    overrides.append(f"seed={row.seeds}")
                runs, cells_of_row = {}, cells_of(overrides)
                for cell in cells_of_row:
                    run, seed = cell.run, cell.run.config["seed"]
                    runs[seed] = run.id
                    title = " / ".join(filter(None, [name, shown, f"{row.label}, seed {seed}"]))
                    cells.setdefault(run.id, replace(cell, table=name, column=column, title=title))
                command = _train(["-m", *(text for text in overrides if not text.startswith("outputs="))])
                folds = _folds([cell.run for cell in cells_of_row])
                rows.append(Row(row.label, command, runs, row.published, row.source, folds=folds))
                epochs[row.label] = run.config["epochs"]
                if row.label == spec.baseline:
                    setting = _setting(run, protocol, folds)
            of_baseline = epochs.get(spec.baseline, 1)
            rows = [replace(row, epochs_factor=epochs[row.label] / of_baseline) for row in rows]
            columns.append(Column(shown, setting, rows, run.split))
        of_columns = {tuple(row.first_run for row in column.rows) for column in columns}
        if len(of_columns) < len(columns):
            raise ValueError(
                f"table {name}: two columns are the same, with {' '.join(common) or 'no overrides'}"
            )
        metrics = None if spec.metrics is None else tuple(spec.metrics)
        try:
            tables.append(Table(name, spec.title, spec.reference, spec.baseline, columns, metrics))
        except ValueError as error:
            raise ValueError(f"table {name}: {error}") from None
    return tables, cells


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _keys(overrides: Sequence[str]) -> set[str]:
    return set(map(_key, overrides))


def _but_seeds(overrides: Sequence[str]) -> list[str]:
    return [text for text in overrides if _key(text) != "seed"]


def _folds(runs: Sequence[Run]) -> int | None:
    """The number of parts of the data, where the seeds say which one a run is trained on."""
    follow = all(run.config["dataset"].get("fold") == run.config["seed"] for run in runs)
    return runs[0].config["dataset"].get("folds") if follow else None


def _setting(run: Run, protocol: str, folds: int | None) -> str:
    """Data, model and augmentation, each with the values that are not its option's; epochs and batch size."""
    plain, _ = _compose([f"{group}={run.choices[group]}" for group in SETTING])
    said = {"root", "name", *(["fold"] if folds else [])}
    parts = [f"Protocol {protocol}"]
    for group in SETTING:
        default: Any = OmegaConf.to_container(plain[group], resolve=True)
        node = run.config[group].items()
        changed = [f"{k} {v}" for k, v in node if v != default.get(k) and k not in said]
        parts.append(f"{group} {run.choices[group]}" + (f" ({', '.join(changed)})" if changed else ""))
    return ", ".join([*parts, f"{run.config['epochs']} epochs", f"batch size {run.config['batch_size']}"])


def table_parser(description: str | None, conf: Path) -> argparse.ArgumentParser:
    """The arguments of the scripts about tables."""

    def tables(text: str) -> list[str]:
        existing = options(conf, "table")
        names = existing if text == "all" else text.split(",")
        if unknown := set(names) - set(existing):
            raise argparse.ArgumentTypeError(
                f"unknown table {', '.join(unknown)}: choose from {', '.join(existing)}, all"
            )
        return names

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--protocol", default="quick", choices=options(conf, "protocol"))
    parser.add_argument("--table", default="overview", type=tables, help="of conf/table: A,B or all")
    parser.add_argument("--outputs", default=OUTPUTS, type=Path, help="folder of the run folders")
    parser.add_argument("--results", type=Path, help="folder of the tables")
    parser.add_argument(
        "--reuse", action="store_true", help="what runs.csv records counts as complete and stays"
    )
    parser.add_argument("overrides", nargs="*", help="for every run, such as epochs=1")
    return parser


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of runs, and those of Hydra's own settings ("hydra.launcher.partition=gpu")."""
    of_hydra = [text for text in overrides if _key(text).startswith("hydra")]
    return [text for text in overrides if text not in of_hydra], of_hydra


def results_of(overrides: Sequence[str], outputs: Path) -> Path:
    """The folder of tables: "results", or `outputs`/results where overrides change what the runs are, as a
    shortened table must not take the place of the whole one."""
    changed = any(map(can_change_results, _keys(overrides)))
    return outputs / "results" if changed else Path("results")


def with_outputs(overrides: Sequence[str], outputs: Path) -> list[str]:
    """The overrides, with that for the folder of run folders. The default is left out, so that the commands
    that runs record hold anywhere."""
    if outputs == OUTPUTS:
        return [*overrides]
    text = str(outputs)
    if not re.fullmatch(r"[\w./-]+", text, re.ASCII):  # Hydra's grammar takes the others in quotes only
        text = "'" + text.replace("'", r"\'") + "'"
    return [*overrides, f"outputs={text}"]
