"""RST in transformers' Trainer, against the same steps in a loop written by hand."""

from functools import partial

import by_hand
import pytest
import torch
import torch.nn.functional as F
from by_hand import numbered_batches, run_example
from reference import assert_close, assert_same_bits, network, sgd, state
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer, TrainingArguments

from rst import RST, Linear
from rst.integrations.transformers import RSTMixin

STEPS = 6
SCHEDULE = Linear(0.3, 0.9)


class RSTTrainer(RSTMixin, Trainer):
    pass


class Net(nn.Module):
    """Returns a loss, as the Trainer expects it."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, number, x, labels):
        torch.manual_seed(number.item())
        return {"loss": F.cross_entropy(self.net(x[0]), labels[0])}


def trainer(folder, micro_batches=1, rst=None, optimizer=None, epochs=1, steps=STEPS, **options):
    model = Net()
    examples = numbered_batches(steps * micro_batches)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=1,  # one of `numbered_batches`
        gradient_accumulation_steps=micro_batches,
        num_train_epochs=epochs,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no"} | options,
    )
    data = [{"number": i, "x": x, "labels": y} for i, x, y in examples]
    optimizer = sgd(model.parameters()) if optimizer is None else optimizer(model)
    return RSTTrainer(model, arguments, train_dataset=data, optimizers=(optimizer, None), rst=rst)


def train_as_rank(folder):
    run = trainer(folder, micro_batches=2, steps=2 * STEPS, rst={"schedule": SCHEDULE, "gamma": 2.0})
    step, averaging = run.training_step, []

    def counting(model, *arguments):
        if not averaging:
            averaging.append(by_hand.CountAveraging(model))
        return step(model, *arguments)

    run.training_step = counting
    run.train()
    steps, propagations = counters(run)
    assert averaging[0].times == steps == STEPS < propagations


def test_two_processes_average_the_gradient_once_a_step(tmp_path):
    by_hand.in_two_processes(train_as_rank, tmp_path)


def counters(run):
    optimizer = run.optimizer.optimizer
    return optimizer.steps, optimizer.propagations


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("rule", "max_norm"), [({"gamma": 1.0}, 0.0), ({"gamma": 2.0}, 0.1)])
def test_training_is_the_loop_by_hand(tmp_path, micro_batches, rule, max_norm):
    run = trainer(tmp_path, micro_batches, {"schedule": SCHEDULE, **rule}, max_grad_norm=max_norm)
    run.train()
    assert counters(run) == (STEPS, by_hand.propagations(SCHEDULE, STEPS))
    assert run.state.global_step == STEPS
    clip = partial(clip_grad_norm_, max_norm=max_norm) if max_norm else None
    weights = by_hand.weights(SCHEDULE, STEPS, micro_batches=micro_batches, clip=clip, **rule)
    assert_close(state(run.model), weights)


def test_losses_are_those_of_the_clean_pass(tmp_path):
    run = trainer(tmp_path, 2, {"schedule": 1.0}, steps=1)
    run.train()
    model = Net()
    losses = [model(torch.tensor(i), x[None], y[None])["loss"].item() for i, x, y in numbered_batches(2)]
    assert run.state.log_history[0]["loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)


def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path):
    rst = {"schedule": SCHEDULE, "gamma": 2.0}
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", 2, rst, epochs=2)
    whole.train()
    first = trainer(tmp_path / "cut", 2, rst, epochs=2, **saving)
    first.train()
    second = trainer(tmp_path / "cut", 2, rst, epochs=2)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert counters(second) == (2 * STEPS, by_hand.propagations(SCHEDULE, 2 * STEPS))
    assert_same_bits(state(whole.model), state(second.model))


def test_training_again_begins_another_run(tmp_path):
    run = trainer(tmp_path, rst={"schedule": 1.0})
    run.train()
    run.train()
    assert counters(run) == (STEPS, 2 * STEPS)


def test_an_optimizer_that_is_an_rst_stays_it(tmp_path):
    made = []

    def make(model):
        made.append(RST(sgd(model.parameters()), SCHEDULE, STEPS))
        return made[0]

    run = trainer(tmp_path, optimizer=make)
    run.train()
    assert run.optimizer.optimizer is made[0]
    assert_close(state(run.model), by_hand.weights(SCHEDULE, STEPS))


def test_it_needs_arguments_of_rst(tmp_path):
    with pytest.raises(ValueError, match="RSTMixin needs"):
        trainer(tmp_path).train()


def test_the_example(tmp_path):
    (propagations,) = run_example("transformers_trainer.py", tmp_path)
    assert propagations == by_hand.propagations(Linear(0.0, 1.0), 24)
