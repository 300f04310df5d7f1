"""The training loop against the recipe written out."""

import copy
import io
import itertools
import math
import multiprocessing
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from rst import AESAM, RST, VSAM, Constant, LookSAM, MomentumSAM, PartialAscent, StaleAscent
from rst.data import Augment, ImageData, image_folder, train_batches
from rst.training.calibration import cross_fitted_loss
from rst.training.loop import Training
from rst.training.lr_schedule import constant, cosine, step

SEED, BATCH, L2, CLIP = 3, 4, 0.05, 0.7


def some_data(n=10, n_test=7):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n + n_test, 1, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(3, (n + n_test,), generator=generator)
    return ImageData(pixels[:n], labels[:n], pixels[n:], labels[n:], ("a", "b", "c"), (0.5,), (0.3,))


def some_model():
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(*layers)


def training(model, method=None, **settings):
    base = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    p = Constant(0.0 if method is None else 1.0)
    optimizer = RST(base, p, 100, module=model, seed=SEED, **(method or {}))
    arguments = {"epochs": 3, "batch_size": BATCH, "seed": SEED, "l2": L2, "clip_norm": CLIP} | settings
    return Training(model, optimizer, cosine, some_data(), Augment(), **arguments)


def epochs_of(run):
    return [metrics for metrics in run.run() if metrics is not None]


