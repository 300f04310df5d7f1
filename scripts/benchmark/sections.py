"""The benchmark's sections. Their docstrings go into the page that it writes."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import nn

from rst import (
    AESAM,
    RST,
    VSAM,
    Constant,
    LookSAM,
    MomentumSAM,
    PartialAscent,
    Periodic,
    StaleAscent,
)
from rst.data import Augment, train_batches
from rst.models import create
from rst.schedule import Schedule
from rst.training.device import allow_tf32, keep_memory
from rst.training.loop import Training

from .measuring import CPU, Action, Ratio, Round, interleaved, peak_bytes, ratio, timed
from .peers import hand_written_sam_step, plain_loader, pytorch_optimizer_step, random_data

RHO, L2 = 0.05, 5e-4
SGD_SETTINGS: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "nesterov": True}
CORES = os.cpu_count() or 1
ENDLESS = 10**9  # steps of a run that is never over
FLIP_AND_CROP = Augment(flip=True, crop_padding=4)


@dataclass(frozen=True)
class Settings:
    """`quick`: tiny sizes, to see that it runs; `before`: an earlier `RST` to time beside today's."""

    rounds: int = 12
    device: torch.device = CPU
    quick: bool = False
    before: type[RST] | None = None


class Method(NamedTuple):
    schedule: Schedule
    gamma: float
    steps: int  # that are timed at once: two where every second one is a SAM step, so that no coin decides


METHODS = {
    "SAM": Method(Constant(1.0), gamma=1.0, steps=1),
    "RST, p = ½": Method(Periodic(2), gamma=1.0, steps=2),
    "G-RST, p = ½": Method(Periodic(2), gamma=2.0, steps=2),
}


class Rival(NamedTuple):
    make: Callable[..., RST]
    steps: int  # as of a method
    beyond: str = ""  # what these steps take beyond SGD's


ALWAYS: dict[str, Any] = {"lambda_1": -1e9, "lambda_2": -1e9}
NEVER: dict[str, Any] = {"lambda_1": 1e9, "lambda_2": 1e9}
RIVALS = {
    "LookSAM, k = 2": Rival(partial(LookSAM, schedule=Periodic(2)), 2, "propagation"),
    "VSAM, k = 2": Rival(partial(VSAM, schedule=Periodic(2)), 2, "propagation"),
    "AE-SAM, all SAM steps": Rival(partial(AESAM, **ALWAYS), 1, "propagation"),
    "AE-SAM, none": Rival(partial(AESAM, **NEVER), 1),
    "partial ascent, f = ¼": Rival(partial(PartialAscent, fraction=0.25), 1, "propagation of ¼"),
    "Momentum-SAM": Rival(MomentumSAM, 1),
    "stale ascent": Rival(StaleAscent, 1),
}
PEERS = ("pytorch_optimizer's SAM", "hand-written SAM")


def network(name: str, device: torch.device = CPU) -> nn.Module:
    torch.manual_seed(0)
    return create(name, num_classes=10, in_chans=3, image_size=(32, 32)).to(device)


def sgd(model: nn.Module, weight_decay: float = 0.0) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), weight_decay=weight_decay, **SGD_SETTINGS)


class Problem:
    """A model with a batch of noise, and the ways to train it: fp32 on the CPU, bf16 autocast on a GPU."""

    def __init__(self, name: str, batch_size: int, device: torch.device = CPU) -> None:
        self.model = network(name, device).to(memory_format=torch.channels_last)
        images = torch.randn(batch_size, 3, 32, 32, device=device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch_size,), device=device)

    def closure(self, n: int | None = None) -> None:
        """With the first `n` images, or all."""
        device = self.images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = F.cross_entropy(self.model(self.images[:n]), self.labels[:n])
        loss.backward()

    def propagate(self, n: int | None = None) -> None:
        self.model.zero_grad()
        self.closure(n)

    def sgd(self, set_to_none: bool = True) -> Action:
        base = sgd(self.model)

        def step() -> None:
            base.zero_grad(set_to_none)
            self.closure()
            base.step()

        return step

    def method(self, method: Method, optimizer: type[RST] = RST) -> Action:
        rst = optimizer(
            sgd(self.model), method.schedule, ENDLESS, rho=RHO, gamma=method.gamma, module=self.model
        )

        def steps() -> None:
            for _ in range(method.steps):
                rst.step(self.closure)

        return steps

    def rival(self, rival: Rival) -> Action:
        optimizer = rival.make(sgd(self.model), total_steps=ENDLESS, rho=RHO, module=self.model)

        def steps() -> None:
            for _ in range(rival.steps):
                optimizer.step(lambda: self.closure(optimizer.images(len(self.images))))

        return steps

    def peer(self, name: str) -> Action:
        if name == "hand-written SAM":
            return partial(hand_written_sam_step, sgd(self.model), self.closure, RHO)
        sam = pytorch_optimizer.SAM(self.model.parameters(), torch.optim.SGD, rho=RHO, **SGD_SETTINGS)
        return partial(pytorch_optimizer_step, sam, self.closure)


