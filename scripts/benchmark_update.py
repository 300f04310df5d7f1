"""The benchmark's sections on the update rule: steps, perturbation, memory and their growth."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import pytorch_optimizer
import torch
import torch.nn.functional as F
from benchmark_peers import MEAN, STD, UsualSAM
from joblib import cpu_count
from torch import nn
from torch.profiler import ProfilerActivity, profile

from rst import RST, Constant, Periodic
from rst.benchmark import Action, Figure, Round, Settings, figure, interleaved, per_step, ratio_of, slope
from rst.data import Augment, ImageData
from rst.models import create
from rst.optim import _swap
from rst.schedule import Schedule
from rst.training.device import cpu_threads
from rst.training.loop import Training

RHO, L2 = 0.05, 5e-4
TOTAL_STEPS = 10**9  # of a run that is never over
SGD_SETTINGS: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "nesterov": True}
SAM, HALF = Constant(1.0), Periodic(2)  # the latter: a SAM step and a plain one in turn, so η is 1.5 exactly


def sgd(parameters: Any, weight_decay: float = 0.0) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, weight_decay=weight_decay, **SGD_SETTINGS)


def network(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create(name, num_classes=10, in_chans=3, image_size=(32, 32), **options)


def random_data(n: int, side: int = 32) -> ImageData:
    """`n` training images and a test image, smooth: on noise AutoAugment would take other paths than
    on photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (n + 1, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = F.interpolate(coarse.float(), size=side, mode="bilinear").byte()
    labels = torch.randint(10, (n + 1,), generator=generator)
    classes = tuple(map(str, range(10)))
    return ImageData(images[:n], labels[:n], images[n:], labels[n:], classes, MEAN, STD)


def training(
    model: nn.Module, data: ImageData, batch_size: int, schedule: Schedule, augment: Augment, **settings: Any
) -> Training:
    """In channels_last, with L2 and clipping, as `python train.py` has it by default."""
    settings = {"epochs": 1, "batch_size": batch_size, "seed": 0, "l2": L2, "clip_norm": 5.0} | settings
    model = model.to(memory_format=torch.channels_last)
    total_steps = settings["epochs"] * (len(data.train_labels) // batch_size)
    optimizer = RST(sgd(model.parameters()), schedule, total_steps, rho=RHO, module=model)
    return Training(model, optimizer, lambda _: 1.0, data, augment, **settings)


class Problem:
    """A model in channels_last, random images, and the ways to train it: as functions that take a step."""

    def __init__(self, name: str, batch_size: int, **options: int) -> None:
        self.model = network(name, **options).to(memory_format=torch.channels_last)
        self.images = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch_size,))

    def closure(self) -> None:
        F.cross_entropy(self.model(self.images), self.labels).backward()

    def sgd_parts(self, set_to_none: bool = True) -> dict[str, Callable[[], object]]:
        """SGD's step in two parts, to be taken in turn."""
        base = sgd(self.model.parameters())

        def propagate() -> None:
            base.zero_grad(set_to_none)
            self.closure()

        return {"propagation": propagate, "update": base.step}

    def sgd(self, set_to_none: bool = True) -> Callable[[], object]:
        return in_turn(*self.sgd_parts(set_to_none).values())

    def optimizer(self, schedule: Schedule, gamma: float = 1.0) -> RST:
        base = sgd(self.model.parameters())
        return RST(base, schedule, TOTAL_STEPS, rho=RHO, gamma=gamma, module=self.model)

    def rst(self, schedule: Schedule, gamma: float = 1.0) -> Callable[[], object]:
        optimizer = self.optimizer(schedule, gamma)
        return partial(optimizer.step, self.closure)

    def usual_optimizer(self, factor: float | None = 1.0) -> UsualSAM:
        return UsualSAM(sgd(self.model.parameters()), RHO, factor)

    def usual(self) -> Callable[[], object]:
        return self._two_passes(self.usual_optimizer())

    def peer_optimizer(self, foreach: bool | None = None) -> Any:
        """pytorch_optimizer's. `foreach` None is its default, which on a CPU is False."""
        parameters = self.model.parameters()
        return pytorch_optimizer.SAM(parameters, torch.optim.SGD, rho=RHO, foreach=foreach, **SGD_SETTINGS)

    def peer(self, foreach: bool | None = None) -> Callable[[], object]:
        return self._two_passes(self.peer_optimizer(foreach))

    def _two_passes(self, sam: Any) -> Callable[[], object]:
        first, second = (partial(part, zero_grad=True) for part in (sam.first_step, sam.second_step))
        return in_turn(self.closure, first, self.closure, second)


def in_turn(*parts: Callable[[], object]) -> Callable[[], object]:
    def step() -> None:
        for part in parts:
            part()

    return step


USUAL = "as usually written"
# Average propagation counts.
ETA = {"SGD": 1.0, "SAM": 2.0, "RST p=0.5": 1.5, "G-RST p=0.5": 1.5}


