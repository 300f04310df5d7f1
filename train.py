"""Train one model: `python train.py method=rst schedule=linear model=wrn28_10`, or a sweep with `-m`."""

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from rst import checkpoint, expected_propagations, propagations_std
from rst.command_line import describe, launch, task
from rst.cost import schedule_of
from rst.data import steps_per_epoch
from rst.device import cpu_threads, lease
from rst.draws import draw
from rst.engine import Training
from rst.listing import listing
from rst.lr_schedule import with_warmup
from rst.record import Run, peak_memory_bytes, provenance, reset_peak_memory, summarize
from rst.tracking import Tracker

log = logging.getLogger("train")
ROOT = Path(__file__).resolve().parent


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="train")
@task
def main(cfg: DictConfig) -> None:
    hydra_cfg = HydraConfig.get()
    run = describe(cfg, hydra_cfg)
    result = run.result()
    if result is not None:
        log.info("%s is complete, nothing to run", run.folder)
    else:
        sweep = hydra_cfg.mode is RunMode.MULTIRUN
        with cpu_threads(run.config["threads"]), lease(run.config["device"], wait=sweep) as device:
            result = train(run, device, verbose=not sweep)
    log.info(
        "%s: test accuracy %.2f %%, best %.2f %%, propagation count %.3f, expected %.3f, %.1f s of training",
        run.name,
        100 * result["test_accuracy"],
        100 * result["best_test_accuracy"],
        result["propagations"] / result["steps"],
        result["expected_propagations"] / result["steps"],
        result["seconds"]["train"],
    )


def train(run: Run, device: torch.device, verbose: bool) -> dict[str, Any]:
    """One run, new or resumed, from its configuration to its result."""
    config = run.config

    def build(group: str) -> Any:
        return instantiate(config[group], _convert_="all")

    made_with = provenance(device)
    reset_peak_memory(device)
    data = build("dataset").to(device)
    epoch_steps = steps_per_epoch(data, config["batch_size"])
    total_steps = config["epochs"] * epoch_steps
    schedule = schedule_of(config, epoch_steps)
    lr_factor = with_warmup(build("lr_schedule"), config["warmup_epochs"] / config["epochs"])

    torch.manual_seed(draw(config["seed"], "init"))
    _, channels, height, width = data.train_images.shape
    model = build("model")(num_classes=len(data.classes), in_chans=channels, image_size=(height, width))
    layout = torch.channels_last if config["channels_last"] else torch.preserve_format
    model = model.to(device, memory_format=layout)
    base = build("optimizer")(model.parameters())
    optimizer = build("method")(base, schedule, total_steps, module=model, seed=config["seed"])
    settings = {key: config[key] for key in ("epochs", "batch_size", "seed", "l2", "clip_norm", "precision")}
    training = Training(model, optimizer, lr_factor, data, build("augment"), **settings)
    tracker = build("tracker")(
        run_name=run.name,
        group="-".join(run.labels),
        job_type=run.choices["method"],
        tags=run.labels,
        folder=run.folder,
        config={**config, "choices": run.choices},
    )
    with run.lock():
        # Another process may have completed it while this one was waiting for its device.
        return run.result(warn=False) or fit(run, training, tracker, made_with, verbose)


def fit(
    run: Run, training: Training, tracker: Tracker, made_with: dict[str, Any], verbose: bool
) -> dict[str, Any]:
    """Train what is left of a run whose folder is locked, and write down each epoch and the result."""
    optimizer, device = training.optimizer, training.device
    schedule, total_steps = optimizer.schedule, optimizer.total_steps
    state = checkpoint.load(run.checkpoint)
    commits = [made_with["commit"]]
    if state is not None:
        training.load_state_dict(state["training"])
        commits = list(dict.fromkeys([*state["commits"], *commits]))
    run.open(training.metrics)
    if verbose:
        done = f", the first {optimizer.steps} done before" if optimizer.steps else ""
        log.info("%s: %d steps on %s%s", run.folder, total_steps, made_with["device_name"], done)

    bar = tqdm(
        total=total_steps, initial=optimizer.steps, unit="step", disable=not (verbose and sys.stderr.isatty())
    )
    with bar, tracker:
        for metrics in training.run(on_step=bar.update):
            run.append(metrics)
            checkpoint.save(run.checkpoint, {"training": training.state_dict(), "commits": commits})
            tracker.log(metrics)
            bar.set_postfix_str(f"epoch {metrics['epoch']}, test {metrics['test_accuracy']:.2%}")
            if verbose and bar.disable:
                log.info(
                    "epoch {epoch}: train loss {train_loss:.4f}, test loss {test_loss:.4f}, "
                    "test accuracy {test_accuracy:.4f}, propagations {propagations}".format(**metrics)
                )
        result = run.complete(
            {
                **summarize(training.metrics),
                "expected_propagations": expected_propagations(schedule, total_steps),
                "propagations_std": propagations_std(schedule, total_steps),
                "peak_memory_bytes": peak_memory_bytes(device),
                **made_with,
                "commit": "+".join(filter(None, commits)) or None,
            }
        )
        tracker.summary(result)
    return result


if __name__ == "__main__":
    if "--list" in sys.argv[1:]:
        print(listing(ROOT / "conf"))
        sys.exit()
    import train as importable  # for launchers: other processes can import this module, but not __main__

    launch(importable.main)
