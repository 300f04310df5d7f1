"""What tables under a protocol will cost, before anything runs (`make plan`)."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from hydra import initialize_config_dir
from tabulate import tabulate

from rst.experiments.command_line import launch
from rst.experiments.cost import Cost, Measurements, costs_of
from rst.experiments.sweeps import Cell, gather, place, table_names, table_parser

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
HEADERS = ["table", "setting", "runs", "done", "failed", "to do"]
HEADERS += ["steps", "propagations", "device-hours", "disk (GB)"]


def seconds(cell: Cell, cost: Cost, known: Measurements, rate: float | None) -> float:
    """Of training and nothing else, by the images a second that are given or by this machine's speed."""
    if rate is not None:
        return cost.propagations * cost.batch_size / rate
    return cost.work / known.speed(cell.run.config)


def line(found: Sequence[Cell], known: Measurements, rate: float | None, recorded: set[str]) -> list[float]:
    """runs, done, failed, to do; and of those to do: steps, propagations, hours, gigabytes."""
    done = [cell.run.id in recorded or cell.run.result(warn=False) is not None for cell in found]
    todo = [cell for cell, is_done in zip(found, done, strict=True) if not is_done]
    failed = sum(cell.run.failure() is not None for cell in todo)
    each = list(zip(todo, costs_of((cell.run for cell in todo), known), strict=True))
    return [
        len(found),
        sum(done),
        failed,
        len(todo),
        sum(cost.steps for _, cost in each),
        sum(cost.propagations for _, cost in each),
        sum(seconds(cell, cost, known, rate) for cell, cost in each) / 3600,
        sum(cost.disk_bytes for _, cost in each) / 1e9,
    ]


def main() -> None:
    parser = table_parser(__doc__, CONF)
    parser.add_argument(
        "--images-per-second", type=float, help="of one propagation, in place of a measurement"
    )
    parser.add_argument("--results", default="results", help="folder of the tables")
    arguments = parser.parse_args()
    names = table_names(parser, arguments.table, CONF)
    os.chdir(ROOT)
    known = Measurements(Path(arguments.outputs) / ".measurements.json")
    recorded: set[str] = set()
    runs = Path(arguments.results) / arguments.protocol / "runs.csv"
    if arguments.reuse and runs.exists():
        with runs.open(newline="") as file:
            recorded = {row["id"] for row in csv.DictReader(file)}
    rows, seen = [], set()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        common = [*arguments.overrides, *place(arguments.outputs)]
        for table in gather(names, CONF, arguments.protocol, common):
            for column, found in table.columns.items():
                cells = [cell for _, row in found for cell in row]
                new = [cell for cell in cells if cell.run.id not in seen]  # SGD and SAM are in most tables
                seen |= {cell.run.id for cell in new}
                figures = line(new, known, arguments.images_per_second, recorded)
                rows.append([table.spec.name, " ".join(column), *figures])
    known.save()
    rows.append(["total", "", *(sum(column) for column in list(zip(*rows, strict=True))[2:])])
    formats = ("", "", *["d"] * 5, ".0f", ".2f", ".2f")
    print(tabulate(rows, HEADERS, floatfmt=formats, intfmt=" "))
    source = (
        f"{arguments.images_per_second:g} images a second and propagation, as given"
        if arguments.images_per_second
        else "a rough estimate from this machine's speed on ResNet-20 and each model's operations"
    )
    print(f"\nOf what is to do. Device-hours: training alone, by {source}. A run in two tables counts once.")


if __name__ == "__main__":
    launch(main)
