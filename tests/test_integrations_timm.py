"""RST by timm's registry and with its loss scaler, against the same steps in a loop written by hand."""

import argparse
from functools import partial

import by_hand
import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_close, assert_same_bits, network, state
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.optim._optim_factory import default_registry
from timm.utils import CheckpointSaver, ParseKwargs
from torch.nn.utils import clip_grad_norm_

from rst import Linear
from rst.integrations.timm import LossScaler, register

STEPS = 12
SCHEDULE = Linear(0.0, 1.0)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    register()


def create(model, **options):
    options = {"schedule": SCHEDULE, "total_steps": STEPS, "gamma": 2.0, "module": model} | options
    return create_optimizer_v2(model, "rst", lr=0.01, weight_decay=0.1, **options)


def train(model, optimizer, loss_scaler, start=0, stop=STEPS):
    for t, x, y in by_hand.numbered_batches(stop)[start:]:
        torch.manual_seed(t)
        loss_scaler(
            lambda x=x, y=y: F.cross_entropy(model(x), y),
            optimizer,
            clip_grad=0.1,
            parameters=model.parameters(),
        )
        optimizer.zero_grad()


@pytest.mark.parametrize(("base", "enabled"), [("sgd", True), ("adamw", False)])
def test_training_is_the_loop_by_hand(base, enabled):
    model = network()
    optimizer = create(model, base=base)
    train(model, optimizer, LossScaler("cpu", enabled))
    assert optimizer.propagations == by_hand.propagations(SCHEDULE, STEPS)
    weights = by_hand.weights(
        SCHEDULE,
        STEPS,
        base=lambda model: create_optimizer_v2(model, base, lr=0.01, weight_decay=0.1),
        clip=partial(clip_grad_norm_, max_norm=0.1),
        gamma=2.0,
    )
    assert_close(state(model), weights)


def test_an_overflow_that_clipping_by_value_hides():
    """The scaler skips the step, and the next one is made all the same."""
    model = network(torch.float32)
    optimizer, loss_scaler = create(model, schedule=1.0), LossScaler("cpu")
    before = state(model)
    for factor in torch.inf, 1.0:
        loss_scaler(
            lambda factor=factor: factor * model(torch.ones(2, 6)).sum(),
            optimizer,
            clip_grad=0.1,
            clip_mode="value",
            parameters=model.parameters(),
        )
        assert all(torch.equal(p, q) for p, q in zip(before[0], state(model)[0], strict=True)) == (factor > 1)
    assert optimizer.steps == 2


def test_a_forward_that_returns_more_than_the_loss():
    """As that of timm's script does since it has tasks."""
    alone, with_more = network(torch.float32), network(torch.float32)
    x = torch.ones(2, 6)
    torch.manual_seed(0)
    LossScaler("cpu")(lambda: alone(x).sum(), create(alone, schedule=1.0))
    torch.manual_seed(0)
    loss, more = LossScaler("cpu")(lambda: (with_more(x).sum(), "more"), create(with_more, schedule=1.0))
    assert loss.ndim == 0 and more == "more"
    assert_same_bits(state(alone), state(with_more))


def test_options_of_its_training_script():
    parser = argparse.ArgumentParser()
    parser.add_argument("--opt-kwargs", nargs="*", action=ParseKwargs, default={})
    words = ["--opt-kwargs", "base=adamw", "schedule=(0,0.5)", "total_steps=100", "rho=0.05", "adaptive=True"]
    args = parser.parse_args(words)
    vars(args).update(
        opt="rst", lr=1e-3, weight_decay=0.05, momentum=0.9, opt_eps=1e-6, opt_betas=[0.9, 0.95]
    )
    optimizer = create_optimizer_v2(network(), **optimizer_kwargs(args), **args.opt_kwargs)
    assert type(optimizer.base) is torch.optim.AdamW
    assert (optimizer.schedule, optimizer.total_steps, optimizer.rho) == (Linear(0.0, 0.5), 100, 0.05)
    assert optimizer.adaptive
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.05]
    assert optimizer.param_groups[0]["eps"] == 1e-6


def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path):
    whole, begun, resumed = network(), network(), network()
    train(whole, create(whole), LossScaler("cpu"))
    optimizer, loss_scaler = create(begun), LossScaler("cpu")
    train(begun, optimizer, loss_scaler, stop=7)
    saver = CheckpointSaver(begun, optimizer, amp_scaler=loss_scaler, checkpoint_dir=tmp_path)
    saver.save_checkpoint(0, metric=0.0)
    optimizer, loss_scaler = create(resumed), LossScaler("cpu")
    resume_checkpoint(resumed, tmp_path / "last.pth.tar", optimizer, loss_scaler, log_info=False)
    train(resumed, optimizer, loss_scaler, start=7)
    assert optimizer.steps == STEPS
    assert_same_bits(state(whole), state(resumed))


def test_what_the_loss_scaler_refuses():
    model, loss_scaler = network(), LossScaler("cpu")
    optimizer, loss = create(model), lambda: reference.loss_of(model, 0)
    with pytest.raises(TypeError, match="_forward"):
        loss_scaler(loss(), optimizer)
    with pytest.raises(ValueError, match="--grad-accum-steps"):
        loss_scaler(loss, optimizer, need_update=False)
    optimizer.module = None
    with pytest.raises(ValueError, match=r"optimizer\.module"):
        loss_scaler(loss, optimizer)
