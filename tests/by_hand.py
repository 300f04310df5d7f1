"""What RST must arrive at in a framework, by a loop written by hand; and running examples."""

import re
import runpy
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import reference
import torch
from torch import Tensor, nn

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


def run_example(name: str, *arguments: object) -> list[float]:
    """Run it as a script, and return the numbers in the last line that it prints."""
    printed = StringIO()
    with patch.object(sys, "argv", [name, *map(str, arguments)]), redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    *_, last = ["", *printed.getvalue().splitlines()]
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", last)]
