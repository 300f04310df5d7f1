"""When a step's figures are read, and what is made of them. `tests/test_engine.py` has them in training."""

import math

import pytest
import torch

from rst.training.guard import Guard

FINE = [0.5, 3.0, 1.0, 2.0, 0.0]  # loss, right answers, gradient norm, norm of the weights, request to stop


def figures(**changed):
    names = ["loss", "correct", "gradient", "weights", "stop"]
    return torch.tensor([changed.get(name, value) for name, value in zip(names, FINE, strict=True)])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss", "the loss is"),
        ("gradient", "the gradient norm is"),
        ("weights", "the norm of the weights is"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_names_what_is_not_finite(name, words, value):
    guard = Guard(torch.device("cpu"), scaled=False, steps_per_epoch=10)
    guard.look_at(figures(), 0)
    with pytest.raises(
        FloatingPointError, match=rf"^{words} {value} at step 25 \(epoch 3, batch 5\); the last"
    ):
        guard.look_at(figures(**{name: value}), 25)


def test_a_scaled_gradient_may_overflow():
    guard = Guard(torch.device("cpu"), scaled=True, steps_per_epoch=10)
    guard.look_at(figures(gradient=math.inf), 0)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        guard.look_at(figures(loss=math.nan), 0)


def test_only_a_run_of_skipped_steps_stops():
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
    guard.look_at(figures(stop=1.0), 0)
    assert not guard.stopping and Event.waited == 0
    guard.look_at(figures(loss=math.nan), 1)
    assert guard.stopping and Event.waited == 1
    with pytest.raises(FloatingPointError, match="at step 1"):
        guard.settle()
    guard.settle()  # nothing is left to read
    assert Event.waited == 2
