"""RST in Lightning's Trainer, against the same steps in a loop written by hand."""

import warnings
from functools import partial

import by_hand
import pytest
import torch
import torch.nn.functional as F
from by_hand import numbered_batches, run_example
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from reference import assert_close, assert_same_bits, network, sgd, state
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

from rst import RST, Linear
from rst.integrations.lightning import RSTCallback
from rst.rivals import PartialAscent

STEPS = 8
SCHEDULE = Linear(0.3, 0.9)


class Net(LightningModule):
    def __init__(self, schedule=SCHEDULE, decay=1.0, **rule):
        super().__init__()
        self.net, self.schedule, self.decay, self.rule = network(), schedule, decay, rule
        self.losses = []

    def training_step(self, batch, batch_idx):
        i, x, y = batch
        torch.manual_seed(i)
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return {"loss": loss, "number": i}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append((outputs["loss"].item(), self.trainer.callback_metrics["loss"].item()))

    def configure_optimizers(self):
        optimizer = RST(
            sgd(self.parameters()), self.schedule, self.trainer.estimated_stepping_batches, **self.rule
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Manual(Net):
    """Two micro-batches a step."""

    def __init__(self, **rule):
        super().__init__(**rule)
        self.automatic_optimization = False

    def training_step(self, micro_batches, batch_idx):
        optimizer = self.optimizers()
        for _ in optimizer.passes():
            for i, x, y in micro_batches:
                torch.manual_seed(i)
                self.manual_backward(F.cross_entropy(self.net(x), y) / len(micro_batches))
        optimizer.step()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


def trainer(folder, callbacks=(), **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    return Trainer(
        default_root_dir=folder,
        callbacks=[RSTCallback(), *callbacks],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loader(examples):
    return DataLoader(examples, batch_size=None)


def scaling():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}  # float64 weights stay what they are


@pytest.mark.parametrize("options", [{}, scaling()], ids=["float64", "scaled"])
@pytest.mark.parametrize(
    ("rule", "clipping", "clip"),
    [
        ({"gamma": 1.0}, {}, None),
        ({"gamma": 2.0}, {"gradient_clip_val": 0.1}, partial(clip_grad_norm_, max_norm=0.1)),
        (
            {"gamma": 0.5},
            {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
            partial(clip_grad_value_, clip_value=0.02),
        ),
    ],
)
def test_automatic_optimization_is_the_loop_by_hand(tmp_path, options, rule, clipping, clip):
    calls = Calls()
    net = Net(decay=0.9, **rule)
    run = trainer(tmp_path, [calls], **options, **clipping)
    run.fit(net, loader(numbered_batches(STEPS)))
    optimizer = run.optimizers[0]
    assert optimizer.propagations == by_hand.propagations(SCHEDULE, STEPS)
    assert run.global_step == optimizer.steps == calls.before_step == STEPS
    assert_close(state(net.net), by_hand.weights(SCHEDULE, STEPS, clip=clip, decay=0.9, **rule))


class Calls(Callback):
    before_step = 0

    def on_before_optimizer_step(self, *_):
        self.before_step += 1


def test_losses_are_those_of_the_clean_pass(tmp_path):
    net, model = Net(schedule=1.0), network()
    trainer(tmp_path).fit(net, loader(numbered_batches(1)))
    torch.manual_seed(0)
    _, x, y = numbered_batches(1)[0]
    loss = F.cross_entropy(model(x), y).item()
    assert net.losses == [(pytest.approx(loss), pytest.approx(loss))]


def test_manual_optimization_with_micro_batches(tmp_path):
    examples = numbered_batches(2 * STEPS)
    net = Manual(gamma=2.0)
    run = trainer(tmp_path, **scaling())
    run.fit(net, loader([examples[2 * t : 2 * t + 2] for t in range(STEPS)]))
    assert run.optimizers[0].propagations == by_hand.propagations(SCHEDULE, STEPS)
    assert run.global_step == STEPS
    assert_close(state(net.net), by_hand.weights(SCHEDULE, STEPS, gamma=2.0, micro_batches=2))


def test_fabric():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = network()
    optimizer = RST(sgd(model.parameters()), SCHEDULE, STEPS, gamma=2.0)
    optimizer.module, prepared = fabric.setup(model, optimizer)
    for i, x, y in numbered_batches(STEPS):
        for _ in (prepared if i % 2 else optimizer).passes():
            torch.manual_seed(i)
            fabric.backward(F.cross_entropy(optimizer.module(x), y))
        fabric.clip_gradients(optimizer.module, prepared, max_norm=0.1)
        prepared.step()
    assert optimizer.propagations == by_hand.propagations(SCHEDULE, STEPS)
    clip = partial(clip_grad_norm_, max_norm=0.1)
    assert_close(state(model), by_hand.weights(SCHEDULE, STEPS, gamma=2.0, clip=clip))


def test_partial_ascent_is_asked_by_the_wrapper():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = network()
    optimizer = PartialAscent(sgd(model.parameters()), total_steps=STEPS, fraction=0.5)
    optimizer.module, prepared = fabric.setup(model, optimizer)
    for _, x, y in numbered_batches(STEPS):
        for _ in prepared.passes():
            n = prepared.images(len(x))
            fabric.backward(F.cross_entropy(optimizer.module(x[:n]), y[:n]))
        prepared.step()
    assert optimizer.propagations == 1.5 * STEPS


def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path):
    whole, first, second = Net(gamma=2.0), Net(gamma=2.0), Net(gamma=2.0)
    examples = numbered_batches(STEPS)
    trainer(tmp_path, max_epochs=2).fit(whole, loader(examples))
    begun = trainer(tmp_path, [StopAfter(STEPS)], max_epochs=2)
    begun.fit(first, loader(examples))
    begun.save_checkpoint(tmp_path / "checkpoint.ckpt")
    resumed = trainer(tmp_path, max_epochs=2)
    resumed.fit(second, loader(examples), ckpt_path=tmp_path / "checkpoint.ckpt", weights_only=True)
    assert resumed.global_step == resumed.optimizers[0].steps == 2 * STEPS
    assert resumed.optimizers[0].propagations == by_hand.propagations(SCHEDULE, 2 * STEPS)
    assert_same_bits(state(whole.net), state(second.net))


class StopAfter(Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.steps


class AveragesOnceAStep(Callback):
    def on_train_start(self, trainer, *_):
        self.count = by_hand.CountAveraging(trainer.strategy.model)

    def on_train_end(self, trainer, *_):
        assert self.count.times == trainer.global_step == STEPS


def test_two_processes_average_the_gradient_once_a_step(tmp_path):
    net = Net(gamma=2.0)
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "RST's module is not the DistributedDataParallel wrapper")
        run = trainer(tmp_path, [AveragesOnceAStep()], **options)
        run.fit(net, loader(numbered_batches(STEPS)))  # both ranks see the same batches
    assert_close(state(net.net), by_hand.weights(SCHEDULE, STEPS, gamma=2.0))


def test_learning_rate_schedulers_made_in_training(tmp_path):
    """Stochastic weight averaging makes one of its own."""

    class Bare(Net):
        def __init__(self):
            super().__init__()
            self.net = network(plain=True)  # for BatchNorm that callback has an epoch without steps

        def configure_optimizers(self):
            return super().configure_optimizers()[0]

    run = trainer(tmp_path, [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)], max_epochs=3)
    run.fit(net := Bare(), loader(numbered_batches(STEPS)))
    optimizer = run.optimizers[0]
    assert optimizer.steps == 3 * STEPS and optimizer.param_groups[0]["swa_lr"] == 0.01
    assert all(p.isfinite().all() for p in net.net.parameters())


def test_a_model_is_as_before_when_training_ends(tmp_path):
    net = Net()
    trainer(tmp_path).fit(net, loader(numbered_batches(2)))
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, [Fail()]).fit(net, loader(numbered_batches(2)))
    assert not {"optimizer_step", "log", "optimizer_zero_grad"} & vars(net).keys()


class Fail(Callback):
    def on_before_backward(self, *_):
        raise ZeroDivisionError


def test_a_batch_without_a_loss_is_left_out(tmp_path):
    class Picky(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (2, 5) else super().training_step(batch, batch_idx)["loss"]

        def on_train_batch_end(self, *_):
            pass

    run = trainer(tmp_path)
    run.fit(Picky(), loader(numbered_batches(STEPS)))
    assert run.optimizers[0].steps == STEPS - 2


def test_accumulate_grad_batches_is_refused(tmp_path):
    with pytest.raises(ValueError, match="accumulate_grad_batches"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(Net(), loader(numbered_batches(2)))


def test_another_optimizer_is_refused(tmp_path):
    class Plain(Net):
        def configure_optimizers(self):
            return sgd(self.parameters())

    with pytest.raises(ValueError, match="configure_optimizers"):
        trainer(tmp_path).fit(Plain(), loader(numbered_batches(2)))


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    propagations, accuracy = run_example("lightning_trainer.py")
    assert propagations == by_hand.propagations(Linear(0.0, 1.0), 24)
    assert accuracy > 0.8
