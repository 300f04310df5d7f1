"""The benchmark's sections on the suite: data, training end to end, sweeps, start, planning and tables."""

import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from benchmark_peers import UsualImages, usual_batches
from benchmark_update import HALF, L2, network, random_data, sgd, training
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from joblib import cpu_count

import rst.experiments.command_line  # noqa: F401  registers the resolver that conf/train.yaml uses
from rst import Constant
from rst.benchmark import Action, Figure, Round, Settings, figure, interleaved, per_step, ratio_of, slope
from rst.data import Augment, train_batches
from rst.experiments.cost import Measurements, costs_of
from rst.experiments.sweeps import cells_of
from rst.reporting.statistics import build_table, read_runs, runs_frame, write_runs
from rst.reporting.tables import Row
from rst.training.device import cpu_threads, keep_memory

ROOT = Path(__file__).resolve().parent.parent
CONF, RUNS = ROOT / "conf", ROOT / "results" / "quick" / "runs.csv"


@cache
def augmentations() -> dict[str, Augment]:
    """The options of conf/augment, but for what only images streamed from files can take."""
    names = sorted(path.stem for path in (CONF / "augment").glob("*.yaml"))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = {name: instantiate(compose("train", [f"augment={name}"]).augment) for name in names}
    return {name: augment for name, augment in found.items() if not augment.random_resized_crop}


def data(settings: Settings) -> Iterator[Figure]:
    """Images a second on one core: our batches against torchvision's transforms of PIL images in a DataLoader
    without workers. A round of ours is a whole epoch with the draws that it begins with."""
    batch_size = 128
    n, n_usual = (256, 128) if settings.quick else (12_800, 640)
    images, found = random_data(n), augmentations()

    def epoch(augment: Augment) -> None:
        for _ in train_batches(images, batch_size, augment, seed=0, epoch=0):
            pass

    actions: dict[str, Action] = {}
    for name, augment in found.items():
        usual = UsualImages(images.train_images, images.train_labels, augment)
        batches = usual_batches(usual, batch_size, augment.mixup)
        actions[name] = partial(epoch, augment)
        actions[f"{name}, PIL"] = per_step(partial(next, batches), n_usual // batch_size)
    with cpu_threads(1):
        measured = interleaved(actions, settings.rounds)
    for name in found:
        target = "≥ 5" if name == "cutout" else ""

        def ratio(one: Round, name: str = name) -> float:
            return (one[f"{name}, PIL"] / batch_size) / (one[name] / n)

        yield figure("data", f"{name} / PIL", "32×32", measured, ratio, target)


def end_to_end(settings: Settings) -> Iterator[Figure]:
    """Images a second of SGD with basic augmentation: as `python train.py` trains, in channels_last, with L2
    and clipping, against the plain recipe: NCHW, fp32, PIL DataLoader, weight decay, `loss.item()`. And the
    share of our time that passes in waiting for data. Each in a process of its own, one at work at a time; a
    worker of the loader has a core more than ours. What torch.compile takes at first is not counted."""
    name, batch_size, n_steps = ("resnet8", 16, 2) if settings.quick else ("resnet20", 128, 4)
    case = name, batch_size, n_steps
    rounds = settings.rounds + 2  # each server's own first one, and one that is not counted
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "fp32": partial(_ours, *case, "fp32", False),
        "bf16": partial(_ours, *case, "bf16", False),
    }
    if not settings.quick:  # a minute each
        makers["fp32, compile=true"] = partial(_ours, *case, "fp32", True)
        makers["bf16, compile=true"] = partial(_ours, *case, "bf16", True)
    ours = list(makers)
    makers["plain recipe"] = partial(_plain, *case, rounds, 0)
    if cpu_count() > 1:
        makers["plain recipe, 1 worker"] = partial(_plain, *case, rounds, 1)
    waiting: dict[str, list[Round]] = {what: [] for what in ours}

    def act(what: str, server: Connection) -> float:
        server.send(True)
        seconds, share = server.recv()
        if what in waiting:
            waiting[what].append({"share": share})
        return seconds

    with ExitStack() as stack:
        servers = {what: stack.enter_context(_server(make, 1)) for what, make in makers.items()}
        for server in servers.values():
            server.recv()  # it is ready
        actions = {what: partial(act, what, server) for what, server in servers.items()}
        measured = interleaved(actions, settings.rounds)
    model = f"{name}, batch {batch_size}"
    for what in ours:
        target = "≥ 1.5" if what.startswith("fp32") else "≥ 2.3"
        for peer in list(actions)[len(ours) :]:
            yield figure(
                "end_to_end", f"ours, {what} / {peer}", model, measured, ratio_of(peer, what), target
            )
    for what, shares in waiting.items():
        share = f"share of waiting for data, {what}"
        yield figure("end_to_end", share, model, shares[1:], lambda one: one["share"], "< 0.03")