def steps(settings: Settings) -> Iterator[Figure]:
    """Time of a step against SGD's, and against its limit: η·(SGD's propagation) + SGD's update.

    SGD against its own limit is the control: 1 but for the error of measurement. "(engine)" is the whole
    step of `rst.training.loop`, with batch, L2, clipping and checks. Its limit is the engine's own SGD step +
    (η − 1)·(bare propagation).
    """
    cases = [("resnet20", 128, 2), ("cifar_resnet18", 32, 1), ("wrn16_4", 32, 1)]
    for name, batch_size, more in [("resnet8", 8, 1)] if settings.quick else cases:
        yield from _steps(name, batch_size, more * settings.rounds)


def _steps(name: str, batch_size: int, rounds: int) -> Iterator[Figure]:
    def engine(schedule: Schedule, n: int) -> Action:
        data = random_data(batch_size * n * (rounds + 1))
        run = training(network(name), data, batch_size, schedule, Augment()).run()
        return per_step(partial(next, run), n)

    def problem() -> Problem:
        return Problem(name, batch_size)

    actions = {
        **{part: per_step(step) for part, step in problem().sgd_parts().items()},
        "SGD": per_step(problem().sgd()),
        "SAM": per_step(problem().rst(SAM)),
        "RST p=0.5": per_step(problem().rst(HALF), 2),
        "G-RST p=0.5": per_step(problem().rst(HALF, gamma=2.0), 2),
        "SAM, pytorch_optimizer": per_step(problem().peer()),
        "SAM, as usually written": per_step(problem().usual()),
        "SGD (engine)": engine(Constant(0.0), 1),
        "SAM (engine)": engine(SAM, 1),
        "RST p=0.5 (engine)": engine(HALF, 2),
    }
    measured = interleaved(actions, rounds)
    of = partial(figure, "steps", model=f"{name}, batch {batch_size}", rounds=measured)
    targets = dict.fromkeys(("SAM", "SAM (engine)"), "≤ 1.03")
    if name == "resnet20":
        targets |= dict.fromkeys(("RST p=0.5", "RST p=0.5 (engine)"), "≤ 1.03")
    for what in list(actions)[2:]:
        if what != "SGD":
            yield of(f"{what} / SGD", ratio=ratio_of(what, "SGD"))
        if what != "SGD (engine)":
            yield of(f"{what} / its limit", ratio=to_limit(what), target=targets.get(what, ""))
    yield of("G-RST p=0.5 / RST p=0.5", ratio=ratio_of("G-RST p=0.5", "RST p=0.5"), target="≤ 1.02")
    for peer in ("SAM, pytorch_optimizer", "SAM, as usually written"):
        yield of(f"SAM / {peer}", ratio=ratio_of("SAM", peer))


def to_limit(what: str) -> Callable[[Round], float]:
    eta = ETA[what.removesuffix(" (engine)").split(",")[0]]

    def ratio(one: Round) -> float:
        if what.endswith("(engine)"):
            return one[what] / (one["SGD (engine)"] + (eta - 1) * one["propagation"])
        return one[what] / (eta * one["propagation"] + one["update"])

    return ratio


def perturbation(settings: Settings) -> Iterator[Figure]:
    """Perturbing and restoring alone, on random gradients, against what others take for it, on one thread and
    on all cores. "As usually written" is github.com/davda54/sam; targets are for the peers as they come."""
    for name in ("resnet8",) if settings.quick else ("cifar_resnet18", "wrn28_10"):
        for threads in dict.fromkeys((1, cpu_count())):
            with cpu_threads(threads):
                measured = interleaved(between_passes(Problem(name, 1)), settings.rounds, warmup=2)
            model = f"{name}, {threads} thread{'s' * (threads > 1)}"
            for peer in list(measured[0])[1:]:
                target = "≤ 0.5" if peer in ("pytorch_optimizer", USUAL) else ""
                yield figure(
                    "perturbation", f"ours / {peer}", model, measured, ratio_of("ours", peer), target
                )


def between_passes(problem: Problem) -> dict[str, Action]:
    """What each SAM does between the passes of a step and after them, but for the base optimizer's step.
    Gradients are set anew before each, which is not measured."""
    parameters = list(problem.model.parameters())
    gradients = [torch.randn_like(p) for p in parameters]
    optimizer = problem.optimizer(SAM)

    def set_gradients() -> None:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient

    def ours() -> None:
        perturbed = optimizer._write_perturbed()
        optimizer._keep_share_of_clean_gradient()
        _swap(perturbed)
        _swap(perturbed)

    def by_peer(foreach: bool | None) -> Callable[[], object]:
        sam = problem.peer_optimizer(foreach)
        sam.base_optimizer.step = lambda: None
        return in_turn(partial(sam.first_step, zero_grad=True), sam.second_step)

    def usually(factor: float | None) -> Callable[[], object]:
        usual = problem.usual_optimizer(factor)
        return in_turn(partial(usual.first_step, zero_grad=True), usual.restore)

    actions: dict[str, Callable[[], object]] = {
        "ours": ours,
        "pytorch_optimizer": by_peer(None),
        "pytorch_optimizer, foreach=True": by_peer(True),
        USUAL: usually(1.0),
        f"{USUAL}, without its factor 1": usually(None),
    }
    return {name: per_step(action, prepare=set_gradients) for name, action in actions.items()}


