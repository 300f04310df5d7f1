"""One run, from its settings to its result."""

import logging
import sys
from contextlib import closing, nullcontext
from typing import Any

import torch

from rst.data import ImageData, steps_per_epoch
from rst.training import checkpoint, distributed
from rst.training.device import allow_tf32, cpu_threads, keep_memory, lease
from rst.training.interruption import Interruption
from rst.training.loop import Training
from rst.training.lr_schedule import with_warmup
from rst.training.parts import checkpoint_bytes, new_model, new_optimizer, part
from rst.training.progress import Progress
from rst.training.provenance import combined, provenance
from rst.training.run import Run
from rst.training.tracking import NoTracker, Tracker

log = logging.getLogger("train")


def train(run: Run, in_sweep: bool = False) -> dict[str, Any]:
    """Do what is left of a run, on a device of its own, and return its result.

    Args:
        in_sweep: wait for a GPU that no other run is using, and show no progress.
    """
    settings = run.settings
    if in_sweep and distributed.is_launched():
        raise ValueError("torchrun is for one run on several devices: leave -m out, or leave torchrun out")
    with (
        cpu_threads(settings.threads),
        lease(settings.device, wait=in_sweep) as device,
        distributed.process_group(device),
    ):
        keep_memory()
        allow_tf32(settings.precision == "tf32")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # runs of a sweep share a process
        made_with = provenance(device)
        tracker = tracker_of(run)
        training = prepare(run, part(settings.dataset)().to(device))
        with run.lock() if distributed.is_first() else nullcontext():
            distributed.barrier()
            # Another process may have completed it while this one was waiting for its device.
            return run.result(warn=False) or fit(run, training, tracker, made_with, in_sweep)


def prepare(run: Run, data: ImageData) -> Training:
    """The run's model, optimizer and data, before the first step. Writes nothing.

    Raises:
        ValueError: settings that do not fit the data.
        OSError: the checkpoints would not fit on the disk.
    """
    settings, device = run.settings, data.train_labels.device
    epoch_steps = steps_per_epoch(data, settings.batch_size)
    model = new_model(run.config, data).to(device)
    if settings.compile:
        model.compile()  # in place, so that names in checkpoints stay as they are
    n_bytes = checkpoint_bytes(sum(p.numel() for p in model.parameters()), run.config)
    checkpoint.require_space(run.folder, 3 * n_bytes)  # two, and one being written
    model = distributed.replicate(model, device)
    base = part(settings.optimizer)(model.parameters())
    optimizer = new_optimizer(run.config, base, epoch_steps, model)
    return Training(
        model,
        optimizer,
        with_warmup(part(settings.lr_schedule), settings.warmup_epochs / settings.epochs),
        data,
        part(settings.augment)(),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        l2=settings.l2,
        clip_norm=settings.clip_norm,
        precision=settings.precision,
        grad_accumulation=settings.grad_accumulation,
        evaluate_every=settings.evaluate_every,
    )


def tracker_of(run: Run) -> Tracker:
    build = part(run.settings.tracker) if distributed.is_first() else NoTracker
    return build(
        run_name=run.name,
        group="-".join(run.labels),
        job_type=run.choices["method"],
        tags=run.labels,
        folder=run.folder,
        config={**run.config, "choices": run.choices},
    )


def fit(
    run: Run, training: Training, tracker: Tracker, made_with: dict[str, Any], in_sweep: bool
) -> dict[str, Any]:
    """Train what is left of a run whose folder is locked, record each epoch, and return the result."""
    optimizer, is_first = training.optimizer, distributed.is_first()
    shown = is_first and not in_sweep
    parts = [made_with]
    state = checkpoint.load(run.checkpoint, run.id)
    if state is not None:
        training.load_state_dict(state["training"])
        parts = [*state["made"], made_with]
        before, now = (made["ranks"] for made in parts[-2:])
        if before != now and is_first:
            log.warning("begun with ranks=%s, goes on with %s: SAM depends on their number", before, now)
    distributed.require_equal(optimizer.steps, "the ranks must share the outputs folder; they begin at steps")
    every = checkpoint.Every(**run.settings.checkpoint)
    if is_first:
        run.open(training.metrics)
    if shown:
        done = f", the first {optimizer.steps} done before" if optimizer.steps else ""
        log.info("%s: %d steps on %s%s", run.folder, optimizer.total_steps, made_with["device_name"], done)

    with (
        Progress(training, run.split, shown) as progress,
        tracker,
        Interruption() as interruption,
        closing(training.run(interruption.requested)) as points,  # ends data workers after an error, too
    ):
        for metrics in points:  # None after a step
            # Read before a checkpoint, which waits for a GPU and may learn more than the other ranks know.
            stopping = training.guard.stopping
            epochs = None if metrics is None else metrics["epoch"]
            if metrics is not None and is_first:
                run.append(metrics)
                tracker.log(metrics)
            is_due = every.is_due(optimizer.steps, epochs) or epochs == training.epochs or stopping
            if is_due and is_first:
                content = {"training": training.state_dict(), "made": parts}
                checkpoint.save(run.checkpoint, content, run.id)
            progress.update(metrics)
            if stopping:
                distributed.barrier()
                interruption.end()
                training.guard.stopping = False
        on_cuda = training.device.type == "cuda"
        measured = {
            **summarize(training.metrics),
            "expected_propagations": optimizer.expected_propagations,
            "propagations_std": optimizer.propagations_std,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(training.device) if on_cuda else None,
            **combined(parts),
        }
        result = run.complete(measured) if is_first else measured
        tracker.summary(result)
    if in_sweep and interruption.signal:  # since the last step: the sweep's next run must not begin
        sys.exit(128 + interruption.signal)
    return result


def summarize(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's result from the metrics of its epochs: those of the last one, the best test accuracy, and times
    in seconds."""
    last = metrics[-1]
    evaluated = [row for row in metrics if "test_accuracy" in row]
    best = max(evaluated, key=lambda row: row["test_accuracy"])  # the earliest of equals
    kept = (
        "steps",
        "sam_steps",
        "propagations",
        "skipped_steps",
        "test_accuracy",
        "test_loss",
        "train_accuracy",
        "train_loss",
    )
    seconds = {
        part: sum(row.get(f"seconds_{part}", 0.0) for row in metrics)
        for part in ("train", "evaluate", "data")
    }
    seconds["total"] = sum(seconds.values())
    return {
        "epochs": last["epoch"],
        **{key: last[key] for key in kept},
        "calibrated_test_loss": last.get("calibrated_test_loss"),  # not of a single image
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "seconds": seconds,
        "images_per_second": sum(row["images"] for row in metrics) / (seconds["train"] + seconds["data"]),
    }
