"""Test the predictions of docs/theory.md, through the real RST (make theory)."""

import argparse
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from rst.files import write_atomically, write_text
from rst.reporting.pages import fill
from rst.training.provenance import provenance

from . import figures, images, page, rate, strength

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "results" / "theory"
Task = tuple[Callable[[], Any], int]  # what to do, and how many steps of how many runs that is


def run_all(tasks: Mapping[Any, Task], jobs: int, kept: Path) -> dict[Any, Any]:
    """What each task returns, largest first, with a bar that counts steps. Results stay in `kept`, for the
    next call to go on from where this one was interrupted."""
    kept.mkdir(parents=True, exist_ok=True)
    files = {key: kept / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.pickle" for key in tasks}
    results = {key: pickle.loads(file.read_bytes()) for key, file in files.items() if file.exists()}  # noqa: S301
    todo = sorted(tasks.keys() - results.keys(), key=lambda key: -tasks[key][1])
    context = get_context("forkserver")
    with (
        ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool,
        tqdm(total=sum(tasks[key][1] for key in todo), unit="step", unit_scale=True) as bar,
    ):
        started = {pool.submit(tasks[key][0]): key for key in todo}
        for future in as_completed(started):
            key = started[future]
            results[key] = future.result()
            write_atomically(files[key], partial(pickle.dump, results[key]))
            bar.update(tasks[key][1])
    return results


def experiments() -> tuple[dict[Any, Task], Callable[[Mapping[Any, Any]], dict[str, pd.DataFrame]]]:
    """The tasks, and what makes the records of their results."""
    of_strength = {
        ("strength", setting): (
            partial(strength.measure, setting, first=i * strength.CHAINS),
            strength.CHAINS * strength.STEPS,
        )
        for i, setting in enumerate(strength.SETTINGS)
    }
    lists = {"rate": rate.rate_runs(), "floor": rate.floor_runs()}
    of_network = {
        (name, block): (partial(rate.measure, block), block.steps)
        for name, runs in lists.items()
        for block in rate.blocks(runs)
    }

    def records(results: Mapping[Any, Any]) -> dict[str, pd.DataFrame]:
        seen = {
            name: rate.joined({block: results[name, block] for block in rate.blocks(runs)})
            for name, runs in lists.items()
        }
        sgd, *others = lists["floor"]
        lines = {
            "strength": [results[key] for key in of_strength],
            "rate": [rate.rate_row(runs, seen["rate"][runs]) for runs in lists["rate"]],
            "floor": [rate.floor_row(runs, seen["floor"][runs], seen["floor"][sgd]) for runs in others],
        }
        return {name: pd.DataFrame(rows) for name, rows in lines.items()}

    return {**of_strength, **of_network}, records


def write(folder: Path, records: Mapping[str, pd.DataFrame]) -> None:
    """The figures, and the tables in README.md."""
    runs = images.image_runs(ROOT)
    drawn = {
        "strength": figures.strength(records["strength"]),
        "rate": figures.rate(records["rate"], records["floor"]),
        "images": figures.images(runs),
    }
    for name, figure in drawn.items():
        write_atomically(folder / f"{name}.png", partial(figure.savefig, format="png"))
    for name, table in page.tables(records, runs).items():
        fill(folder / "README.md", name, table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.theory", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--collect", action="store_true", help="run nothing, draw what is recorded")
    arguments = parser.parse_args()
    if not arguments.collect:
        made_with = provenance(torch.device("cpu"))
        tasks, records = experiments()
        code = f"{made_with['commit']}{'+changes' * bool(made_with['dirty'])}"
        kept = ROOT / "outputs" / "theory" / code
        if made_with["dirty"]:
            shutil.rmtree(kept, ignore_errors=True)  # of code that may have changed since
        for name, frame in records(run_all(tasks, arguments.jobs, kept)).items():
            frame["commit"] = code
            frame["torch"], frame["device"] = made_with["versions"]["torch"], made_with["device_name"]
            write_text(FOLDER / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
    write(FOLDER, page.recorded(FOLDER))
    print(f"written to {FOLDER}")


if __name__ == "__main__":
    main()
