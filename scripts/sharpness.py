"""Measure how sharp the minima are in which finished runs ended: python scripts/sharpness.py outputs/RUN…

Writes sharpness.json into each run's folder, which `make tables` collects (rst/reporting/sharpness.py says
what is measured). What a folder has is not measured again.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from joblib import Parallel, cpu_count, delayed
from omegaconf import OmegaConf

import rst.experiments.command_line  # noqa: F401  registers the resolver that a configuration may use
from rst.data import ImageData, evaluation_batches
from rst.data.images import SHARPNESS_SPLIT, stratified
from rst.experiments.command_line import launch
from rst.files import write_text
from rst.reporting import sharpness
from rst.training import checkpoint
from rst.training.device import cpu_threads
from rst.training.fit import new_model
from rst.training.run import provenance

IMAGES = 500  # by default
BATCH_SIZE = 250


def batches_of(data: ImageData, at_most: int, seed: int) -> sharpness.Batches:
    """So many of the training images, stratified, or all where there are fewer; normalized only."""
    labels = data.train_labels
    chosen = torch.arange(len(labels))
    if at_most < len(labels):
        chosen, _ = stratified(labels, at_most, seed, SHARPNESS_SPLIT)
    images = data.train_images
    if not isinstance(images, torch.Tensor):
        raise ValueError("the images must be in memory: dataset.in_memory=true")
    subset = replace(data, test_images=images[chosen], test_labels=labels[chosen])
    return list(evaluation_batches(subset, BATCH_SIZE))


def measure(folder: Path, at_most: int) -> str:
    """Measure the run in `folder`. Returns a line on it."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is no folder of a finished run: it has no result.json") from None
    path = folder / "sharpness.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    wanted = {key: result[key] for key in ("id", "finished")}
    wanted |= {"at_most": at_most, "directions": sharpness.DIRECTIONS}
    if not wanted.items() <= found.items():
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
        state = checkpoint.load(folder / "checkpoint.pt", result["id"])
        if state is None:
            raise FileNotFoundError(f"{folder} has no checkpoint, which the weights would be in")
        begun = time.perf_counter()
        with cpu_threads(1):
            data = instantiate(config["dataset"], _convert_="all")
            model = new_model(config, data)
            model.load_state_dict(state["training"]["model"])
            rho = config["method"].get("rho", config["rho"])
            batches = batches_of(data, at_most, config["dataset"].get("seed", 0))
            measured = sharpness.measure(model, batches, rho)
            found = {
                "images": sum(len(y) for _, y in batches),
                "rho": rho,
                **asdict(measured),
                "seconds": time.perf_counter() - begun,
                **provenance(torch.device("cpu")),
                **wanted,
            }
        write_text(path, json.dumps(found, indent=1, allow_nan=False))
    return (
        f"{result['name']}: loss {found['loss']:.4f}, λ_max {found['lambda_max']:.2f}, "
        f"L(θ+ε) − L(θ) {found['in_ball']:.4f} at ρ = {found['rho']:g}"
    )


def measure_all(folders: Sequence[Path], at_most: int, jobs: int) -> None:
    """Print a line on each, in their order, `jobs` of them measured at once."""
    tasks = [delayed(measure)(folder, at_most) for folder in folders]
    for line in Parallel(n_jobs=jobs, return_as="generator")(tasks):
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--images", type=int, default=IMAGES, help="at most so many training images")
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="runs at once")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    if arguments.images < 10:
        parser.error(f"--images must be at least 10, got {arguments.images}")
    finished = [folder for folder in arguments.runs if (folder / "result.json").exists()]
    if unfinished := [str(folder) for folder in arguments.runs if folder not in finished]:
        print(f"left out, as not finished: {', '.join(unfinished)}", file=sys.stderr)
    measure_all(finished, arguments.images, arguments.jobs)
    sys.exit(0 if finished else 1)


if __name__ == "__main__":
    launch(main)
