"""What RST must arrive at in a framework, by a loop written by hand; and running examples."""

import os
import re
import runpy
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import reference
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from rst.schedule import Schedule, uniform

EXAMPLES = Path(__file__).parent.parent / "examples"


def weights(
    schedule: Schedule,
    steps: int,
    *,
    base: Callable[[nn.Module], torch.optim.Optimizer] = lambda model: reference.sgd(model.parameters()),
    clip: Callable[[Iterable[Tensor]], object] | None = None,
    micro_batches: int = 1,
    decay: float = 1.0,
    **rule: object,
) -> list[Tensor]:
    """Parameters and buffers of `reference.network()` after `steps` steps on `numbered_batches`.

    Args:
        base: makes the base optimizer.
        clip: called with the parameters before each step.
        decay: of the learning rate, a step.
        rule: gamma and so on.
    """
    model = reference.network()
    optimizer = base(model)
    parameters = list(model.parameters())
    for t in range(steps):

        def closure(t: int = t) -> Tensor:
            numbers = range(micro_batches * t, micro_batches * (t + 1))
            return sum((_add_gradient(model, i, micro_batches) for i in numbers), torch.zeros(()))

        is_sam = uniform(0, t) < schedule(t, steps)
        reference.gradient(model, parameters, closure, sam=is_sam, rho=[0.1] * len(parameters), **rule)
        if clip is not None:
            clip(parameters)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= decay
    return reference.state(model)


def _add_gradient(model: nn.Module, i: int, micro_batches: int) -> Tensor:
    torch.manual_seed(i)
    _, x, y = numbered_batches(i + 1)[i]
    loss = nn.functional.cross_entropy(model(x), y) / micro_batches
    loss.backward()
    return loss.detach()


def numbered_batches(count: int) -> list[tuple[int, Tensor, Tensor]]:
    """Their numbers, with which to seed dropout, inputs (8, 6) and labels (8,)."""
    inputs, labels = reference.batches()
    return [(i, inputs[i], labels[i]) for i in range(count)]


def propagations(schedule: Schedule, steps: int) -> int:
    return steps + sum(uniform(0, t) < schedule(t, steps) for t in range(steps))


def in_two_processes(work: Callable[..., None], *arguments: object) -> None:
    """`work(*arguments)` in two processes that torchrun might have started."""
    torch.multiprocessing.spawn(_as_rank, args=(free_port(), work, arguments), nprocs=2)


def _as_rank(rank: int, port: int, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= as_rank(rank, 2, port)
    work(*arguments)
    if dist.is_initialized():  # the examples end it themselves
        dist.barrier()
    os._exit(0)  # on a busy machine gloo's threads have aborted an orderly end


def as_rank(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    values["MASTER_PORT"] = port
    return {name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "localhost"}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port: int = listening.getsockname()[1]
        return port


class CountAveraging:
    """How often DistributedDataParallel averages the gradients of `model`, which has a single bucket."""

    def __init__(self, model: nn.parallel.DistributedDataParallel) -> None:
        self.times = 0
        model.register_comm_hook(None, self._hook)

    def _hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.times += 1
        return allreduce_hook(None, bucket)


def run_example(name: str, *arguments: object) -> list[float]:
    """Run it as a script, and return the numbers in the last line that it prints."""
    printed = StringIO()
    with patch.object(sys, "argv", [name, *map(str, arguments)]), redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    *_, last = ["", *printed.getvalue().splitlines()]
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", last)]
