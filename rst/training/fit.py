"""One run, from its configuration to its result."""

import logging
from collections.abc import Mapping
from contextlib import closing, nullcontext
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from rst import expected_propagations, propagations_std
from rst.data import ImageData, steps_per_epoch
from rst.draws import draw
from rst.interruption import Interruption
from rst.schedule import Schedule, Warmup
from rst.training import checkpoint, distributed
from rst.training.device import allow_tf32, keep_memory
from rst.training.loop import Training
from rst.training.lr_schedule import with_warmup
from rst.training.progress import Progress
from rst.training.run import Run, combined, peak_memory_bytes, provenance, reset_peak_memory, summarize
from rst.training.tracking import NoTracker, Tracker

log = logging.getLogger("train")
OF_TRAINING = (
    "epochs",
    "batch_size",
    "seed",
    "l2",
    "clip_norm",
    "precision",
    "grad_accumulation",
    "evaluate_every",
)


def train(run: Run, device: torch.device, verbose: bool) -> dict[str, Any]:
    """One run, new or resumed, from its configuration to its result."""
    config = run.config

    def build(group: str) -> Any:
        return instantiate(config[group], _convert_="all")

    keep_memory()
    allow_tf32(config["precision"] == "tf32")
    made_with = provenance(device)
    reset_peak_memory(device)
    data = build("dataset").to(device)
    epoch_steps = steps_per_epoch(data, config["batch_size"])
    total_steps = config["epochs"] * epoch_steps
    schedule = schedule_of(config, epoch_steps)
    lr_factor = with_warmup(build("lr_schedule"), config["warmup_epochs"] / config["epochs"])

    model = new_model(config, data).to(device)
    if config["compile"]:
        model.compile()  # in place, so that names in checkpoints stay as they are
    n_bytes = checkpoint_bytes(sum(p.numel() for p in model.parameters()), config)
    checkpoint.require_space(run.folder, 3 * n_bytes)  # two, and one being written
    model = distributed.replicate(model, device)
    base = build("optimizer")(model.parameters())
    optimizer = build("method")(base, schedule, total_steps, module=model, seed=config["seed"])
    settings = {key: config[key] for key in OF_TRAINING}
    training = Training(model, optimizer, lr_factor, data, build("augment"), **settings)
    tracker = (build("tracker") if distributed.is_first() else NoTracker)(
        run_name=run.name,
        group="-".join(run.labels),
        job_type=run.choices["method"],
        tags=run.labels,
        folder=run.folder,
        config={**config, "choices": run.choices},
    )
    with run.lock() if distributed.is_first() else nullcontext():
        distributed.barrier()
        # Another process may have completed it while this one was waiting for its device.
        return run.result(warn=False) or fit(run, training, tracker, made_with, verbose)


def new_model(config: dict[str, Any], data: ImageData) -> nn.Module:
    """As it is before the first step, on the CPU."""
    torch.manual_seed(draw(config["seed"], "init"))
    _, channels, height, width = data.train_images.shape
    build = instantiate(config["model"], _convert_="all")
    model = build(num_classes=len(data.classes), in_chans=channels, image_size=(height, width))
    return model.to(memory_format=torch.channels_last if config["channels_last"] else torch.preserve_format)


def schedule_of(config: Mapping[str, Any], epoch_steps: int) -> Schedule:
    """A run's schedule, with its warmup."""
    schedule = instantiate(config["schedule"])
    warmup = config["warmup_epochs"]
    return Warmup(schedule, warmup * epoch_steps) if warmup else schedule


def checkpoint_bytes(parameters: int, config: Mapping[str, Any]) -> int:
    """Of float32 weights and the optimizer's one or two buffers of their size."""
    buffers = 2 if "Adam" in config["optimizer"]["_target_"] else 1
    return 4 * parameters * (1 + buffers)


def fit(
    run: Run, training: Training, tracker: Tracker, made_with: dict[str, Any], verbose: bool
) -> dict[str, Any]:
    """Train what is left of a run whose folder is locked, and write down each epoch and the result."""
    optimizer, is_first = training.optimizer, distributed.is_first()
    made = [made_with]
    state = checkpoint.load(run.checkpoint, run.id)
    if state is not None:
        training.load_state_dict(state["training"])
        made = [*state["made"], *made]
    distributed.require_equal(optimizer.steps, "the ranks must share the outputs folder; they begin at steps")
    every = checkpoint.Every(**run.config["checkpoint"])
    if is_first:
        run.open(training.metrics)
    if verbose:
        done = f", the first {optimizer.steps} done before" if optimizer.steps else ""
        log.info("%s: %d steps on %s%s", run.folder, optimizer.total_steps, made_with["device_name"], done)

    with (
        Progress(training, verbose) as progress,
        tracker,
        Interruption() as interruption,
        closing(training.run(interruption.requested)) as points,  # at an error, too, data workers are to end
    ):
        for metrics in points:  # None after a step
            # Before a checkpoint, which waits for a GPU, and may learn more than the other ranks know.
            stopping = training.guard.stopping
            epochs = None if metrics is None else metrics["epoch"]
            if metrics is not None and is_first:
                run.append(metrics)
                tracker.log(metrics)
            is_due = every.is_due(optimizer.steps, epochs) or epochs == training.epochs or stopping
            if is_due and is_first:
                content = {"training": training.state_dict(), "made": made}
                checkpoint.save(run.checkpoint, content, run.id)
            progress.update(metrics)
            if stopping:
                distributed.barrier()
                interruption.end()
                training.guard.stopping = False
        figures = {
            **summarize(training.metrics),
            "expected_propagations": expected_propagations(optimizer.schedule, optimizer.total_steps),
            "propagations_std": propagations_std(optimizer.schedule, optimizer.total_steps),
            "peak_memory_bytes": peak_memory_bytes(training.device),
            **combined(made),
        }
        result = run.complete(figures) if is_first else figures
        tracker.summary(result)
    return result