def memory(settings: Settings) -> Iterator[Figure]:
    """Most memory of a step beyond that of SGD with momentum, in copies of the parameters. Exact, not timed.

    Beyond SGD that frees its gradients before a step (PyTorch's default), and beyond SGD that does not, as
    G-RST must keep ∇L(θ). Left out: RST's two states of the random generator, 10 kB whatever the model.
    """
    cases = [("resnet8", 2)] if settings.quick else [("cifar_resnet18", 2), ("cifar_resnet18", 32)]
    for name, batch_size in cases:
        copy = sum(p.nbytes for p in network(name).parameters())
        baselines, others = peaks(name, batch_size)
        for what, n_bytes in others.items():
            for baseline, base_bytes in baselines.items():
                copies = (n_bytes - base_bytes) / copy
                target = "≤ 1.0" if "RST" in what else ""
                model = f"{name}, batch {batch_size}"
                yield Figure("memory", f"{what}, beyond {baseline}", model, copies, copies, copies, 1, target)


def peaks(name: str, batch_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Peak bytes of SGD and of the others, each from a fresh model on."""

    def peak(start: Callable[[Problem], Callable[[], object]]) -> int:
        def work() -> None:
            step = start(Problem(name, batch_size))
            for _ in range(3):  # the first allocates momentum; of RST's, the third is a SAM step again
                step()

        return peak_bytes(work)

    fixed = 2 * torch.get_rng_state().nbytes
    baselines = {
        "SGD": peak(lambda problem: problem.sgd(set_to_none=True)),
        "SGD that keeps gradients": peak(lambda problem: problem.sgd(set_to_none=False)),
    }
    others = {
        "RST p=0.5": peak(lambda problem: problem.rst(HALF)) - fixed,
        "G-RST p=0.5": peak(lambda problem: problem.rst(HALF, gamma=2.0)) - fixed,
        "SAM, pytorch_optimizer": peak(lambda problem: problem.peer()),
        "SAM, pytorch_optimizer, foreach=True": peak(lambda problem: problem.peer(foreach=True)),
        "SAM, as usually written": peak(lambda problem: problem.usual()),
    }
    return baselines, others


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that PyTorch's CPU allocator held at once beyond those before, by the profiler's records:
    exact, and temporaries inside operations are among them."""
    gc.collect()  # garbage freed during `work` would count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        work()
    events = records.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in changes))


def growth(settings: Settings) -> Iterator[Figure]:
    """RST's step against its limit, and perturbing and restoring, for wider networks and larger batches."""
    name, widths, batches = "resnet20", [16, 32, 64], [32, 128, 512]
    if settings.quick:
        name, widths, batches = "resnet8", [4, 64], [4, 8]
    rounds = max(2, settings.rounds // 2)
    cases = [(width, batches[0]) for width in widths] + [(widths[0], batch) for batch in batches[1:]]
    actions, sizes = {}, {}
    for width, batch_size in cases:
        case = f"width {width}, batch {batch_size}"
        for part, step in Problem(name, batch_size, width=width).sgd_parts().items():
            actions[f"{part}, {case}"] = per_step(step)
        actions[f"RST, {case}"] = per_step(Problem(name, batch_size, width=width).rst(HALF), 2)
    for width in widths:
        problem = Problem(name, 1, width=width)
        actions[f"perturbation, {width}"] = between_passes(problem)["ours"]
        sizes[width] = sum(p.numel() for p in problem.model.parameters())
    measured = interleaved(actions, rounds)
    for width, batch_size in cases:
        case = f"width {width}, batch {batch_size}"

        def ratio(one: Round, case: str = case) -> float:
            return one[f"RST, {case}"] / (1.5 * one[f"propagation, {case}"] + one[f"update, {case}"])

        yield figure("growth", "RST p=0.5 / its limit", f"{name}, {case}", measured, ratio)

    def exponent(one: Round) -> float:
        return slope(list(sizes.values()), [one[f"perturbation, {width}"] for width in widths])

    millions = " to ".join(f"{n / 1e6:.2f}" for n in (sizes[widths[0]], sizes[widths[-1]]))
    what = "exponent of perturb + restore in parameters"
    yield figure("growth", what, f"{name}, {millions} M", measured, exponent, "≤ 1.1")
