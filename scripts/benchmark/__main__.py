"""Measure how close training comes to its limits, and compare it with other implementations."""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes lines to stderr

import pandas as pd
import torch
from tabulate import tabulate

from rst.files import write_text
from rst.training.device import keep_memory
from rst.training.provenance import provenance

from .measuring import Ratio
from .peers import optimizer_at
from .sections import SECTIONS, Settings

ROOT = Path(__file__).resolve().parents[2]
Results = Mapping[str, Sequence[Ratio]]  # by section


def machine(device_name: str) -> str:
    """A file name for the kind of machine: "Intel(R) Xeon(R) Processor (2 cores)" is xeon-2core."""
    words = re.sub(r"\((R|TM)\)|\b(Intel|AMD|NVIDIA|CPU|Processor)\b|@.*?GHz", " ", device_name)
    words = re.sub(r"\((\d+) cores?\)", r"\1core", words)
    return "-".join(re.findall(r"[a-z0-9.]+", words.lower()))


def table(ratios: Sequence[Ratio]) -> str:
    rows = []
    for r in ratios:
        quartiles = f"{r.low:.3f} to {r.high:.3f}" if r.rounds > 1 else "exact"
        reached = {None: "", True: "yes", False: "no"}[r.reached]
        rows.append((r.what, r.setting, f"{r.median:.3f}", quartiles, r.target, reached))
    headers = ["What", "Setting", "Ratio", "Quartiles", "Target", "Reached"]
    align = ("left", "left", "right", "right", "left", "left")
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=align)


def page(results: Results, settings: Settings, made_with: Mapping[str, Any], command: str) -> str:
    """`made_with`: see `rst.training.provenance`."""
    reached = [ratio.reached for section in results.values() for ratio in section if ratio.target]
    versions, dirty = made_with["versions"], " with uncommitted changes" * bool(made_with["dirty"])
    parts = [
        f"# Benchmark on {made_with['device_name']}",
        f"Each ratio is the median over {settings.rounds} rounds, with its quartiles. In a round, all that "
        "is compared takes its turn, and ratios are taken within rounds, so that other load on the machine "
        "hits both sides alike. On the CPU, times are CPU times of one thread. Ratios of times and of memory "
        "are better when smaller, those of images a second when larger. "
        f"{reached.count(True)} of {len(reached)} targets reached.",
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, commit {made_with['commit']}{dirty}, Python "
        f"{versions['python']}, PyTorch {versions['torch']}, torchvision {version('torchvision')}, "
        f"pytorch_optimizer {version('pytorch-optimizer')}.",
    ]
    for name, section in results.items():
        parts += [f"## {name}", " ".join((SECTIONS[name].__doc__ or "").split()), table(section)]
    return "\n\n".join(parts) + "\n"


def to_csv(results: Results) -> str:
    frames = {name: pd.DataFrame(map(asdict, section)) for name, section in results.items()}
    return pd.concat(frames, names=["section"]).droplevel(1).to_csv(lineterminator="\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark", description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="of each measurement")
    parser.add_argument("--device", type=torch.device, default=Settings.device, help="cpu, cuda, cuda:1, …")
    parser.add_argument("--against", metavar="COMMIT", help="compare steps with that commit's optimizer")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--results", type=Path, help="folder (results/benchmark; outputs/… for a part)")
    arguments = parser.parse_args()
    before = None
    if arguments.against:
        try:
            before = optimizer_at(arguments.against, ROOT)
        except subprocess.CalledProcessError as error:
            parser.error(f"--against {arguments.against}: {error.stderr.decode().strip()}")
    settings = Settings(arguments.rounds, arguments.device, arguments.quick, before)

    torch.set_num_threads(1)
    keep_memory()  # as train.py does; else a step's time depends on what the C library gave back before it
    made_with = provenance(settings.device)
    is_whole = set(arguments.sections) == SECTIONS.keys() and not (settings.quick or before)
    folder = arguments.results or ROOT / ("results" if is_whole else "outputs") / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine(made_with['device_name'])}.md"
    command = shlex.join(["python", "-m", "scripts.benchmark", *sys.argv[1:]])
    results = {}
    for name in arguments.sections:
        begin = time.perf_counter()
        results[name] = list(SECTIONS[name](settings))
        print(f"{name}, {time.perf_counter() - begin:.0f} s\n\n{table(results[name])}\n", flush=True)
        # After each section, as the time on a GPU may end before the last.
        write_text(path, page(results, settings, made_with, command))
        write_text(path.with_suffix(".csv"), to_csv(results))
    print(f"written to {path} and {path.with_suffix('.csv').name}")


if __name__ == "__main__":
    main()