def _ours(
    name: str, batch_size: int, n_steps: int, precision: str, compiled: bool
) -> Callable[[], tuple[float, float]]:
    """Takes an epoch of `n_steps`: seconds a step, and the share of them that passed in waiting for data."""
    keep_memory()
    model = network(name)
    if compiled:
        model.compile()
    images = random_data(batch_size * n_steps)
    basic, options = augmentations()["basic"], {"epochs": 10**6, "precision": precision}
    run = training(model, images, batch_size, Constant(0.0), basic, **options).run()
    take_steps = per_step(partial(next, run), n_steps)

    def epoch() -> tuple[float, float]:
        seconds = take_steps()
        metrics = next(metrics for metrics in run if metrics is not None)  # after the evaluation
        assert seconds is not None
        return seconds, metrics["seconds_data"] / (metrics["seconds_data"] + metrics["seconds_train"])

    return epoch


def _plain(
    name: str, batch_size: int, n_steps: int, rounds: int, workers: int
) -> Callable[[], tuple[float, float]]:
    model = network(name)
    base = sgd(model.parameters(), weight_decay=L2)
    images = random_data(batch_size * n_steps * rounds)  # no epoch ends in between
    usual = UsualImages(images.train_images, images.train_labels, augmentations()["basic"])
    batches = usual_batches(usual, batch_size, workers=workers)
    losses = []

    def step() -> None:
        x, y = next(batches)
        base.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        base.step()
        losses.append(loss.item())

    take_steps = per_step(step, n_steps)
    return lambda: (take_steps() or 0.0, math.nan)


def sweep(settings: Settings) -> Iterator[Figure]:
    """Steps a second of k processes with a thread each against one process with k threads, k being the
    number of cores. What else runs on the machine counts here: threads wait for each other at every
    operation, processes do not."""
    k = 1 if settings.quick else cpu_count()
    cases = {"resnet8": "resnet8, 8×8, batch 64", "resnet20": "resnet20, batch 128"}
    for case in ("resnet8",) if settings.quick else cases:
        with ExitStack() as stack:
            threads = [*[1] * k, k]
            servers = [stack.enter_context(_server(partial(_steps_of, case), n)) for n in threads]
            for server in servers:
                server.recv()  # it is ready
            actions = {
                "single": partial(_act_at_once, servers[:k]),
                "joint": partial(_act_at_once, servers[k:]),
            }
            measured = interleaved(actions, settings.rounds)

        def ratio(one: Round) -> float:
            return k * one["joint"] / one["single"]

        yield figure("sweep", f"{k} processes / {k} threads", cases[case], measured, ratio, "≥ 1.3")


def _act_at_once(servers: Sequence[Connection]) -> None:
    for server in servers:
        server.send(True)
    for server in servers:
        server.recv()


def _steps_of(case: str) -> Action:
    side, batch_size, n_steps = (8, 64, 10) if case == "resnet8" else (32, 128, 2)
    images = random_data(4 * batch_size, side)
    run = training(network(case), images, batch_size, HALF, Augment(crop_padding=1), epochs=10**6).run()
    return per_step(partial(next, run), n_steps)


