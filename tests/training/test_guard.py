"""When a step's numbers are read, and what comes of them. `test_loop.py` has the guard in training."""

import math

import pytest
import torch

from rst.training.guard import Guard

FINE = {"loss": 0.5, "correct": 3.0, "gradient norm": 1.0, "norm of the weights": 2.0, "stop": 0.0}


def numbers(**changed):
    return torch.tensor([*(FINE | changed).values()])


@pytest.mark.parametrize("name", ["loss", "gradient norm", "norm of the weights"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_names_what_is_not_finite_and_where(name, value):
    guard = Guard(torch.device("cpu"), scaled=False, steps_per_epoch=10)
    guard.check(numbers(), 0)
    with pytest.raises(FloatingPointError, match=rf"^the {name} is {value} at step 25 \(epoch 3, batch 5\)"):
        guard.check(numbers(**{name: value}), 25)


def test_a_scaled_gradient_may_overflow():
    guard = Guard(torch.device("cpu"), scaled=True, steps_per_epoch=10)
    guard.check(numbers(**{"gradient norm": math.inf}), 0)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        guard.check(numbers(loss=math.nan), 0)


def test_only_skipped_steps_in_a_row_stop():
    guard = Guard(torch.device("cpu"), scaled=True, steps_per_epoch=10)
    for step in range(100):
        guard.count(step % 20 != 0, step)
    assert (guard.skipped, guard.skipped_in_a_row) == (95, 19)
    with pytest.raises(FloatingPointError, match=r"20 steps up to step 100 \(epoch 11, batch 0\) overflowed"):
        guard.count(True, 100)


class Event:
    """Stands in for a CUDA event where there is no GPU."""

    waited = 0

    def record(self, stream):
        assert stream == "of cuda"

    def synchronize(self):
        Event.waited += 1


def test_on_a_gpu_a_step_is_read_during_the_next_one(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
    guard = Guard(torch.device("cuda"), scaled=False, steps_per_epoch=10)
    guard.check(numbers(stop=1.0), 0)
    assert not guard.stopping and Event.waited == 0
    guard.check(numbers(loss=math.nan), 1)
    assert guard.stopping and Event.waited == 1
    with pytest.raises(FloatingPointError, match="at step 1"):
        guard.settle()
    guard.settle()  # nothing is left to read
    assert Event.waited == 2
