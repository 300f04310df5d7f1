"""Does speed cost accuracy? SGD by the plain recipe against `python train.py`, on protocol=cpu (make
benchmark-accuracy). The plain recipe is that of the benchmark: NCHW, fp32, PIL DataLoader, weight decay,
no clipping.

Writes results/benchmark/accuracy.md and .csv: test accuracy after the last epoch of each seed.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from benchmark_peers import UsualImages, usual_batches
from hydra import initialize_config_dir
from hydra.utils import instantiate
from joblib import Parallel, cpu_count, delayed
from scipy import stats

from rst.data import Augment, steps_per_epoch
from rst.draws import draw
from rst.experiments.command_line import launch
from rst.experiments.sweeps import cells_of
from rst.files import write_text
from rst.reporting.pages import pipes
from rst.training.device import cpu_threads
from rst.training.fit import new_model
from rst.training.lr_schedule import cosine
from rst.training.provenance import provenance
from rst.training.run import Run

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
PRECISIONS = ("fp32", "bf16")


def plain(config: dict[str, Any]) -> float:
    """Test accuracy of the plain recipe in the run's setting."""
    with cpu_threads(1):
        data = instantiate(config["dataset"], _convert_="all")
        model = new_model({**config, "channels_last": False}, data)
        optimizer = instantiate(config["optimizer"])(model.parameters(), weight_decay=config["l2"])
        augment = instantiate(config["augment"])
        images = UsualImages(data.train_images, data.train_labels, augment)
        torch.manual_seed(draw(config["seed"], "model"))
        batches = usual_batches(images, config["batch_size"])
        total = config["epochs"] * steps_per_epoch(data, config["batch_size"])
        for step in range(total):
            for group in optimizer.param_groups:
                group["lr"] = config["optimizer"]["lr"] * cosine(step / total)
            x, y = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        test = UsualImages(data.test_images, data.test_labels, Augment())
        correct = 0
        with torch.no_grad():
            for x, y in torch.utils.data.DataLoader(test, 500):
                correct += (model(x).argmax(1) == y).sum().item()
        return correct / len(test)


def ours(run: Run, overrides: list[str]) -> float:
    """Test accuracy of `python train.py`, which is not run again where it has a result."""
    if run.result(warn=False) is None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "train.py", *overrides], cwd=ROOT, env=environment, check=True)
    result = run.result()
    assert result is not None
    return result["test_accuracy"]


def to_markdown(accuracies: pd.DataFrame, setting: str, made_with: dict[str, Any]) -> str:
    """Means, and each of ours less the plain recipe's with Welch's 95 % interval: seeds are not paired, as
    the recipes draw otherwise."""
    base = accuracies.loc[accuracies["recipe"] == "plain", "test_accuracy"] * 100
    lines = []
    for recipe, group in accuracies.groupby("recipe", sort=False):
        own = group["test_accuracy"] * 100
        line = {
            "Recipe": str(recipe),
            "Test accuracy (%)": f"{own.mean():.2f} ± {own.std():.2f} (n = {len(own)})",
        }
        if recipe == "plain":
            line["Less the plain recipe's (points)"] = "–"
        else:
            low, high = stats.ttest_ind(own, base, equal_var=False).confidence_interval(0.95)
            gap = f"{own.mean() - base.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
            line["Less the plain recipe's (points)"] = gap.replace("-", "−")
        lines.append(line)
    dirty = ", uncommitted changes" * bool(made_with["dirty"])
    return "\n\n".join(
        [
            "# Accuracy of the fast path",
            f"SGD on {setting}: mean ± sample standard deviation after the last epoch, and the difference "
            "with Welch's 95 % interval.",
            pipes(lines),
            f"`make benchmark-accuracy` on {made_with['device_name']}, PyTorch "
            f"{made_with['versions']['torch']}, commit {made_with['commit']}{dirty}.",
        ]
    ) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("overrides", nargs="*", help="added to every run, such as epochs=1")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    made_with = provenance(torch.device("cpu"))
    cells = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for precision in PRECISIONS:
            common = ["protocol=cpu", "method=sgd", f"precision={precision}", *arguments.overrides]
            cells[precision] = cells_of([*common, f"seed={arguments.seeds}"], CONF)
    tasks, labels = [], []
    for cell in cells["fp32"]:
        tasks.append(delayed(plain)(cell.run.config))
        labels.append(("plain", cell.seed))
    for precision, found in cells.items():
        for cell in found:
            tasks.append(delayed(ours)(cell.run, cell.overrides))
            labels.append((f"train.py, {precision}", cell.seed))
    accuracies = pd.DataFrame(labels, columns=["recipe", "seed"])
    accuracies["test_accuracy"] = Parallel(n_jobs=cpu_count())(tasks)

    config = cells["fp32"][0].run.config
    setting = (
        f"{config['dataset']['train_size']} CIFAR-10 images (JPEG), {cells['fp32'][0].run.choices['model']}, "
        f"{config['epochs']} epochs, batch size {config['batch_size']}"
    )
    folder = arguments.results / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    text = to_markdown(accuracies, setting, made_with)
    for suffix, content in ((".md", text), (".csv", accuracies.to_csv(index=False, lineterminator="\n"))):
        write_text(folder / f"accuracy{suffix}", content)
    print(text)


if __name__ == "__main__":
    launch(main)
