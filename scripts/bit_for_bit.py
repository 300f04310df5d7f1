"""Prove that a change leaves results as they were: python scripts/bit_for_bit.py COMMIT [COMMIT]

Does the same short runs with the code of two commits, and compares their final weights and metrics bit for
bit. Takes minutes; exits with 1 where any differ.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# Of 8×8 digits, resnet8, two epochs of 20 steps.
DIGITS = "protocol=quick epochs=2 model.width=8 evaluate_every=1"
MIXUP, CUTOUT = "augment=mixup augment.flip=false", "augment=cutout augment.cutout=3"
ON_DIGITS = {
    "sgd": "method=sgd",
    "sam-mixup": f"method=sam {MIXUP}",
    "sam-bf16": "method=sam precision=bf16 channels_last=false",
    "asam-cutout": f"method=asam {CUTOUT} clip_norm=null l2=0",
    "gnp-bf16-normalized-mixup": f"method=gnp method.mix=normalized precision=bf16 {MIXUP}",
    "rst-linear-cutout-bf16": f"method=rst schedule=linear precision=bf16 {CUTOUT}",
    "rst-piecewise-step": "method=rst schedule=piecewise lr_schedule=step grad_accumulation=2",
    "grst-adamw-warmup": "method=grst optimizer=adamw l2=0 warmup_epochs=1 schedule=trigonometric",
    "grst-fp16-mixup-cutout": "method=grst precision=fp16 augment=mixup_cutout augment.cutout=3",
    "rst-interrupted": "method=rst epochs=4 checkpoint.every_steps=10",
    "grst-two-ranks": "method=grst method.gamma=2",
    "rst-two-ranks-synchronised": "method=rst method.sync_perturbation=true schedule=periodic",
}
# Of 32×32 images in files.
FILES = "dataset=image_folder batch_size=16 epochs=2 threads=1"
STREAMED = f"{FILES} dataset.in_memory=false dataset.workers=2 model=resnet8"
ON_FILES = {
    "streamed-crops": f"{STREAMED} augment=inception method=rst",
    "streamed-autoaugment": f"{STREAMED} augment=autoaugment method=sam",
    "shakedrop": f"{FILES} epochs=1 model=pyramidnet164_48_shakedrop dataset.train_size=32 method=grst",
    "vit-dropout": f"{FILES} epochs=1 model=vit_tiny method=sam",
}


def fingerprint(code: Path, name: str, arguments: str, outputs: Path) -> str:
    """The SHA-256 of the run's final weights and metrics, times apart."""
    folder = outputs / name
    launcher = TORCHRUN if "ranks" in name else []
    command = [sys.executable, *launcher, "train.py", *arguments.split(), f"outputs={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options: dict = {"cwd": code, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    if name.endswith("interrupted"):
        with subprocess.Popen(command, **options) as process:
            while process.poll() is None and not list(folder.glob("*/checkpoint.pt")):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            process.communicate()
        if process.returncode != 128 + signal.SIGTERM:
            raise ChildProcessError(f"{name}: not interrupted, it ended with {process.returncode}")
    done = subprocess.run(command, **options)
    if done.returncode:
        raise ChildProcessError(f"{name}: {done.stdout.decode()[-2000:]}")
    (result,) = folder.glob("*/result.json")
    digest = hashlib.sha256()
    state = torch.load(result.with_name("checkpoint.pt"), map_location="cpu", weights_only=True)
    for key, value in sorted(state["training"]["model"].items()):
        digest.update(key.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for line in result.with_name("metrics.jsonl").read_text().splitlines():
        metrics = {key: value for key, value in json.loads(line).items() if "seconds" not in key}
        digest.update(json.dumps(metrics, sort_keys=True).encode())
    return digest.hexdigest()


def draw_images(folder: Path) -> None:
    """32×32 noise of two classes: 40 images to train on, 10 to evaluate on, of each."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("test", 10)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i:02}.png")


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", folder, commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("before", metavar="COMMIT")
    parser.add_argument("after", metavar="COMMIT", nargs="?", default="HEAD", help="HEAD when not given")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        checked_out(arguments.before, Path(temporary, "before")) as before,
        checked_out(arguments.after, Path(temporary, "after")) as after,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        images = Path(temporary, "images")
        draw_images(images)
        runs = {name: f"{DIGITS} {given}" for name, given in ON_DIGITS.items()}
        runs |= {name: f"{given} dataset.root={images}" for name, given in ON_FILES.items()}
        pending = {
            (name, code): pool.submit(fingerprint, code, name, given, code / "outputs")
            for name, given in runs.items()
            for code in (before, after)
        }
        different = 0
        try:
            for name in runs:
                was, is_now = (pending[name, code].result() for code in (before, after))
                different += was != is_now
                print(f"{name}: {'the same' if was == is_now else 'DIFFERENT'} ({is_now[:16]})", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    print(f"{len(runs)} runs, {different} different")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
