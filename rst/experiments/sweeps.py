"""A table's specification (conf/table) and the runs that it stands for under a protocol."""

import argparse
import multiprocessing
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from joblib import cpu_count
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rst.experiments.command_line import describe
from rst.experiments.settings import check
from rst.training.run import Run

KEYS = {"title", "reference", "baseline", "rows", "columns", "seeds", "metrics"}
ROW_KEYS = {"label", "overrides", "published", "source"}


def options(conf: Path, group: str) -> list[str]:
    """The names of a group's files."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


@dataclass(frozen=True)
class Cell:
    """One run of a table: a row in a column at one seed. `overrides` is what train.py is given."""

    overrides: list[str]
    run: Run

    @property
    def seed(self) -> int:
        return self.run.config["seed"]


@dataclass(frozen=True)
class RowSpec:
    label: str
    overrides: list[str]
    published: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class Specification:
    """What a table compares: `rows` (methods and their settings) in each of `columns` (lists of overrides:
    data set, model, augmentation), differences to the rows `reference` and `baseline`, and which `metrics` it
    shows (None: all). `seeds`, a sweep such as "0,1,2", replaces the protocol's."""

    name: str
    title: str
    reference: str
    baseline: str
    rows: list[RowSpec]
    columns: list[list[str]]
    seeds: str | None
    metrics: list[str] | None


def read_specification(conf: Path, table: str, protocol: str) -> Specification:
    """conf/table/`table`.yaml, with the columns that conf/columns/`protocol`.yaml has under its `columns`,
    and with the values that a row takes from there as `${grid.…}`.

    A row's overrides may sweep (`schedule.p=0.25,0.5`): it then stands for a row a combination, and its label
    names the swept values in braces (`p = {schedule.p}`). So may a column's.

    Raises:
        ValueError: naming the table, for an unknown key, a missing one, a sweep that Hydra rejects, or two
            rows with one label.
    """
    where = f"table {table}"
    choices: Any = OmegaConf.to_container(OmegaConf.load(conf / "columns" / f"{protocol}.yaml"))
    loaded = OmegaConf.load(conf / "table" / f"{table}.yaml")
    try:
        both = OmegaConf.create({"grid": choices.pop("grid", {}), "table": loaded})
        spec: Any = OmegaConf.to_container(both, resolve=True)["table"]  # type: ignore[index, call-overload]
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {str(error).splitlines()[0]}") from None
    _check_keys(where, spec, KEYS, {"title", "reference", "baseline", "rows"})
    rows = []
    for row in spec["rows"]:
        _check_keys(f"{where}, row {row.get('label')}", row, ROW_KEYS, {"label", "overrides"})
        if not isinstance(row["overrides"], list):
            raise ValueError(
                f"{where}, row {row['label']}: overrides must be a list, got {row['overrides']!r}"
            )
        if row.get("published") is not None and not row.get("source"):
            raise ValueError(f"{where}, row {row['label']}: the published value needs a source")
        for overrides in expand(row["overrides"], where):
            values = dict(override.split("=", 1) for override in overrides)
            try:
                label = re.sub(r"\{([^}]+)\}", lambda match: values[match[1]], str(row["label"]))  # noqa: B023
            except KeyError as error:
                raise ValueError(
                    f"{where}: label {row['label']!r} names {error}, which no override sets"
                ) from None
            rows.append(RowSpec(label, overrides, row.get("published"), row.get("source")))
    labels = [row.label for row in rows]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"{where}: two rows with one label: {', '.join(sorted(repeated))}")
    if unknown := {spec["reference"], spec["baseline"]} - set(labels):
        raise ValueError(
            f"{where}: no row is labelled {', '.join(sorted(unknown))}; rows: {', '.join(labels)}"
        )
    name = spec.get("columns", "one")
    if name not in choices:
        raise ValueError(f"{where}: columns must be one of {', '.join(choices)}, got {name!r}")
    columns = [column for sweep in choices[name] for column in expand(sweep, where)]
    if spec.get("metrics"):
        from rst.reporting.tables import METRICS  # here, as it takes a second, and a plan does not need it

        if unknown := set(spec["metrics"]) - set(METRICS):
            raise ValueError(
                f"{where}: unknown metrics {', '.join(sorted(unknown))}; known are {', '.join(METRICS)}"
            )
    seeds = spec.get("seeds")
    return Specification(
        table, spec["title"], spec["reference"], spec["baseline"], rows, columns, seeds, spec.get("metrics")
    )


def _check_keys(where: str, node: Mapping[str, Any], known: set[str], needed: set[str]) -> None:
    if unknown := set(node) - known:
        raise ValueError(
            f"{where}: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}"
        )
    if missing := needed - set(node):
        raise ValueError(f"{where}: {', '.join(sorted(missing))} must be given")


def expand(overrides: Sequence[str], where: str) -> list[list[str]]:
    """The single overrides that a list with sweeps stands for, the last one varying fastest.

    Raises:
        ValueError: naming `where` and the override that Hydra rejects.
    """
    combinations: list[list[str]] = [[]]
    for text in overrides:
        override = _parse(text, where)
        if override.is_sweep_override():
            values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        else:
            values = [text]
        combinations = [[*one, value] for one in combinations for value in values]
    return combinations


def _parse(text: str, where: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"{where}: Hydra rejects {text!r}: {cause}") from None


