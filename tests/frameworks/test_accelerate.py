"""RST with Accelerate, against the same steps in a loop written by hand."""

from contextlib import nullcontext
from functools import partial

import by_hand
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from by_hand import numbered_batches, run_example
from reference import assert_close, assert_same_bits, network, sgd, state
from torch.nn.utils import clip_grad_norm_

from rst import RST, Linear

STEPS, MICRO_BATCHES = 8, 2
SCHEDULE = Linear(0.3, 0.9)


def prepare(accelerator, total_steps=STEPS):
    model = network()
    optimizer = RST(sgd(model.parameters()), SCHEDULE, total_steps, gamma=2.0)
    optimizer.module, prepared = accelerator.prepare(model, optimizer)
    return optimizer, prepared


def train(accelerator, optimizer, prepared, start=0, stop=STEPS):
    model = optimizer.module
    examples = numbered_batches(stop * MICRO_BATCHES)
    for t in range(start, stop):
        for _ in optimizer.passes():
            for k in range(MICRO_BATCHES):
                is_last = k == MICRO_BATCHES - 1
                with nullcontext() if is_last else accelerator.no_sync(model):
                    i, x, y = examples[MICRO_BATCHES * t + k]
                    torch.manual_seed(i)
                    accelerator.backward(F.cross_entropy(model(x), y) / MICRO_BATCHES)
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        prepared.step()


def test_training_is_the_loop_by_hand():
    accelerator = Accelerator(cpu=True)
    optimizer, prepared = prepare(accelerator)
    train(accelerator, optimizer, prepared)
    assert optimizer.propagations == by_hand.propagations(SCHEDULE, STEPS)
    clip = partial(clip_grad_norm_, max_norm=0.1)
    weights = by_hand.weights(SCHEDULE, STEPS, micro_batches=MICRO_BATCHES, clip=clip, gamma=2.0)
    assert_close(state(optimizer.module), weights)


def train_as_rank():
    accelerator = Accelerator(cpu=True)
    optimizer, prepared = prepare(accelerator)
    averaging = by_hand.CountAveraging(optimizer.module)
    train(accelerator, optimizer, prepared)
    assert averaging.times == STEPS < optimizer.propagations


def test_two_processes_average_the_gradient_once_a_step():
    by_hand.in_two_processes(train_as_rank)


def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path):
    accelerator = Accelerator(cpu=True)
    whole, prepared = prepare(accelerator)
    train(accelerator, whole, prepared, stop=5)
    accelerator.save_state(tmp_path)
    train(accelerator, whole, prepared, start=5)
    again = Accelerator(cpu=True)
    resumed, prepared = prepare(again)
    again.load_state(tmp_path)
    train(again, resumed, prepared, start=5)
    assert resumed.propagations == whole.propagations
    assert_same_bits(state(whole.module), state(resumed.module))


def test_accumulate_is_refused():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer, prepared = prepare(accelerator)
    model = optimizer.module

    def train_on(x, y):
        with accelerator.accumulate(model):
            for _ in optimizer.passes():
                accelerator.backward(F.cross_entropy(model(x), y))
            prepared.step()
            prepared.zero_grad()

    (_, *first), (_, *second) = numbered_batches(2)
    train_on(*first)
    with pytest.raises(RuntimeError, match="loop over the micro-batches within one loop over passes"):
        train_on(*second)


def test_the_example(tmp_path):
    propagations, accuracy = run_example("accelerate_loop.py", tmp_path)
    assert propagations == by_hand.propagations(Linear(0.0, 1.0), 24)
    assert accuracy > 0.8