def steps(settings: Settings) -> Iterator[Ratio]:
    """Time of a step over its arithmetic limit: that of SGD's step, plus that of a bare forward-backward pair
    for a SAM step (partial ascent: on a quarter of the batch). RST, G-RST, LookSAM and VSAM take a SAM step
    and a plain one in turn."""
    cases = [("resnet20", 128), ("cifar_resnet18", 16)]
    if settings.device.type != "cpu":
        cases = [("cifar_resnet18", 128), ("wrn28_10", 128)]
    repeat = 1 if settings.quick or settings.device.type == "cpu" else 5
    for name, batch_size in [("resnet8", 8)] if settings.quick else cases:
        problem = partial(Problem, name, batch_size, settings.device)
        actions = {"propagation": problem().propagate, "SGD": problem().sgd()}
        for what, method in METHODS.items():
            actions[what] = problem().method(method)
            if settings.before is not None:
                actions[f"{what}, before"] = problem().method(method, settings.before)
        actions["propagation of ¼"] = partial(problem().propagate, batch_size // 4)
        actions |= {what: problem().rival(rival) for what, rival in RIVALS.items()}
        actions |= {peer: problem().peer(peer) for peer in PEERS}
        measures = {what: timed(action, settings.device, repeat) for what, action in actions.items()}
        rounds = interleaved(measures, settings.rounds)
        of = partial(ratio, setting=f"{name}, batch {batch_size}", rounds=rounds)
        target = "≤ 1.03" if settings.device.type == "cpu" else "≤ 1.02"
        for what, method in METHODS.items():
            yield of(f"{what} / its limit", formula=_to_limit(what, method.steps), target=target)
            if settings.before is not None:
                formula = _quotient(what, f"{what}, before")
                yield of(f"{what}, after / before", formula=formula, target="≤ 1.02")
        for what, rival in RIVALS.items():
            formula = _to_limit(what, rival.steps, rival.beyond)
            yield of(f"{what} / its limit", formula=formula, target="≤ 1.02")
        for peer in PEERS:
            yield of(f"{peer} / its limit", formula=_to_limit(peer))
            yield of(f"SAM / {peer}", formula=_quotient("SAM", peer))


def _quotient(a: str, b: str) -> Callable[[Round], float]:
    return lambda seconds: seconds[a] / seconds[b]


def _to_limit(what: str, steps: int = 1, beyond: str = "propagation") -> Callable[[Round], float]:
    """Of `steps` steps, of which one takes more than SGD's, if any."""
    return lambda seconds: seconds[what] / (steps * seconds["SGD"] + (seconds[beyond] if beyond else 0.0))


def memory(settings: Settings) -> Iterator[Ratio]:
    """Peak memory of training beyond that of SGD with momentum, counted in copies of the parameters. G-RST
    holds ∇L(θ) through its second pass, as SGD with `zero_grad(set_to_none=False)` does."""
    cases = [("cifar_resnet18", 16)]
    if settings.device.type != "cpu":
        cases += [("wrn28_10", 16)]
    for name, batch_size in [("resnet8", 2)] if settings.quick else cases:
        yield from _memory_of(name, batch_size, settings.device)


def _memory_of(name: str, batch_size: int, device: torch.device) -> Iterator[Ratio]:
    copy = sum(p.nbytes for p in network(name).parameters())

    def peak(start: Callable[[Problem], Action]) -> int:
        def train() -> None:
            step = start(Problem(name, batch_size, device))
            for _ in range(2):  # the first allocates the momentum
                step()

        return peak_bytes(train, device)

    freeing, keeping = peak(Problem.sgd), peak(partial(Problem.sgd, set_to_none=False))
    rst, grst = (peak(partial(Problem.method, method=METHODS[f"{what}, p = ½"])) for what in ("RST", "G-RST"))
    beyond = {
        "RST, beyond SGD": (rst - freeing, "≤ 1.01"),
        "G-RST, beyond SGD that keeps its gradients": (grst - keeping, "≤ 1.01"),
        "G-RST, beyond SGD": (grst - freeing, ""),
        **{f"{peer}, beyond SGD": (peak(partial(Problem.peer, name=peer)) - freeing, "") for peer in PEERS},
    }
    for what, (n_bytes, target) in beyond.items():
        copies = n_bytes / copy
        yield Ratio(what, f"{name}, batch {batch_size}", copies, copies, copies, 1, target)


def data(settings: Settings) -> Iterator[Ratio]:
    """Images a second: our batches against torchvision's transforms of PIL images in a DataLoader. On the CPU
    both take one core; for a GPU, the DataLoader has a worker on every core."""
    device = settings.device
    batch_size, n = (64, 128) if settings.quick else (128, 1280 if device.type == "cpu" else 20480)
    images = random_data(n)
    there = images.to(device)
    augments = {
        "flip and crop": FLIP_AND_CROP,
        "AutoAugment, flip and crop": Augment(flip=True, crop_padding=4, autoaugment="cifar10"),
    }
    for name, augment in augments.items():
        workers = 0 if device.type == "cpu" else CORES
        loader = plain_loader(images.train_images, images.train_labels, augment, batch_size, workers)
        batches = partial(train_batches, there, batch_size, augment, seed=0, epoch=0)
        measures = {
            "ours": timed(partial(_take_all, batches, device), device),
            "plain": timed(partial(_take_all, loader.__iter__, device), device),
        }
        rounds = interleaved(measures, settings.rounds)
        target = "≥ 5" if augment is FLIP_AND_CROP else ""
        yield ratio("ours / DataLoader", name, rounds, _quotient("plain", "ours"), target)


def _take_all(epoch: Callable[[], Iterable[Any]], device: torch.device) -> None:
    for images, labels in epoch():
        images.to(device), labels.to(device)


def end_to_end(settings: Settings) -> Iterator[Ratio]:
    """Images a second over epochs of training and evaluation by SGD, with flips and crops: as `python
    train.py` does it (channels_last, L2, clipping) against a plain PyTorch recipe in fp32 (DataLoader, weight
    decay, `loss.item()`). Each trains in a process of its own, and only that one's time counts: the plain
    recipe's data workers have other cores, which ours leaves idle. Speed does not cost accuracy: on 1000
    CIFAR-10 images (resnet8, batch size 64, 120 epochs, three seeds), test accuracy was 54.88 ± 0.72 % with
    the plain recipe, and with `train.py` 54.47 ± 0.81 % in fp32 and 55.14 ± 0.70 % in bf16 (mean ± standard
    deviation, commit 788f3553f136, PyTorch 2.14.1, two Xeon cores)."""
    case = ("resnet20", 128, 4) if settings.device.type == "cpu" else ("cifar_resnet18", 128, 100)
    case = ("resnet8", 16, 2) if settings.quick else case
    ours = {f"ours, {precision}": partial(_our_epochs, *case, precision) for precision in ("fp32", "bf16")}
    plain = {"plain recipe": partial(_plain_epochs, *case, 0)}
    if workers := 0 if settings.quick else min(8, CORES - 1):
        what = f"plain recipe, {workers} data worker{'s' * (workers > 1)}"
        plain[what] = partial(_plain_epochs, *case, workers)
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ExitStack() as stack:
        measures = {}
        for name, start in (ours | plain).items():
            pool = ProcessPoolExecutor(1, context, _start, (start, settings.device))
            measures[name] = partial(_measure_in, stack.enter_context(pool))
        rounds = interleaved(measures, settings.rounds)
    setting = f"{case[0]}, batch {case[1]}"
    for what in ours:
        for peer in plain:
            # Only some hardware is faster in bf16, and a plain recipe's data workers need idle cores.
            target = "≥ 1.2" if (what, peer) == ("ours, fp32", "plain recipe") else ""
            yield ratio(f"{what} / {peer}", setting, rounds, _quotient(peer, what), target)


def _our_epochs(name: str, batch_size: int, n_batches: int, precision: str, device: torch.device) -> Action:
    keep_memory()
    allow_tf32(False)
    images = random_data(n_batches * batch_size, batch_size).to(device)
    model = network(name, device).to(memory_format=torch.channels_last)
    optimizer = RST(sgd(model), Constant(0.0), ENDLESS, module=model)
    options: dict[str, Any] = {"epochs": 10**6, "batch_size": batch_size, "precision": precision}
    options |= {"seed": 0, "l2": L2, "clip_norm": 5.0}
    training = Training(model, optimizer, lambda _: 1.0, images, FLIP_AND_CROP, **options)
    return partial(next, (metrics for metrics in training.run() if metrics is not None))


def _plain_epochs(name: str, batch_size: int, n_batches: int, workers: int, device: torch.device) -> Action:
    images = random_data(n_batches * batch_size, batch_size)
    train = plain_loader(images.train_images, images.train_labels, FLIP_AND_CROP, batch_size, workers)
    test = plain_loader(images.test_images, images.test_labels, Augment(), batch_size, workers)
    model = network(name, device)
    optimizer = sgd(model, weight_decay=L2)

    def epoch() -> None:
        model.train()
        total = 0.0
        for x, y in train:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        model.eval()
        correct = 0
        with torch.no_grad():
            for x, y in test:
                correct += (model(x.to(device)).argmax(1) == y.to(device)).sum().item()

    return epoch


_measure: Callable[[], float]


def _start(start: Callable[[torch.device], Action], device: torch.device) -> None:
    """In a process of its own, where the memory allocator has no settings but those that `start` makes."""
    global _measure
    torch.set_num_threads(1)
    _measure = timed(start(device), device)


def _measure_here() -> float:
    return _measure()


def _measure_in(pool: ProcessPoolExecutor) -> float:
    return pool.submit(_measure_here).result()


SECTIONS: dict[str, Callable[[Settings], Iterator[Ratio]]] = {
    section.__name__: section for section in (steps, memory, data, end_to_end)
}