def cells(
    spec: Specification, conf: Path, protocol: str, common: Sequence[str]
) -> Iterator[tuple[list[str], RowSpec, list[Cell]]]:
    """(column, row, its runs: one a seed) for each row in each column. Within `initialize_config_dir`.

    `common` are overrides for every run. Seeds are the row's own, else the specification's, else the
    protocol's, else seed 0.
    """
    wanted = [
        (column, row, [f"protocol={protocol}", *column, *row.overrides, *common])
        for column in spec.columns
        for row in spec.rows
    ]
    _prepare({_split(_without_seeds(overrides)[0], conf)[0] for _, _, overrides in wanted})
    for column, row, overrides in wanted:
        yield column, row, cells_of(overrides, conf, spec.seeds)


def cells_of(overrides: Sequence[str], conf: Path, seeds: str | None = None) -> list[Cell]:
    """The runs that `python train.py -m` would do with these overrides, of which only the seed sweeps."""
    others, given = _without_seeds(overrides)
    cfg, hydra_cfg = composed(others, conf)
    if not given:
        given = [f"seed={seeds or hydra_cfg.sweeper.params.get('seed', cfg.seed)}"]
    first: Run | None = None
    found = []
    for (text,) in expand([given[-1]], "seeds"):
        seed = _parse(text, "seeds").value()
        if first is None:
            cfg.seed = seed
            first = describe(cfg, hydra_cfg)
        # What a run is differs from seed to seed in nothing else, so one composition does for all.
        command = shlex.join(["python", "train.py", *others, text])
        run = Run(first.outputs, first.config | {"seed": seed}, first.choices, command)
        check(run.config, run.choices)
        found.append(Cell([*others, text], run))
    return found


def _without_seeds(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    given = [override for override in overrides if override.startswith("seed=")]
    return [override for override in overrides if override not in given], given


def composed(overrides: Sequence[str], conf: Path) -> tuple[DictConfig, Any]:
    """train.yaml with these overrides, and Hydra's own part. Composing takes a tenth of a second, so what
    differs only in values comes from one composition of the same choices."""
    choices, values = _split(overrides, conf)
    if choices not in _compositions:
        _compositions[choices] = _compose(choices)
    cfg, hydra_cfg = _compositions[choices]
    cfg = deepcopy(cfg)
    try:
        for override in values:
            OmegaConf.update(cfg, override.key_or_group, override.value())
    except OmegaConfBaseException:
        return _compose(tuple(overrides))  # for Hydra's own message
    return cfg, hydra_cfg


_compositions: dict[tuple[str, ...], tuple[DictConfig, Any]] = {}


def _split(overrides: Sequence[str], conf: Path) -> tuple[tuple[str, ...], list[Override]]:
    """The overrides that choose from groups (or change the configuration's keys), and those that set values.

    Raises:
        ValueError: for one that sweeps.
    """
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if sweeps := [text for text, o in zip(overrides, parsed, strict=True) if o.is_sweep_override()]:
        raise ValueError(f"only seed= may sweep here, not {' '.join(sweeps)}: list the rows in conf/table")
    plain = all(not (o.is_add() or o.is_force_add() or o.is_delete()) for o in parsed)
    values = [o for o in parsed if plain and o.key_or_group not in groups and not o.is_hydra_override()]
    return tuple(text for text, o in zip(overrides, parsed, strict=True) if o not in values), values


def _compose(overrides: tuple[str, ...]) -> tuple[DictConfig, Any]:
    cfg = compose("train", list(overrides), return_hydra_config=True)
    with open_dict(cfg):
        hydra_cfg = cfg.pop("hydra")
    return cfg, hydra_cfg


def _prepare(wanted: set[tuple[str, ...]], few: int = 2) -> None:
    """Compose these choices, in several processes where there are more than a few."""
    new = sorted(wanted - _compositions.keys())
    if len(new) > few and "fork" in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context("fork").Pool(cpu_count()) as pool:
            try:
                _compositions.update(zip(new, pool.map(_compose, new), strict=True))
            except Exception:
                return  # `composed` meets the error again, and says which run's it is


@dataclass(frozen=True)
class TableRuns:
    """A table's specification and its runs: by column, then by row."""

    spec: Specification
    columns: dict[tuple[str, ...], list[tuple[RowSpec, list[Cell]]]]

    @property
    def cells(self) -> list[Cell]:
        return [cell for rows in self.columns.values() for _, row in rows for cell in row]


def gather(names: Iterable[str], conf: Path, protocol: str, common: Sequence[str]) -> list[TableRuns]:
    """The runs of these tables. Within `initialize_config_dir`."""
    tables = []
    for name in names:
        spec = read_specification(conf, name, protocol)
        columns: dict[tuple[str, ...], list[tuple[RowSpec, list[Cell]]]] = {}
        for column, row, found in cells(spec, conf, protocol, common):
            columns.setdefault(tuple(column), []).append((row, found))
        tables.append(TableRuns(spec, columns))
    return tables


def table_parser(description: str | None, conf: Path) -> argparse.ArgumentParser:
    """The arguments of every script about tables; `table_names` and `place` read them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--protocol", default="quick", choices=options(conf, "protocol"))
    parser.add_argument("--table", default="overview", help="names from conf/table with commas, or all")
    parser.add_argument("--outputs", default="outputs", help="folder of the run folders")
    parser.add_argument("--reuse", action="store_true", help="what runs.csv records counts as complete")
    parser.add_argument("overrides", nargs="*", help="added to every run, such as epochs=1")
    return parser


def table_names(parser: argparse.ArgumentParser, table: str, conf: Path) -> list[str]:
    """The tables that `--table` asks for; ends the process where there is no such table."""
    known = options(conf, "table")
    names = known if table == "all" else table.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"unknown table {', '.join(unknown)}: choose from {', '.join(known)}, all")
    return names


def place(outputs: str) -> list[str]:
    """The override for the folder of run folders. None for the default, so that the command which a run
    records holds anywhere."""
    return [] if outputs == "outputs" else [f"outputs={outputs}"]
