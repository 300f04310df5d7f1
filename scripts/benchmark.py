"""Measure how close training comes to its limits, and compare with others (`make benchmark`).

Every figure is a ratio of measurements taken in turn, the median over rounds with its quartiles: times would
say little about the code on a machine that others use too.
"""

import argparse
import csv
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from io import StringIO
from pathlib import Path
from typing import Any

from joblib import cpu_count

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes lines of its own to stderr

import benchmark_suite as suite
import benchmark_update as update
import torch
from tabulate import tabulate

from rst.benchmark import Figure, Settings
from rst.experiments.command_line import launch
from rst.files import write_text
from rst.training.device import cpu_threads
from rst.training.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {
    function.__name__: function
    for function in (
        update.steps,
        update.perturbation,
        update.memory,
        suite.data,
        suite.end_to_end,
        suite.sweep,
        suite.start,
        update.growth,
        suite.planning,
    )
}
COLUMNS = [*(field.name for field in fields(Figure)), "reached"]
ROUNDING = {"≤": ROUND_CEILING, "<": ROUND_CEILING, "≥": ROUND_FLOOR, "": ROUND_HALF_EVEN}


def to_csv(figures: Sequence[Figure]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(one, column) for column in COLUMNS] for one in figures)
    return text.getvalue()


def shown(figure: Figure) -> str:
    """The ratio, rounded away from its target, so that none looks reached that is not."""
    rounding = ROUNDING[figure.target[:1]]
    return str(Decimal(repr(figure.ratio)).quantize(Decimal("0.001"), rounding))


def quartiles(figure: Figure) -> str:
    return f"{figure.low:.3f} to {figure.high:.3f}" if figure.rounds > 1 else "–"


def section_table(figures: Sequence[Figure]) -> str:
    headers = ["what", "model", "ratio", "quartiles", "rounds", "target", "reached"]
    rows = [(f.what, f.model, shown(f), quartiles(f), f.rounds, f.target, f.reached) for f in figures]
    align = ("left", "left", "right", "right", "right", "left", "left")
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=align)


def to_markdown(figures: Sequence[Figure], made_with: dict[str, Any], command: str) -> str:
    """`made_with`: see `rst.training.run.provenance`."""
    dirty = ", uncommitted changes" * bool(made_with["dirty"])
    missed = sum(one.reached == "no" for one in figures)
    n_targets = sum(bool(one.target) for one in figures)
    parts = [
        f"# Benchmark on {made_with['host']}",
        f"{made_with['device_name']}, {cpu_count()} of them for this process. Python "
        f"{made_with['versions']['python']}, PyTorch {made_with['versions']['torch']} with "
        f"{made_with['threads']} thread(s) where a section does not say otherwise. Commit "
        f"{made_with['commit']}{dirty}. {datetime.now(UTC):%Y-%m-%d} (UTC). `{command}`",
        "Each ratio is the median over rounds, in which what it compares takes turns, with the quartiles. "
        "Ratios of times and of memory are better when smaller, of images or steps a second when larger. "
        f"With a target, a ratio is rounded away from it. {n_targets} targets, {missed} missed.",
    ]
    for name in dict.fromkeys(one.section for one in figures):
        own = [one for one in figures if one.section == name]
        parts += [f"## {name}", " ".join((SECTIONS[name].__doc__ or "").split()), section_table(own)]
    return "\n\n".join(parts) + "\n"


def measure(sections: Sequence[str], settings: Settings) -> list[Figure]:
    found = []
    with cpu_threads(settings.threads):
        for name in sections:
            begun = time.perf_counter()
            own = list(SECTIONS[name](settings))
            print(f"{name}, {time.perf_counter() - begun:.0f} s\n\n{section_table(own)}\n", flush=True)
            found += own
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sections", default="all", help=f"of {', '.join(SECTIONS)}; with commas, or all")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="of a measurement")
    parser.add_argument("--threads", type=int, default=Settings.threads, help="of PyTorch")
    parser.add_argument("--quick", action="store_true", help="tiny models and data, to see that it runs")
    parser.add_argument("--results", help="folder; results, or outputs/results where not all is measured")
    arguments = parser.parse_args()
    names = list(SECTIONS) if arguments.sections == "all" else arguments.sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(unknown)}: choose from {', '.join(SECTIONS)}, all")
    if min(arguments.rounds, arguments.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    os.chdir(ROOT)
    figures = measure(names, Settings(arguments.rounds, arguments.threads, arguments.quick))

    with cpu_threads(arguments.threads):
        made_with = provenance(torch.device("cpu"))
    # A part must not take the place of the whole.
    is_whole = set(names) == set(SECTIONS) and not arguments.quick
    folder = Path(arguments.results or ("results" if is_whole else "outputs/results")) / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])
    host = re.sub(r"[^A-Za-z0-9_.-]+", "_", made_with["host"])
    for suffix, text in ((".md", to_markdown(figures, made_with, command)), (".csv", to_csv(figures))):
        write_text(folder / f"{host}{suffix}", text)
    missed = [
        f"{one.what} ({one.model}): {shown(one)}, {one.target}" for one in figures if one.reached == "no"
    ]
    print("\n".join(["missed targets:", *missed] if missed else ["no target is missed"]))
    print(f"written to {folder}: {host}.md, {host}.csv")


if __name__ == "__main__":
    launch(main)