@pytest.mark.parametrize(
    "method", [None, {"rho": 0.3}, {"rho": 0.3, "gamma": 0.5}], ids=["sgd", "sam", "gnp"]
)
def test_the_recipe_written_out(method):
    """L2 inside the loss at the point where the gradient is taken, one clip of the final gradient, the
    learning rate per iteration, metrics of the clean pass."""
    model = some_model()
    theirs = copy.deepcopy(model)
    run = training(model, method)
    metrics = epochs_of(run)

    parameters = list(theirs.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9, nesterov=True)
    total_steps = 3 * 2  # 10 images are two batches of 4: the last partial one is dropped
    t = 0
    for epoch in range(3):
        losses, correct = [], 0
        for x, y in train_batches(some_data(), BATCH, Augment(), SEED, epoch):

            def gradient(x=x, y=y):
                logits = theirs(x)
                loss = F.cross_entropy(logits, y)
                penalty = 0.5 * L2 * sum(p.square().sum() for p in parameters)
                return loss, logits, torch.autograd.grad(loss + penalty, parameters)

            loss, logits, g = gradient()
            losses.append(loss.item())
            correct += (logits.argmax(1) == y).sum().item()
            if method is not None:
                gamma = method.get("gamma", 1.0)
                norm = torch.stack([part.norm() for part in g]).norm()
                theta = [p.detach().clone() for p in parameters]
                for p, part in zip(parameters, g, strict=True):
                    p.data += method["rho"] * part / norm
                _, _, perturbed = gradient()
                for p, kept in zip(parameters, theta, strict=True):
                    p.data = kept
                g = [(1 - gamma) * a + gamma * b for a, b in zip(g, perturbed, strict=True)]
            norm = torch.stack([part.norm() for part in g]).norm()
            for p, part in zip(parameters, g, strict=True):
                p.grad = part * min(1.0, CLIP / norm)
            optimizer.param_groups[0]["lr"] = 0.5 * 0.5 * (1 + math.cos(math.pi * t / total_steps))
            optimizer.step()
            t += 1
        assert metrics[epoch]["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
        assert metrics[epoch]["train_accuracy"] == correct / 8
    for ours, expected in zip(model.parameters(), theirs.parameters(), strict=True):
        # float32, six steps: rounding of the clip and of sums taken in another order.
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert metrics[-1]["lr"] == optimizer.param_groups[0]["lr"]
    assert metrics[-1]["propagations"] == (6 if method is None else 12)


def test_mixed_labels_reach_loss_and_accuracy():
    """The loss is the cross entropy with probabilities; the accuracy counts the image's own label."""
    model = some_model()
    theirs = copy.deepcopy(model)
    mixing = Augment(mixup=1.0)
    run = training(model, epochs=1, l2=0.0)
    run.augment = mixing
    (metrics,) = epochs_of(run)
    batches = list(train_batches(some_data(), BATCH, mixing, SEED, 0))
    unmixed = [labels for _, labels in train_batches(some_data(), BATCH, Augment(), SEED, 0)]
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    losses, correct = [], 0
    for t, ((x, targets), y) in enumerate(zip(batches, unmixed, strict=True)):
        optimizer.param_groups[0]["lr"] = 0.5 * cosine(t / 2)
        logits = theirs(x)
        loss = -(targets * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        correct += (logits.argmax(1) == y).sum().item()
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert metrics["train_accuracy"] == correct / 8


def test_evaluation_covers_the_whole_test_set():
    model = some_model()
    run = training(model, epochs=1)
    (metrics,) = epochs_of(run)
    data = some_data()
    with torch.no_grad():
        logits = model.eval()((data.test_images / 255 - 0.5) / 0.3)
    expected = cross_fitted_loss(logits.numpy(), data.test_labels.numpy())
    assert metrics["calibrated_test_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["test_accuracy"] == (logits.argmax(1) == data.test_labels).sum().item() / 7
    assert metrics["test_loss"] == pytest.approx(F.cross_entropy(logits, data.test_labels).item(), rel=1e-5)


def normed_model():
    """With BatchNorm and dropout."""
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)
    return torch.nn.Sequential(*layers, torch.nn.Linear(8, 3))


METHODS = {
    "sgd": None,
    "sam": {"rho": 0.3},
    "gnp": {"rho": 0.3, "gamma": 0.5},
    "asam": {"rho": 0.3, "adaptive": True},
    "rst": {"rho": 0.3, "schedule": Constant(0.5)},
    "grst": {"rho": 0.3, "gamma": 2.0, "schedule": Constant(0.5)},
}
RIVALS = {
    "looksam": lambda base, **o: LookSAM(base, schedule=0.5, **o),
    "vsam": lambda base, **o: VSAM(base, schedule=0.5, **o),
    "aelooksam": lambda base, **o: AESAM(base, reuse=True, **o),
    "msam": MomentumSAM,
    "stale": StaleAscent,
    "partial": lambda base, **o: PartialAscent(base, fraction=0.5, **o),
}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
AUGMENTS = {
    "none": Augment(),
    "all": Augment(flip=True, crop_padding=1, cutout=2, mixup=1.0),
    "per_batch": Augment(cutout=2, mixup=1.0, per_batch=True),
}


def assert_equal_state(some, other):
    """Bit for bit, in everything but times."""
    assert type(some) is type(other)
    if isinstance(some, dict):
        assert some.keys() == other.keys()
        for key in some:
            if not str(key).startswith("seconds"):
                assert_equal_state(some[key], other[key])
    elif isinstance(some, list | tuple):
        assert len(some) == len(other)
        for a, b in zip(some, other, strict=True):
            assert_equal_state(a, b)
    elif isinstance(some, torch.Tensor):
        assert torch.equal(some, other)
    else:
        assert some == other


@settings(max_examples=40)
@given(
    method=st.sampled_from(sorted(METHODS | RIVALS)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    augment=st.sampled_from(sorted(AUGMENTS)),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    grad_accumulation=st.sampled_from([1, 2]),
    evaluate_every=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**40),
    sessions=st.lists(st.integers(1, 7), min_size=1, max_size=3),
)
def test_resuming_anywhere_continues_bit_for_bit(
    method, optimizer, augment, precision, grad_accumulation, evaluate_every, seed, sessions
):
    """A run that is left after any of its steps, batches of an evaluation, or epochs."""

    def start():
        model = normed_model()
        if method == "msam":
            base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        else:
            base = OPTIMIZERS[optimizer](model.parameters(), lr=0.05)
        if method in RIVALS:
            wrapped = RIVALS[method](base, total_steps=100, rho=0.3, module=model)
        else:
            rule = {"schedule": Constant(float(METHODS[method] is not None))} | (METHODS[method] or {})
            wrapped = RST(base, rule.pop("schedule"), 100, module=model, seed=seed, **rule)
        options = {"precision": precision, "grad_accumulation": grad_accumulation, "l2": L2}
        arguments = {"epochs": 3, "batch_size": BATCH, "seed": seed, "clip_norm": CLIP} | options
        arguments["evaluate_every"] = evaluate_every
        return Training(model, wrapped, cosine, some_data(), AUGMENTS[augment], **arguments)

    whole = start()
    evaluations = 3 if evaluate_every == 1 else 2
    assert len(list(whole.run())) == 3 * (2 + 1) + evaluations * 2  # batches, epochs' ends, test batches
    run = start()
    for points in sessions:
        for _ in itertools.islice(run.run(), points):
            pass
        file = io.BytesIO()
        torch.save(run.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        run = start()
        torch.manual_seed(99)  # the state of the global generator does not matter
        run.load_state_dict(saved)
        assert run.state_dict()["epoch"]["seconds"] >= saved["epoch"]["seconds"]
    list(run.run())
    assert_equal_state(run.state_dict(), whole.state_dict())
    assert [metrics["epoch"] for metrics in run.metrics] == [1, 2, 3]


@pytest.mark.parametrize("method", ["vsam", "aelooksam"])
def test_a_rule_in_which_the_loss_scale_does_not_cancel_knows_it(method):
    model = some_model()
    optimizer = RIVALS[method](torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10, module=model)
    arguments = {"epochs": 1, "batch_size": BATCH, "seed": 0, "clip_norm": CLIP}
    run = Training(model, optimizer, cosine, some_data(), Augment(), precision="fp16", **arguments)
    assert run.optimizer.scaler is run.scaler


def test_a_run_does_not_go_on_with_other_data():
    state = training(some_model()).state_dict()
    other = training(some_model())
    other.data = replace(other.data, mean=(0.51,))
    with pytest.raises(ValueError, match="the data are not those"):
        other.load_state_dict(state)


def test_numpys_scalars_can_be_resumed():
    """As a data set or a learning-rate schedule of one's own may have them; torch.load refuses them."""

    def start():
        run = training(some_model())
        run.data = replace(run.data, classes=tuple(np.array(run.data.classes)))
        run.lr_factor = lambda progress: np.float64(1.0 - progress / 2)
        return run

    run, file = start(), io.BytesIO()
    next(iter(run.run()))
    torch.save(run.state_dict(), file)
    file.seek(0)
    start().load_state_dict(torch.load(file, weights_only=True))


class Poisoned(torch.nn.Module):
    """The model with something that is not finite in its loss, gradient or a weight, from its nth call on."""

    def __init__(self, model, where, call):
        super().__init__()
        self.model, self.where, self.left = model, where, call

    def forward(self, x):
        self.left -= self.training
        logits = self.model(x)
        if self.left > 0 or not self.training:
            return logits
        if self.where == "weight":  # one on which the loss does not depend
            with torch.no_grad():
                self.model[1].weight[0, 0] = math.inf
            return logits.detach() * 0 + self.model[3].bias
        if self.where == "gradient":
            logits.register_hook(lambda gradient: gradient * math.nan)
            return logits
        return logits * math.nan


@pytest.mark.parametrize(
    ("where", "method", "call", "cause"),
    [
        ("loss", None, 4, "loss is nan"),
        ("loss", {"rho": 0.3}, 5, "loss is nan"),
        ("loss", {"rho": 0.3}, 4, "gradient norm is nan"),  # in the perturbed pass
        ("gradient", None, 4, "gradient norm is nan"),
        ("gradient", {"rho": 0.3}, 5, "gradient norm is nan"),
        ("gradient", {"rho": 0.3, "gamma": 0.5}, 6, "gradient norm is nan"),
        ("weight", None, 4, "norm of the weights is inf"),
        ("weight", {"rho": 0.3}, 5, "norm of the weights is inf"),
    ],
)
def test_what_is_not_finite_stops_before_the_update(where, method, call, cause):
    model = some_model()
    run = training(Poisoned(model, where, call), method, l2=0.0)
    weights, step = None, 0
    points = run.run()
    with pytest.raises(FloatingPointError) as stopped:  # noqa: PT012
        while True:
            next(points)
            weights = [p.detach().clone() for p in model.parameters()]
            step = run.optimizer.steps
    assert step == (call - 1) // (1 if method is None else 2)
    assert str(stopped.value).startswith(
        f"the {cause} at step {step} (epoch {1 + step // 2}, batch {step % 2}); the last checkpoint is kept"
    )
    if where == "weight":
        weights[0][0, 0] = math.inf
    for p, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, before)


def test_a_pixel_that_is_not_a_number():
    """Images are integers, but their statistics are not."""
    run = training(some_model())
    run.data = replace(run.data, std=(math.nan,))
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0 \(epoch 1, batch 0\); the last"):
        next(run.run())
    assert run.optimizer.base.state == {} and run.metrics == []


def test_an_update_that_overflows_is_never_saved():
    run = training(some_model(), clip_norm=None)
    points = run.run()
    next(points)
    assert run.state_dict()["epoch"]["steps"] == 1
    with torch.no_grad():
        run.model[1].bias[0] = math.inf
    with pytest.raises(FloatingPointError, match="a weight is not finite after step 0"):
        run.state_dict()


def test_an_overflow_under_fp16_skips_its_step_and_only_many_in_a_row_stop_the_run():
    def start(overflows):
        model = some_model()
        run = training(model, {"rho": 0.3}, precision="fp16", epochs=20)
        unscale = run.scaler.unscale_

        def overflowing(optimizer):
            if run.optimizer.steps in overflows:
                model[1].weight.grad[0, 0] = math.inf
            unscale(optimizer)

        run.scaler.unscale_ = overflowing
        return run, model

    run, model = start({2, 3, 7})
    before = [p.detach().clone() for p in model.parameters()]
    for _ in run.run():
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        before = [p.detach().clone() for p in model.parameters()]
        if run.optimizer.steps in (2, 3, 7):
            assert same
    assert [metrics["skipped_steps"] for metrics in run.metrics][:5] == [1, 2, 2, 3, 3]
    assert run.metrics[-1]["skipped_steps"] == 3 and run.optimizer.steps == 40
    assert run.scaler.get_scale() == 2.0**13

    run, _ = start(set(range(5, 100)))
    with pytest.raises(FloatingPointError, match=r"20 steps up to step 23 \(epoch 12, batch 1\) overflowed"):
        list(run.run())
    assert run.optimizer.steps == 24


def test_grad_accumulation_only_changes_rounding():
    def trained(grad_accumulation):
        run = training(some_model(), {"rho": 0.3, "gamma": 0.5}, grad_accumulation=grad_accumulation)
        run.augment = Augment(mixup=1.0)
        list(run.run())
        return run

    whole, parts = trained(1), trained(4)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(whole.metrics, parts.metrics, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["train_accuracy"] == b["train_accuracy"] and a["propagations"] == b["propagations"]


def test_evaluating_less_often_changes_nothing_else():
    every, second = (epochs_of(training(some_model(), evaluate_every=n)) for n in (1, 2))
    ours = {"test_loss", "test_accuracy"}
    assert [ours <= metrics.keys() for metrics in second] == [False, True, True]  # the last one always
    assert ["calibrated_test_loss" in metrics for metrics in every] == [False, False, True]
    for a, b in zip(every, second, strict=True):
        same = b.keys() - {"seconds_train", "seconds_data", "seconds_evaluate"}
        assert {key: a[key] for key in same} == {key: b[key] for key in same}


def test_learning_rate_factors():
    assert [cosine(0.0), cosine(0.5), cosine(1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert [step(x) for x in (0.0, 0.49, 0.5, 0.75, 0.99)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    assert constant(0.7) == 1.0


class NoSynchronization(TorchDispatchMode):
    """Raises where the host would wait for a GPU: to read a value, or a shape that depends on one."""

    SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::").startswith(self.SYNCHRONIZING):
            raise AssertionError(f"{func} in a step")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("augment", ["none", "all", "per_batch"])
@pytest.mark.parametrize("method", [*sorted(METHODS), "normalized"])
def test_a_step_makes_no_gpu_wait(method, augment, precision):
    rule = {"rho": 0.3, "gamma": 0.5, "mix": "normalized"} if method == "normalized" else METHODS[method]
    rule = dict(rule or {})
    rule.pop("schedule", None)
    model = normed_model()
    run = training(model, None if method == "sgd" else rule, precision=precision)
    run.augment = AUGMENTS[augment]
    points = run.run()
    next(points)
    with NoSynchronization():
        next(points)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSynchronization():
        float(run._sums[0])


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_s_step_makes_no_gpu_wait(name):
    """But AE-SAM's, which decides by a number that is on the device."""
    model = normed_model()
    run = training(model)
    base = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    run.optimizer = RIVALS[name](base, total_steps=100, module=model)
    points = run.run()
    next(points)
    waits = pytest.raises(AssertionError, match="_local_scalar_dense")
    with waits if name == "aelooksam" else nullcontext(), NoSynchronization():
        for _ in range(3):
            next(points)


def test_partial_ascent_propagates_the_first_images_of_the_batch():
    """In parts of the size that the batch's parts have; loss and accuracy are estimated from them."""
    model, seen = some_model(), []
    run = training(model, grad_accumulation=2, l2=0.0, epochs=1)
    run.optimizer = PartialAscent(run.optimizer.base, total_steps=100, fraction=0.75, module=model)
    model.register_forward_hook(lambda module, x, y: seen.append((x[0], y.detach())))
    (metrics,) = epochs_of(run)
    assert [len(x) for x, _ in seen[:8]] == [2, 1, 2, 2] * 2
    batches = list(train_batches(some_data(), BATCH, Augment(), SEED, 0))
    losses, correct = [], 0.0
    for i, (x, y) in enumerate(batches):
        ascent = seen[4 * i : 4 * i + 2]
        assert torch.equal(torch.cat([part for part, _ in ascent]), x[:3])
        logits = torch.cat([logits for _, logits in ascent])
        losses.append(F.cross_entropy(logits, y[:3]).item())
        correct += (logits.argmax(1) == y[:3]).sum().item() * 4 / 3
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert metrics["train_accuracy"] == pytest.approx(correct / 8, rel=1e-6)
    assert metrics["propagations"] == 2 * 1.75


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sam", "grst"])
def test_compiled_steps_equal_eager_ones(method):
    """Also in the perturbed pass, in which BatchNorm is frozen and θ is stored elsewhere."""
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()]
        model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 3))
        if compiled:
            model.compile()
        rule = dict(METHODS[method])
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = RST(base, rule.pop("schedule", Constant(1.0)), 100, module=model, seed=SEED, **rule)
        runs.append(
            Training(model, optimizer, cosine, some_data(), Augment(), epochs=3, batch_size=4, seed=0)
        )
        list(runs[-1].run())
    eager, compiled = (run.state_dict()["model"] for run in runs)
    assert eager.keys() == compiled.keys()
    for key, value in eager.items():
        assert torch.allclose(value, compiled[key], rtol=1e-4, atol=1e-5), key


@pytest.mark.slow
def test_compiled_dropout_is_the_same_in_both_passes():
    """With ρ = 0 both passes have the same gradient only if they drop the same activations."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3))
    model.compile()
    gradients = []
    for p in (0.0, 1.0):
        optimizer = RST(torch.optim.SGD(model.parameters(), lr=0.0), Constant(p), 10, rho=0.0, module=model)
        torch.manual_seed(1)

        def closure():
            model(torch.ones(8, 1, 4, 4)).square().sum().backward()

        optimizer.gradient(closure)
        gradients.append(model[2].weight.grad.clone())
        optimizer.zero_grad()
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


@pytest.fixture
def streamed(tmp_path):
    """Images in files, decoded by another process."""
    for split in ("train", "test"):
        for name in ("a", "b", "c"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (4, 4), 20 * i).save(tmp_path / split / name / f"{i}.png")
    return image_folder(str(tmp_path), in_memory=False, workers=1)


@pytest.mark.parametrize("how", ["an error in a step", "left after a step"])
def test_data_workers_end_with_the_epoch_they_work_for(how, streamed, monkeypatch):
    """Even while the error, and so everything in its traceback, is kept: Python waits for them at its end."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))
    model(torch.zeros(1, *streamed.train_images.shape[1:]))
    optimizer = RST(torch.optim.SGD(model.parameters(), lr=0.1), Constant(0.0), 100, module=model)
    run = Training(model, optimizer, cosine, streamed, Augment(), epochs=1, batch_size=4, seed=0)
    points = run.run()
    next(points)
    assert multiprocessing.active_children()
    if how == "left after a step":
        points.close()
    else:
        monkeypatch.setattr(run, "_step", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError) as kept:
            next(points)
        assert kept.tb
    assert not multiprocessing.active_children()
