"""What tables under a protocol will cost, before anything runs (make plan)."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from hydra import initialize_config_dir
from tabulate import tabulate

from rst.experiments.command_line import launch
from rst.experiments.cost import cost_of, speed
from rst.experiments.sweeps import Cell, gather, results_of, split, table_parser, with_outputs
from rst.reporting.records import recorded_in

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ["table", "column", "runs", "done", "failed", "to do"]
HEADERS += ["steps", "propagations", "device-hours", "disk (GB)"]


def totals(cells: Sequence[Cell], recorded: Collection[str], rate: float | None) -> list[float]:
    """Of runs that differ in nothing but their seed: runs, done, failed, to do; and of those to do: steps,
    propagations, hours, gigabytes. `rate`: images a second of one propagation, None for this machine's."""
    todo = [c for c in cells if c.run.id not in recorded and c.run.result(warn=False) is None]
    failed = sum(cell.run.failure() is not None for cell in todo)
    counts = [len(cells), len(cells) - len(todo), failed, len(todo)]
    if not todo:
        return [*counts, 0, 0, 0, 0]
    cost = cost_of(todo[0].run.config)
    seconds = cost.images / rate if rate else cost.work / speed(todo[0].run.config)
    each = (cost.steps, cost.propagations, seconds / 3600, cost.disk_bytes / 1e9)
    return [*counts, *(len(todo) * number for number in each)]


def main() -> None:
    parser = table_parser(__doc__, ROOT / "conf")
    parser.add_argument("--images-per-second", type=float, help="of one propagation; measured if not given")
    arguments = parser.parse_intermixed_args()
    os.chdir(ROOT)
    rate = arguments.images_per_second
    common, _ = split(arguments.overrides)
    results = arguments.results or results_of(common, arguments.outputs)
    recorded = set(recorded_in(results / arguments.protocol).runs["id"]) if arguments.reuse else set()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = with_outputs(common, arguments.outputs)
        tables, cells = gather(arguments.table, ROOT / "conf", arguments.protocol, overrides)
    lines = []
    for table in tables:
        for column in table.columns:
            # A run of several tables, as those of SGD and SAM are, counts in the first.
            rows = [[cells.pop(key) for key in row.runs.values() if key in cells] for row in column.rows]
            numbers = [totals(row, recorded, rate) for row in rows]
            lines.append([table.name, column.name, *map(sum, zip(*numbers, strict=True))])
    lines.append(["total", "", *(sum(numbers) for numbers in list(zip(*lines, strict=True))[2:])])
    formats = ("", "", *["d"] * 5, ".0f", ".2f", ".2f")
    print(tabulate(lines, HEADERS, floatfmt=formats, intfmt=" "))
    source = (
        f"at {rate:g} images a second and propagation, as given"
        if rate
        else "a rough estimate from this machine's speed with ResNet-20 and each model's operations"
    )
    print(
        "\nSteps, propagations, hours and disk space are those of the runs to do. Device-hours: of training "
        f"alone, {source}. A run in two tables counts once."
    )


if __name__ == "__main__":
    launch(main)
