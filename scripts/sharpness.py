"""Measure how sharp the minima are in which finished runs ended: python scripts/sharpness.py outputs/RUN…

Writes sharpness.json into each run's folder, which `make tables` collects (see rst/sharpness.py for what is
measured). What a folder has is not measured again.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from joblib import Parallel, delayed
from omegaconf import OmegaConf

import rst.command_line  # noqa: F401  registers the resolver that a configuration may use
from rst import checkpoint, sharpness
from rst.checkpoint import write_text
from rst.command_line import launch
from rst.data import ImageData, evaluation_batches
from rst.data.images import SHARPNESS_SPLIT, stratified
from rst.device import cpu_cores, cpu_threads
from rst.record import provenance
from rst.run import new_model

BATCH_SIZE = 250


def batches_of(data: ImageData, n_images: int, seed: int) -> sharpness.Batches:
    """`n_images` of the training images, stratified, normalized only."""
    labels = data.train_labels
    if not 10 <= n_images <= len(labels):
        raise ValueError(f"--images must be from 10 to the {len(labels)} training images, got {n_images}")
    chosen = torch.arange(len(labels))
    if n_images < len(labels):
        chosen, _ = stratified(labels, n_images, seed, SHARPNESS_SPLIT)
    images = data.train_images
    if not isinstance(images, torch.Tensor):
        raise ValueError("the images must be in memory: dataset.in_memory=true")
    subset = replace(data, test_images=images[chosen], test_labels=labels[chosen])
    return list(evaluation_batches(subset, BATCH_SIZE))


def measure(folder: Path, n_images: int) -> str:
    """Measure the run in `folder`. Returns a line on it."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is no folder of a finished run: it has no result.json") from None
    path = folder / "sharpness.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("id") != result["id"] or found.get("images") != n_images:
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
            batches = batches_of(data, n_images, config["dataset"].get("seed", 0))
            measured = sharpness.measure(model, batches, rho)
            found = {
                "id": result["id"],
                "images": n_images,
                "rho": rho,
                **asdict(measured),
                "seconds": time.perf_counter() - begun,
                **provenance(torch.device("cpu")),
            }
        write_text(path, json.dumps(found, indent=1, allow_nan=False))
    return (
        f"{result['name']}: loss {found['loss']:.4f}, λ_max {found['lambda_max']:.2f}, "
        f"L(θ+ε) − L(θ) {found['in_ball']:.4f} at ρ = {found['rho']:g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--images", type=int, default=500, help="training images that the loss is over")
    parser.add_argument("--jobs", type=int, default=cpu_cores(), help="runs at once")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    tasks = [delayed(measure)(folder, arguments.images) for folder in arguments.runs]
    for line in Parallel(n_jobs=arguments.jobs, return_as="generator")(tasks):
        print(line, flush=True)


if __name__ == "__main__":
    launch(main)