@contextmanager
def _server(make: Callable[[], Callable[[], Any]], threads: int) -> Iterator[Connection]:
    """A process that makes an action, acts once and says that it is ready; then it acts each time that it is
    sent True, and sends back what the action returned. It ends in order, and with it its loader's workers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["rst.training.loop", "rst.models", "rst.reporting.tables", "pytorch_optimizer"]
    )
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make, threads))  # no daemon: it may have a worker
    process.start()
    theirs.close()  # or its end would not be noticed here
    try:
        yield ours
    finally:
        with suppress(BrokenPipeError):  # it has ended already
            ours.send(False)
        process.join()


def _serve(connection: Connection, make: Callable[[], Callable[[], Any]], threads: int) -> None:
    torch.set_num_threads(threads)
    action = make()
    action()
    connection.send("ready")
    while connection.recv():
        connection.send(action())


def start(settings: Settings) -> Iterator[Figure]:
    """What is paid before and after training: by one command, and in the quick table's recorded sweep."""
    runs, seeds = read_runs(RUNS), count()
    records: Any = runs.to_dict("records")
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(RUNS.parent, Path(folder) / "results" / "quick")
        write_runs(runs_frame(records), copy / "runs.csv")  # with columns added since

        def python(*arguments: str) -> None:
            environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
            command = [sys.executable, *arguments]
            subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)

        def one_step() -> None:
            size = ["protocol=quick", "epochs=1", "dataset.train_size=64"]
            python("train.py", *size, f"outputs={folder}/outputs", f"seed={next(seeds)}")

        collect = ["--reuse", "--collect", f"--outputs={folder}/outputs", f"--results={folder}/results"]
        actions: dict[str, Action] = {
            "import torch": partial(python, "-c", "import torch"),
            "train.py --help": partial(python, "train.py", "--help"),
        }
        if not settings.quick:
            actions["a run of one step"] = one_step
            actions["a driver with nothing to run"] = partial(python, "scripts/reproduce.py", *collect)
        rounds, warmup = (1, 0) if settings.quick else (max(2, settings.rounds // 3), 1)
        measured = interleaved(actions, rounds, warmup)
    of = partial(figure, "start", rounds=measured)
    for what in list(actions)[1:]:
        target = "≤ 2" if what == "train.py --help" else ""
        yield of(f"seconds of {what}", "resnet8, digits", ratio=seconds_of(what), target=target)
        yield of(f"{what} / import torch", "resnet8, digits", ratio=ratio_of(what, "import torch"))
    window, processes = spent(runs)
    for part, target in (("train", "≥ 0.85"), ("evaluate", ""), ("data", "")):
        seconds = runs[f"seconds.{part}"].sum()

        def share(one: Round, seconds: float = seconds) -> float:
            # Before the first run a process starts; the driver's own work is as that on a complete table.
            around = sum(one.get(what, 0.0) for what in list(actions)[2:])
            return seconds / (processes * (window + around))

        name = {"train": "training", "evaluate": "evaluating", "data": "waiting for data"}[part]
        yield of(
            f"share of wall time in {name}", f"quick table, {len(runs)} runs", ratio=share, target=target
        )


def seconds_of(what: str) -> Callable[[Round], float]:
    return lambda one: one[what]


def spent(runs: pd.DataFrame) -> tuple[float, int]:
    """Seconds from the first run's beginning to the last one's end, and how many ran at once."""
    finished = pd.to_datetime(runs["finished"])
    ends = (finished - finished.min()).dt.total_seconds()
    begins = ends - runs["seconds.total"]
    at_once = [((begins < moment) & (moment < ends)).sum() for moment in (begins + ends) / 2]
    return float(ends.max() - begins.min()), int(np.median(at_once))


def planning(settings: Settings) -> Iterator[Figure]:
    """Exponents of the time to list and cost a plan's runs, and to make a table of finished ones: with more
    seeds in each of 10 rows, and with more rows of 10 seeds."""
    cells = (10, 100) if settings.quick else (100, 1000, 10_000, 100_000)
    finished = (100, 200) if settings.quick else (100, 1000, 10_000)
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(CONF), version_base="1.3"):
        known = Measurements(Path(folder) / "measurements.json")

        def plan(n: int) -> None:
            found = cells_of(["protocol=quick", f"seed=range(0,{n})"], CONF)
            costs_of((cell.run for cell in found), known)

        plan(1)  # composes and measures the model, which is done once
        sizes: dict[str, tuple[tuple[int, ...], Callable[[int], None]]] = {
            "plan": (cells, plan),
            "tables, more seeds": (finished, lambda n: table(rows=10, seeds=n // 10)),
            "tables, more rows": (finished, lambda n: table(rows=n // 10, seeds=10)),
        }
        actions = {f"{what} {n}": partial(work, n) for what, (ns, work) in sizes.items() for n in ns}
        measured = interleaved(actions, max(2, settings.rounds // 6), warmup=0)
    for what, (ns, _) in sizes.items():
        for part in (ns, ns[-2:]) if len(ns) > 2 else (ns,):

            def exponent(one: Round, what: str = what, part: Sequence[int] = part) -> float:
                return slope(part, [one[f"{what} {n}"] for n in part])

            model = f"{part[0]} to {part[-1]} runs"
            yield figure("planning", f"exponent of {what}", model, measured, exponent, "≤ 1.1")


def table(rows: int, seeds: int) -> None:
    """Copies of a recorded run, collected and made a table of."""
    record: Any = read_runs(RUNS).iloc[0].to_dict()
    labels = ["SGD", "SAM", *(f"RST {i}" for i in range(rows - 2))]
    records = [record | {"id": f"{row}-{seed}", "seed": seed} for row in range(rows) for seed in range(seeds)]
    asked = [
        Row(label, "python train.py", {seed: f"{row}-{seed}" for seed in range(seeds)})
        for row, label in enumerate(labels)
    ]
    build_table("title", "setting", asked, runs_frame(records))
