"""Measures the sharpness of finished runs from the files in their folders."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from omegaconf import OmegaConf

from rst.data import ImageData, evaluation_batches
from rst.data.images import SHARPNESS_SPLIT, stratified
from rst.files import write_text
from rst.reporting import sharpness
from rst.training import checkpoint
from rst.training.device import cpu_threads
from rst.training.parts import new_model, part
from rst.training.provenance import provenance

IMAGES = 500
BATCH_SIZE = 250


def measure_all(radii: Mapping[Path, float | None], images: int = IMAGES, jobs: int = 1) -> None:
    """`measure` the runs in these folders, each at its ρ, `jobs` at once, and print a line on each, in order;
    where it could not be measured, why."""
    tasks = [delayed(_line)(folder, rho, images) for folder, rho in radii.items()]
    for line in Parallel(n_jobs=jobs, return_as="generator")(tasks):
        print(line, flush=True)


def _line(folder: Path, rho: float | None, images: int) -> str:
    try:
        return measure(folder, images, rho)
    except (OSError, ValueError, NotImplementedError) as error:  # some layers have no second derivative
        return f"not measured: {folder}: {error}"


def measure(folder: Path, images: int = IMAGES, rho: float | None = None) -> str:
    """Write sharpness.json into a finished run's folder, unless it is there, and return a line on it.

    The loss is that of so many of the training images, stratified by class, or of all where there are fewer.
    ε has the radius `rho`; None takes the run's setting `rho`, which is its protocol's unless it was given
    another, and not the `method.rho` that ASAM has: runs compare at one radius only.

    Raises:
        FileNotFoundError: the folder is not a finished run's, or has lost its checkpoint.
    """
    try:
        result = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is no folder of a finished run: it has no result.json") from None
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    rho = config["rho"] if rho is None else rho
    path = folder / "sharpness.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    wanted = {"id": result["id"], "finished": result["finished"]}
    wanted |= {"at_most": images, "directions": sharpness.DIRECTIONS, "rho": rho}
    if not wanted.items() <= measured.items():
        measured = _measure(folder, config, result["id"], images, rho) | wanted
        write_text(path, json.dumps(measured, indent=1, allow_nan=False))
    return (
        f"{result['name']}: loss {measured['loss']:.4f}, λ_max {measured['lambda_max']:.2f}, "
        f"L(θ+ε) − L(θ) {measured['in_ball']:.4f} at ρ = {measured['rho']:g}"
    )


def _measure(folder: Path, config: dict[str, Any], run_id: str, images: int, rho: float) -> dict[str, Any]:
    state = checkpoint.load(folder / "checkpoint.pt", run_id)
    if state is None:
        raise FileNotFoundError(f"{folder} has no checkpoint, which the weights would be in")
    began = time.perf_counter()
    with cpu_threads(1):
        data = part(config["dataset"])()
        model = new_model(config, data)
        model.load_state_dict(state["training"]["model"])
        batches = _batches(data, images, config["dataset"].get("seed", 0))
        return {
            "images": sum(len(labels) for _, labels in batches),
            **asdict(sharpness.measure(model, batches, rho)),
            "seconds": time.perf_counter() - began,
            **provenance(torch.device("cpu")),
        }


def _batches(data: ImageData, images: int, seed: int) -> sharpness.Batches:
    if not isinstance(data.train_images, torch.Tensor):
        raise ValueError("the images must be in memory: dataset.in_memory=true")
    chosen = torch.arange(len(data.train_labels))
    if images < len(chosen):
        chosen, _ = stratified(data.train_labels, images, seed, SHARPNESS_SPLIT)
    # As test images, which are normalized and not augmented.
    subset = replace(data, test_images=data.train_images[chosen], test_labels=data.train_labels[chosen])
    return list(evaluation_batches(subset, BATCH_SIZE))
